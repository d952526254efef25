"""What the frozen encoders say about each distinct picture and question: computed once, stored, memory-mapped.

Two stores stand behind it in `cache_dir`: pictures decoded to the encoder's pixels (one file per
transform and set of pictures), and states at the freeze boundary (one file per weights and cut).
A file's name holds a hash of all that its content depends on, so a stale one is never looked at, and
a file gets that name only when it is whole.
"""
import contextlib
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from files import whole_file, write_json
from pictures import UNREADABLE, open_picture

MAX_UNREADABLE = 0.01  # share of pictures that may be missing or broken before a run stops
ENCODE_BATCH = 64
CODE_VERSION = 1  # part of every key: raise it when open_picture or an encode_*_frozen computes something else
DEVICE_SHARE = 0.4  # of the free device memory that one store may fill; a larger one stays in host memory


class FeatureStore:
    """States of all distinct pictures and questions, on the device where they fit, else memory-mapped.

    `image_states` (pictures, ...) and `question_states` (questions, ...) are what the model's
    `encode_*_frozen` gave; `question_lengths` (questions,) counts real tokens; `image_row` and
    `question_row` map a path or a question to its row.
    """

    def __init__(self, image_paths, image_states, questions, question_states, question_lengths, device):
        self.image_row = {path: row for row, path in enumerate(image_paths)}
        self.question_row = {question: row for row, question in enumerate(questions)}
        self.image_states, self.question_states = to_device(image_states, device), to_device(question_states, device)
        self.question_lengths, self.device = question_lengths, device

    def select(self, states, index):
        """Rows `index` (B,), a CPU tensor, of one of the two stores, on the device."""
        return states[index.to(states.device)].to(self.device, non_blocking=True)


def to_device(states, device):
    if device.type == "cuda" and states.nbytes < DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return states.to(device)
    return states


def build_store(model, encoders, pixels, questions, question_max_len, cache_dir, precision):
    """The FeatureStore of `pixels` (a PixelStore) and `questions` at the model's cut, encoded in `precision`."""
    questions = sorted(set(questions))
    ids, lengths = tokenize_questions(encoders.question.tokenizer, questions, question_max_len)
    image_states = encode_pictures(model, encoders.image, pixels, cache_dir, precision)
    question_states = encode_questions(model, encoders.question, ids, lengths, cache_dir, precision)
    return FeatureStore(pixels.paths, image_states, questions, question_states, lengths, precision.device)


# ---- pictures to pixels


class PixelStore:
    """Pictures as the encoder's input before normalisation: `pixels` (N, 3, S, S) uint8, memory-mapped, of `paths`."""

    def __init__(self, paths, pixels, key):
        self.paths, self.pixels, self.key = paths, pixels, key


def decode_pictures(folder, image_paths, image_encoder, cache_dir, workers):
    """Decode each distinct picture once; a PixelStore of those that can be read.

    Missing and unreadable pictures are named and counted; more than MAX_UNREADABLE of them is a ValueError.
    """
    folder, paths = Path(folder), sorted(set(image_paths))
    with ThreadPoolExecutor(workers) as pool:
        digests = list(pool.map(lambda path: file_digest(folder / path), paths))
    size = image_encoder.visual.image_size
    key = hash_of(["pixels", CODE_VERSION, image_encoder.visual.preprocess_cfg, repr(image_encoder.resize),
                   list(zip(paths, digests, strict=True))])
    target = Path(cache_dir) / f"pixels-{key}.npy"
    if not target.is_file():
        build_pixels(target, folder, paths, digests, image_encoder.resize, size, workers)
    unreadable = json.loads(target.with_suffix(".json").read_text(encoding="utf-8"))["unreadable"]
    report_unreadable(unreadable, len(paths))
    readable = [path for path in paths if path not in unreadable]
    return PixelStore(readable, np.load(target, mmap_mode="c"), key)


def file_digest(path):
    """Hash of a file's bytes, or None where there is no such file."""
    try:
        return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    except OSError:
        return None


def build_pixels(target, folder, paths, digests, resize, size, workers):
    """Write the pixel store `target` (N, 3, S, S) uint8 and, first, the list of unreadable pictures beside it."""
    def decode(item):
        path, digest = item
        if digest is None:
            return path, None, "missing"
        try:
            return path, np.asarray(resize(open_picture(folder / path))), None
        except UNREADABLE as error:
            return path, None, str(error) or type(error).__name__

    unreadable, filled = {}, 0
    with new_array(target, (len(paths), 3, *size), np.uint8) as pixels, ThreadPoolExecutor(workers) as pool:
        for path, picture, error in tqdm(pool.map(decode, zip(paths, digests, strict=True)), "decoding pictures",
                                         len(paths), unit=" pictures", mininterval=0.5):
            if error:
                unreadable[path] = error
                report_unreadable(unreadable, len(paths), final=False)
                continue
            pixels[filled] = picture.transpose(2, 0, 1)
            filled += 1
        write_json(target.with_suffix(".json"), {"unreadable": unreadable})


def report_unreadable(unreadable, total, final=True):
    """Name and count the pictures that cannot be read; raise ValueError when they are too many."""
    names = "; ".join(f"{path} ({reason})" for path, reason in list(unreadable.items())[:5])
    if len(unreadable) > MAX_UNREADABLE * total:
        raise ValueError(f"{len(unreadable)} of {total} pictures cannot be read, more than {MAX_UNREADABLE:.0%}: {names}; "
                         "mend or remove them, or build the data set again with `python mini_vqa_v2.py`")
    if unreadable and final:
        print(f"{len(unreadable)} of {total} pictures cannot be read, their rows are left out: {names}")


# ---- pixels and questions to states


def encode_pictures(model, image_encoder, pixels, cache_dir, precision):
    """States of all pictures at the cut: a memory-mapped tensor (N, D_i) or (N, T, W)."""
    def encode(rows):
        batch = torch.from_numpy(pixels.pixels[rows]).to(precision.device)
        return model.encode_image_frozen(image_encoder.normalize(batch))

    key = [pixels.key, image_encoder.fingerprint, image_encoder.mean, image_encoder.std, model.clip_layers,
           model.image_pooling]
    return stored_states("image_states", key, len(pixels.paths), encode, cache_dir, precision, "pictures")


def tokenize_questions(tokenizer, questions, question_max_len):
    """Token ids (N, Q) padded on the right and lengths (N,); prints how many questions the length cuts."""
    encoded = [ids or [tokenizer.eos_token_id] for ids in tokenizer(questions)["input_ids"]]
    cut = sum(len(ids) > question_max_len for ids in encoded)
    encoded = [ids[:question_max_len] for ids in encoded]
    lengths = torch.tensor([len(ids) for ids in encoded])
    input_ids = torch.full((len(encoded), int(lengths.max())), tokenizer.pad_token_id)
    for row, ids in enumerate(encoded):
        input_ids[row, :len(ids)] = torch.tensor(ids)
    print(f"questions: {len(encoded)} distinct, {cut} cut to {question_max_len} tokens")
    return input_ids, lengths


def encode_questions(model, question_encoder, input_ids, lengths, cache_dir, precision):
    """States of all questions at the cut: a memory-mapped tensor (N, D_q) or (N, Q, W)."""
    mask = torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)       # (N, Q)

    def encode(rows):
        return model.encode_question_frozen(input_ids[rows].to(precision.device), mask[rows].to(precision.device))

    ids_hash = hashlib.blake2b(input_ids.numpy().tobytes() + lengths.numpy().tobytes(), digest_size=16).hexdigest()
    key = [ids_hash, question_encoder.fingerprint, model.gpt2_layers]
    return stored_states("question_states", key, len(input_ids), encode, cache_dir, precision, "questions")


def stored_states(name, key, count, encode, cache_dir, precision, unit):
    """The states from `cache_dir`, computed first by `encode(slice)` in batches where they are not there yet."""
    dtype = precision.dtype or torch.float32
    target = Path(cache_dir) / f"{name}-{hash_of([name, CODE_VERSION, key, str(dtype)])}.npy"
    if not target.is_file():
        slices = [slice(start, min(start + ENCODE_BATCH, count)) for start in range(0, count, ENCODE_BATCH)]
        with torch.no_grad(), precision.autocast():
            first = encode(slices[0])
        stored = torch.float32 if first.dim() == 2 else dtype  # features are small: no need to round them
        with new_array(target, (count, *first.shape[1:]), numpy_dtype(stored)) as array, \
                tqdm(total=count, desc=f"encoding {unit}", unit=f" {unit}", mininterval=0.5) as bar:
            for rows in slices:
                with torch.no_grad(), precision.autocast():
                    states = first if rows.start == 0 else encode(rows)
                array[rows] = as_numpy(states.to(stored).cpu())
                bar.update(rows.stop - rows.start)
    array = torch.from_numpy(np.load(target, mmap_mode="c"))
    return array.view(torch.bfloat16) if array.dtype == torch.int16 else array


def numpy_dtype(dtype):
    """numpy has no bfloat16: its bits are stored as int16."""
    return {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}[dtype]


def as_numpy(tensor):
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


# ---- files


@contextlib.contextmanager
def new_array(target, shape, dtype):
    """Yield a memory-mapped .npy array to fill; it appears under its name only when the block succeeds."""
    remove_leftovers(target)
    with whole_file(target) as temporary:
        array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map would kill the process
            with open(temporary, "r+b") as stream:
                os.posix_fallocate(stream.fileno(), 0, os.path.getsize(temporary))
        yield array
        array.flush()


def remove_leftovers(target):
    """Delete temporary files that a killed process left for the same target; a live process keeps its own."""
    for leftover in Path(target).parent.glob(f".{Path(target).stem}.*.tmp{Path(target).suffix}"):
        pid = int(leftover.name.split(".")[-3])
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            leftover.unlink(missing_ok=True)
        except PermissionError:  # alive, somebody else's
            continue


def hash_of(value):
    """32 hex digits of a JSON-able value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
