"""Checkpoints: written whole, read without executing code, refused with both values where they do not fit."""
import io
import pickle
import struct
import zipfile
import zlib

import torch

from common.files import atomic_write
from features.encoders import load_encoders
from model import VQAModel
from vocab import Vocab

FORMAT = "generative-vqa checkpoint 1"
KEYS = ("format", "stage", "weights", "vocab", "sizes", "encoders", "cut", "settings", "epoch", "val_loss")
# what the entries of a checkpoint are: a type, a range or a tuple of choices, or a dict of entries
COUNT, SIZE = range(10 ** 9), range(1, 10 ** 6)
KINDS = {"weights": dict, "vocab": list, "settings": dict, "stage": str, "epoch": COUNT, "val_loss": float,
         "sizes": {"hidden_size": SIZE, "num_layers": SIZE, "dropout": float, "question_max_len": SIZE, "answer_max_len": SIZE,
                   "inputs": ("both", "question", "image"), "fusion": ("gated", "concat"),
                   "image_pooling": ("pooled", "attention"), "answer_sampling": ("majority", "humans"),
                   "picture_decoder": ("pillow", "fast")},
         "encoders": {"clip_model": str, "clip_pretrained": str, "gpt2_model": str, "fingerprints": {"clip": str, "gpt2": str}},
         "cut": {"clip_layers": COUNT, "gpt2_layers": COUNT}}
FIXED = tuple(KINDS["sizes"])  # what stage 1 fixes for every later script
# what reading a file raises that is no zip, no checkpoint or no longer one
NO_CHECKPOINT = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError, EOFError, ValueError,
                 KeyError, AttributeError, TypeError, IndexError, OSError)


def save_checkpoint(path, content):
    """Write a dict of tensors and plain Python, whole or not at all.

    Through a buffer, so that equal content gives equal bytes whatever the file's name is. Raises OSError that says so
    where the disk is full.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    try:
        with atomic_write(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}); what stood there before is intact: make room "
                      "and run the same command with --resume") from error


def read_checkpoint(path, keys=KEYS):
    """The dict that `save_checkpoint` wrote, on the CPU. Raises FileNotFoundError or ValueError of one line."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # every part against its checksum, which torch.load does not look at
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"checkpoint {path} not found: train first (`python train.py`, then `python fine_tune.py`), "
                                "or name one with --checkpoint") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder: name the checkpoint in it") from error
    except NO_CHECKPOINT as error:
        raise ValueError(f"{path} is not a checkpoint of this program, or is damaged "
                         f"({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} in it does not match its checksum; train again, or take a copy")
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this program: it lacks {', '.join(missing)}")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has the format {content['format']!r}, this program reads {FORMAT!r}")
    for name in KINDS.keys() & content.keys():
        check_kind(content[name], KINDS[name], f"{path}: {name}")
    if "weights" in content:
        check_weights(content["weights"], path)
    return content


def check_kind(value, kind, where):
    """Raise ValueError that tells `where` unless `value` is of the `kind`, as in KINDS."""
    if isinstance(kind, dict):
        check_kind(value, dict, where)
        if value.keys() != kind.keys():
            raise ValueError(f"{where} holds {sorted(map(str, value))}, not {sorted(kind)}: train again")
        for name, own in kind.items():
            check_kind(value[name], own, f"{where} {name}")
    elif isinstance(kind, tuple):
        if value not in kind:
            raise ValueError(f"{where} is {value!r:.60}, none of {', '.join(kind)}: train again")
    elif isinstance(kind, range):
        if type(value) is not int or value not in kind:
            raise ValueError(f"{where} is {value!r:.60}, no number from {kind.start} to {kind.stop - 1}: train again")
    elif type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where} is {value!r:.60}, which is no {kind.__name__} as this program writes it: train again")


def check_weights(weights, path):
    """Raise ValueError unless all `weights` are finite tensors, the decoder's among them."""
    for name, tensor in weights.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is no tensor of finite numbers: train again")
    if "decoder.embedding.weight" not in weights:
        raise ValueError(f"{path} is not a whole checkpoint of this program: it lacks decoder.embedding.weight")


def checkpoint_vocab(checkpoint, path):
    """The checkpoint's vocabulary. Raises ValueError where it does not fit the weights."""
    vocab = Vocab(checkpoint["vocab"])
    rows = checkpoint["weights"]["decoder.embedding.weight"].shape[0]
    if rows != len(vocab):
        raise ValueError(f"{path}: the vocabulary has {len(vocab)} words and the decoder {rows}")
    return vocab


def check_encoders(checkpoint, encoders, path):
    """Raise ValueError where the loaded encoders are not those that the checkpoint was trained with."""
    found = encoders.fingerprints()
    for name, expected in checkpoint["encoders"]["fingerprints"].items():
        if found[name] != expected:
            raise ValueError(f"{path} was trained with {checkpoint['encoders'][f'{name}_model']} of fingerprint {expected}, "
                             f"the one found here has {found[name]}: use the same weights, or train again")


def load_weights(model, weights, path):
    """Copy `weights` into the model's trainable parameters. Raises ValueError where names or shapes differ."""
    own = model.trainable_weights()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        raise ValueError(f"{path} does not fit the model: it lacks {missing[:3]} and has {unknown[:3]} "
                         f"({len(missing)} and {len(unknown)} in all)")
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            raise ValueError(f"{path}: {name} has the shape {tuple(tensor.shape)}, the model {tuple(own[name].shape)}")
    for name, tensor in weights.items():
        own[name].copy_(tensor)


def build_model(encoders, vocab_size, sizes):
    """A VQAModel with both encoders frozen and a fresh head; `sizes` as in a checkpoint."""
    names = ("hidden_size", "num_layers", "dropout", "inputs", "fusion", "image_pooling")
    chosen = {name: sizes[name] for name in names}
    try:
        return VQAModel(encoders.image.visual, encoders.question.gpt2, vocab_size, **chosen)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"a model of --hidden-size {sizes['hidden_size']} and --num-layers {sizes['num_layers']} cannot be "
                         f"built: {error!s:.150}") from error


def restore_model(path, checkpoint=None):
    """(checkpoint, encoders, vocab, model) of a checkpoint file: the model as it was saved, at its cut, on the CPU."""
    checkpoint = checkpoint or read_checkpoint(path)
    vocab = checkpoint_vocab(checkpoint, path)
    names = checkpoint["encoders"]
    encoders = load_encoders(names["clip_model"], names["clip_pretrained"], names["gpt2_model"])
    check_encoders(checkpoint, encoders, path)
    model = build_model(encoders, len(vocab), checkpoint["sizes"])
    model.unfreeze(**checkpoint["cut"])
    load_weights(model, checkpoint["weights"], path)
    return checkpoint, encoders, vocab, model
