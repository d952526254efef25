"""A trained model from its checkpoint: read without executing code, rebuilt around the pretrained encoders, refused if it
does not fit. `training.checkpoint` writes them."""
import pickle
import re
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download

from common.files import refuse_device
from features.encoders import Encoders, from_cache_or_hub, load_encoders
from model import ModelConfig, VQAModel
from vocab import Vocab

FORMAT = "generative-vqa checkpoint 3"
KEYS = ("format", "stage", "weights", "vocab", "model_config", "encoders", "trainable_blocks", "settings", "epoch", "val_loss",
        "trained_on", "training_texts")
ROOT = Path(__file__).resolve().parents[1]  # of the repository
# of the hub, in which vqa_checkpoint.pt is searched: not a path or an address
REPOSITORY = re.compile(r"hf:\w[\w.-]*/\w[\w.-]*(?<!\.pt)(@[\w./-]+)?")
# what reading an unreadable or foreign checkpoint raises
UNREADABLE_CHECKPOINT = (zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, RuntimeError, EOFError,
                         ValueError, KeyError, AttributeError, TypeError, IndexError, OSError)


@dataclass
class CheckpointConfig:
    """Settings of every script that loads a model: its checkpoint, and other names of the encoders."""

    checkpoint: str
    clip_model: str | None = None
    """CLIP of the checkpoint under another name, if it has moved: open_clip's name, or local-dir:FOLDER"""
    clip_pretrained: str | None = None
    """open_clip's weights tag, or a weights file, if another one than in the checkpoint"""
    gpt2_model: str | None = None
    """GPT-2 of the checkpoint under another name, if it has moved: hub name or local folder"""


@dataclass
class TrainedModel:
    """A model as its checkpoint describes it, in eval mode on the CPU, with everything it needs to answer."""

    model: VQAModel
    encoders: Encoders
    vocab: Vocab
    checkpoint: dict
    path: Path | None = None  # of the checkpoint file


def find_checkpoint(checkpoint):
    """The Path of the file that --checkpoint names: a local file, or hf:USER/REPO, hf:USER/REPO@REVISION of the hub.

    Of a hub repository vqa_checkpoint.pt is downloaded. Raises FileNotFoundError if the hub cannot be reached, or lacks it.
    Raises ValueError if it is neither.
    """
    if not isinstance(checkpoint, str | Path):
        raise ValueError(f"the checkpoint is {checkpoint!r:.60}: give a path or hf:USER/REPO")
    if not str(checkpoint).startswith("hf:"):
        return Path(checkpoint)
    repository, _, revision = str(checkpoint).removeprefix("hf:").partition("@")
    if not REPOSITORY.fullmatch(str(checkpoint)):
        raise ValueError(f"--checkpoint {checkpoint} is no hf:USER/REPO or hf:USER/REPO@REVISION of the hub; a local file is "
                         "named without hf:")
    download = partial(hf_hub_download, repository, "vqa_checkpoint.pt", revision=revision or None)
    return Path(from_cache_or_hub(download, checkpoint, "--checkpoint FOLDER/vqa_checkpoint.pt"))


def read_checkpoint(path, keys=KEYS):
    """The dict that `save_checkpoint` wrote, on the CPU. Raises FileNotFoundError or ValueError of one line."""
    refuse_device(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not compare the checksums
        content = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        existing = next((f": {other} is there" for other in existing_checkpoints()), "")
        raise FileNotFoundError(f"checkpoint {path} not found: train first (`python train.py`, then `python fine_tune.py`), "
                                f"or name one with --checkpoint{existing}") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path} is a folder: name the checkpoint in it") from error
    except UNREADABLE_CHECKPOINT as error:
        raise ValueError(f"{path} is not a checkpoint of this program, or is damaged ({type(error).__name__})") from error
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} in it does not match its checksum; train again, or use a copy")
    if not isinstance(content, dict) or "format" not in content:
        raise ValueError(f"{path} is not a checkpoint of this program: it names no format")
    if content["format"] != FORMAT:
        raise ValueError(f"{path} has the format {content['format']!r}, this program reads {FORMAT!r}: train again")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{path} is not a checkpoint of this program: it lacks {', '.join(missing)}")
    return content


def existing_checkpoints():
    """Paths of checkpoints to name in a message: those of runs below the working folder's output/, then the demo's."""
    demo = ROOT / "demo/vqa_checkpoint.pt"
    demo = demo.relative_to(Path.cwd()) if demo.is_relative_to(Path.cwd()) else demo
    return sorted(Path("output").rglob("vqa_checkpoint.pt")) + [demo] * demo.is_file()


def load_model(checkpoint, cfg=None):
    """The TrainedModel of a checkpoint: a path or hf:USER/REPO. Raises FileNotFoundError or ValueError of one line.

    `cfg`: a CheckpointConfig. Its names that are not None replace the names in the checkpoint.
    """
    path = find_checkpoint(checkpoint)
    checkpoint = read_checkpoint(path)
    try:
        config, stored = ModelConfig(**checkpoint["model_config"]), checkpoint["encoders"]
        vocab = Vocab(checkpoint["vocab"], whole_answers=config.decoder == "classifier")
        given = {name: getattr(cfg, name, None) for name in ("clip_model", "clip_pretrained", "gpt2_model")}
        used = {name: stored[name] if other is None else other for name, other in given.items()}
        encoders = load_encoders(*(find_local(name, path) for name in used.values()))
        encoders.names = used  # not the path that was found: a relative folder can move together with the checkpoint
        require_same_encoders(stored, encoders.describe(), path)
        model = VQAModel(encoders.image.visual, encoders.question.gpt2, len(vocab), config)
        if any(checkpoint["trained_on"][name].dtype != torch.int64 for name in ("images", "questions")):
            raise TypeError("its trained_on holds no hashes")
        model.unfreeze(**checkpoint["trainable_blocks"])
        load_weights(model, checkpoint["weights"], path)
    except (LookupError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} was written by another version of this program, or is damaged ({error!s:.150}): "
                         "train again") from error
    return TrainedModel(model.eval(), encoders, vocab, checkpoint, path)


def find_local(name, checkpoint_path):
    """`name` of an encoder. A relative path is searched in the working folder, in the repository and beside the checkpoint.

    Raises FileNotFoundError if local-dir:FOLDER is in none of them.
    """
    scheme = "local-dir:" if name.startswith("local-dir:") else ""
    if not scheme and "/" not in name and "." not in name:
        return name  # open_clip's or the hub's
    for folder in (Path(), ROOT, Path(checkpoint_path).parent):
        if (path := folder / name.removeprefix(scheme)).exists():
            return f"{scheme}{path}"
    if scheme:
        raise FileNotFoundError(f"{name} of {checkpoint_path} is neither in the working folder nor in {ROOT} nor beside the "
                                "checkpoint: name the folder with --clip-model local-dir:FOLDER")
    return name


def require_same_encoders(expected, found, path):
    """Raise ValueError if the loaded encoders are not those that the checkpoint was trained with."""
    for name, (old, new) in differences(expected["fingerprints"], found["fingerprints"]).items():
        raise ValueError(f"{path} was trained with {expected[f'{name}_model']} of fingerprint {old}, the one found here has "
                         f"{new}: name the same weights and settings with --{name}-model, or train again")


def load_weights(model, weights, path):
    """Copy `weights` into the trainable parameters. Raises ValueError if a name or shape differs, or a number is not finite."""
    own = model.trainable_weights()
    unlike = differences(*({name: tuple(tensor.shape) for name, tensor in side.items()} for side in (weights, own)))
    for name, (there, here) in unlike.items():
        raise ValueError(f"{path} does not fit the model: {name} has the shape {there} in the file and {here} in the model "
                         f"({len(unlike)} such weights)")
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite: train again")
        own[name].copy_(tensor)


def differences(old, new):
    """{name: (old value, new value)} of the entries that differ; None stands for a missing one."""
    return {name: (old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)}
