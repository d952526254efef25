"""Pictures to the encoder's pixels: each distinct picture decoded once, in worker processes, into one memory-mapped file.

The file's name holds a hash of the pictures' bytes, the transform and the decoder, so a stale one is never looked at,
and it gets that name only when it is whole.
"""
import hashlib
import io
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import CenterCrop, Resize
from tqdm import tqdm

from common import distributed
from common.files import write_json
from common.images import FORMATS, UNREADABLE, check_size, keep_memory, open_image
from features.arrays import hash_of, new_array, open_array

MAX_UNREADABLE = 0.01  # share of pictures that may be missing or broken before a run stops
DECODE_VERSION = 2  # part of the key: raise it when decoding gives other pixels
PICTURES_AT_ONCE = 32  # handed to a worker process together
DIGEST_THREADS = 16  # hashing waits for the disk more than for a core


@dataclass
class PixelStore:
    """Pictures as the encoder's input before normalisation; an unreadable one leaves its row black."""

    paths: list  # N image paths, sorted
    pixels: np.ndarray  # (N, 3, S, S) uint8, memory-mapped
    unreadable: dict  # {path: reason}
    key: str  # of all that the pixels depend on

    def readable(self, rows):
        """The rows of a DataFrame whose picture could be read."""
        return rows[~rows["image_path"].isin(list(self.unreadable))] if self.unreadable else rows


def decode_images(folder, image_paths, image_encoder, cache_dir, workers, decoder="pillow"):
    """Decode each distinct picture of `image_paths` once; returns the PixelStore.

    `decoder`: "pillow" is CLIP's own transform; "fast" is torchvision's decoder and resizing in 8 bits, which reads
    about twice as many pictures a second and gives features that differ in the third digit. `workers` processes
    decode; 0 stands for one per core. Missing and unreadable pictures are named and counted; more than
    MAX_UNREADABLE of them is a ValueError.
    """
    folder, paths = Path(folder), sorted(set(image_paths))
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = list(pool.map(lambda path: file_digest(folder / path), paths))
    decode = FastDecoder(image_encoder) if decoder == "fast" else PillowDecoder(image_encoder)
    key = hash_of(["pixels", DECODE_VERSION, decoder, image_encoder.visual.preprocess_cfg, repr(image_encoder.resize),
                   list(zip(paths, digests, strict=True))])
    target = Path(cache_dir) / f"pixels-{key}.npy"
    if not distributed.broadcast(target.is_file()):
        files = ImageFiles(folder, paths, digests, decode)
        build_pixels(target, files, image_encoder.visual.image_size, workers or cores())
    pixels, unreadable = open_array(target, len(paths)), read_unreadable(target.with_suffix(".json"))
    if pixels.shape[1:] != (3, *image_encoder.visual.image_size) or pixels.dtype != np.uint8:
        raise ValueError(f"{target} is damaged (it holds {pixels.dtype} {pixels.shape}): delete it and run again")
    report_unreadable(unreadable, len(paths))
    return PixelStore(paths, pixels, unreadable, key)


def read_unreadable(path):
    """{image path: reason} of the pictures that could not be read, from beside the pixel store."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["unreadable"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.100}): delete it with the .npy file beside it and run again") from error


def cores():
    """The cores that this process may use, shared with the processes that work beside it."""
    return max(1, len(os.sched_getaffinity(0)) // distributed.get_world_size())


def file_digest(path):
    """Hash of a file's bytes, or None where there is no such file."""
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return None


class PillowDecoder:
    """Path -> (3, S, S) uint8 by Pillow and CLIP's own transform."""

    def __init__(self, image_encoder):
        self.resize = image_encoder.resize

    def __call__(self, path):
        return np.asarray(self.resize(open_image(path))).transpose(2, 0, 1)


class FastDecoder(PillowDecoder):
    """The same by torchvision, resized in 8 bits with antialiasing; what is no plain JPEG goes through Pillow."""

    def __init__(self, image_encoder):
        super().__init__(image_encoder)
        self.shape = [step for step in image_encoder.resize.transforms if isinstance(step, Resize | CenterCrop)]
        others = [type(step).__name__ for step in image_encoder.resize.transforms if step not in self.shape]
        if set(others) - {"MaybeConvertMode"}:
            raise ValueError(f"--picture-decoder fast cannot do this encoder's {', '.join(others)}; use "
                             "--picture-decoder pillow")

    def __call__(self, path):
        from torchvision.io import ImageReadMode, decode_image
        content = Path(path).read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            plain = header.format in ("JPEG", "MPO") and header.mode in ("RGB", "L")
            check_size(header)
        # a whole JPEG ends with its mark; torchvision fills what is missing of a cut one with grey
        if not plain or content[-2:] != b"\xff\xd9":
            return super().__call__(path)
        try:
            picture = decode_image(torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB,
                                   apply_exif_orientation=True)
        except RuntimeError:  # Pillow may do better, or says what is wrong
            return super().__call__(path)
        for step in self.shape:
            picture = step(picture)
        return picture.numpy()


class ImageFiles(Dataset):
    """The pictures as a worker process decodes them, straight into `pixels`, the file that all processes map."""

    def __init__(self, folder, paths, digests, decode):
        self.folder, self.paths, self.digests, self.decode, self.pixels = folder, paths, digests, decode, None

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        """Decode one picture into its row; returns (row, None), or (row, reason) where it cannot be read."""
        if self.digests[row] is None:
            return row, "missing"
        try:
            self.pixels[row] = self.decode(self.folder / self.paths[row])
        except UNREADABLE as error:
            return row, str(error) or type(error).__name__
        return row, None


def build_pixels(target, files, size, workers):
    """Write the pixel store `target` (N, 3, S, S) uint8 and, first, the list of unreadable pictures beside it."""
    mine = distributed.shard(torch.arange(len(files))).tolist()
    workers = min(workers, 1 + len(mine) // PICTURES_AT_ONCE) if workers > 1 else 0
    unreadable = {}
    keep_memory()
    with new_array(target, (len(files), 3, *size), np.uint8) as pixels:
        files.pixels = pixels
        # forked, so that the workers write into this very mapping and no picture travels between processes
        loader = DataLoader(files, PICTURES_AT_ONCE, sampler=mine, num_workers=workers, collate_fn=list,
                            multiprocessing_context="fork" if workers else None)
        with tqdm(total=len(mine), desc="decoding pictures", unit=" pictures", mininterval=0.5,
                  disable=distributed.get_rank() > 0) as bar:
            for results in alive(loader):
                unreadable |= {files.paths[row]: reason for row, reason in results if reason}
                report_unreadable(unreadable, len(files), final=False)
                bar.update(len(results))
        for others in distributed.all_gather(unreadable):
            unreadable |= others
        report_unreadable(unreadable, len(files), final=False)
        if distributed.get_rank() == 0:
            write_json(target.with_suffix(".json"), {"unreadable": dict(sorted(unreadable.items()))})


def alive(loader):
    """The batches of `loader`; ValueError where one of its processes is killed, most often for want of memory."""
    try:
        yield from loader
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a process that decodes pictures died ({str(error).splitlines()[0]}); if memory ran out, "
                         "fewer --workers need less") from error


def report_unreadable(unreadable, total, final=True):
    """Name and count the pictures that cannot be read; raise ValueError when they are too many."""
    names = "; ".join(f"{path} ({reason})" for path, reason in sorted(unreadable.items())[:5])
    if len(unreadable) > MAX_UNREADABLE * total:
        raise ValueError(f"{len(unreadable)} of {total} pictures cannot be read, more than {MAX_UNREADABLE:.0%}: {names}; "
                         "mend or remove them, or build the data set again with `python mini_vqa_v2.py`")
    if unreadable and final:
        print(f"{len(unreadable)} of {total} pictures cannot be read, their rows are left out: {names}")
