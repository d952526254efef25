"""Image files to the encoder's pixels: each distinct image is decoded once, into one memory-mapped file.

The file's name holds a hash of the images' bytes and of the transform, so an outdated file is never read.
"""
import errno
import functools
import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common import distributed
from common.files import is_device, write_json
from common.images import BUDGET_OF_THREADS, UNREADABLE, Budget, keep_memory, open_image
from common.settings import printable
from features.arrays import hash_of, new_array, open_array, still_writing
from vocab import nfc

MAX_UNREADABLE = 0.01  # share of images that may be missing or unreadable before a run stops
NUM_NAMED = 5  # unreadable images that a message names
DECODE_VERSION = 3  # part of the hash: raise it if decoding gives other pixels
# error numbers of files that will not open the next time either
LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL}
IMAGES_PER_TASK = 32  # a worker process gets this many at once
# fork takes no time, spawn imports torch again; but libraries of macOS fail after a fork, and Windows has no fork
START_METHOD = "fork" if hasattr(os, "fork") and sys.platform != "darwin" else "spawn"
DIGEST_THREADS = 16  # hashing waits for the disk more than for a core


@dataclass
class PixelStore:
    """Images as the encoder's input before normalisation. The row of an unreadable image is black."""

    paths: list  # N image paths, sorted
    pixels: np.ndarray  # (N, 3, S, S) uint8, memory-mapped
    unreadable: dict  # {path: reason}
    key: str  # hash of everything the pixels depend on
    image_digests: dict  # {path: hash of the file's bytes} of the readable images

    def readable(self, rows):
        """The rows of a DataFrame whose image could be read."""
        return rows[~rows["image_path"].isin(list(self.unreadable))]


def decode_images(folder, image_paths, image_encoder, cache_dir, workers, max_unreadable=MAX_UNREADABLE):
    """Decode each distinct image of `image_paths` once, with CLIP's own transform; returns the PixelStore.

    `workers` processes decode; 0 stands for one per core. Unreadable images are counted, and all are named in the JSON
    file beside the pixel store. Raises ValueError if more than the share `max_unreadable` of them is unreadable, or all.
    """
    folder, paths = Path(folder), sorted(set(image_paths))
    with ThreadPoolExecutor(DIGEST_THREADS) as pool:
        digests = dict(zip(paths, pool.map(lambda path: file_digest(folder / path), paths), strict=True))
    # the reasons are part of the key: a missing file that is now a folder, or has a like name, is reported anew
    reasons = {path: why_not_opened(folder, path) for path, digest in digests.items() if digest is None}
    size = image_encoder.visual.image_size
    key = hash_of(["pixels", DECODE_VERSION, image_encoder.transform, list((digests | reasons).items())])
    target = Path(cache_dir) / f"pixels-{key}.npy"
    if not distributed.broadcast(target.is_file()):
        build_pixels(target, ImageFiles(folder, paths, reasons, image_encoder.resize), size, workers or available_cores())
    listed = target.with_suffix(".json")
    pixels, unreadable = open_array(target, len(paths)), read_unreadable(listed)
    if pixels.shape[1:] != (3, *size) or pixels.dtype != np.uint8:
        raise ValueError(f"{target} is damaged (it holds {pixels.dtype} {pixels.shape}): delete it and run again")
    if unreadable:
        report_unreadable(unreadable, len(paths), max_unreadable, listed)
    readable = {path: digest for path, digest in digests.items() if path not in unreadable}
    return PixelStore(paths, pixels, unreadable, key, readable)


def file_digest(path):
    """Hash of a file's bytes, or None if it cannot be opened. Raises OSError if reading fails for another reason."""
    if is_device(path):
        return None
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        if error.errno not in LASTING:
            raise passing_error(path, error) from error
        return None


def passing_error(path, error):
    """The OSError for a read error that may pass, such as a lost mount."""
    return OSError(f"{path} cannot be read now ({error.strerror}): check the disk or the network, and run again")


def available_cores():
    """The cores that this process may use, divided by the number of processes that train together."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
    return max(1, cores // distributed.get_world_size())


class ImageFiles(Dataset):
    """The image files. A worker process decodes them straight into the file `stored_in`, which all processes map."""

    def __init__(self, folder, paths, reasons, resize):
        """`reasons`: {path: why the file cannot be opened}."""
        self.folder, self.paths, self.reasons, self.resize = folder, paths, reasons, resize
        self.stored_in, self.budget = None, BUDGET_OF_THREADS

    @functools.cached_property
    def pixels(self):
        """The array in `stored_in`. Each process opens it for itself: a spawned one inherits no memory map."""
        keep_memory()
        return np.load(self.stored_in, mmap_mode="r+")

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, row):
        """Decode one image into its row. Returns (row, None), or (row, reason) if it is unreadable."""
        path = self.paths[row]
        if path in self.reasons:
            return row, self.reasons[path]
        try:
            self.pixels[row] = decode_image(self.folder / path, self.resize, self.budget)
        except UNREADABLE as error:
            if isinstance(error, OSError) and error.errno:  # of the system; Pillow's own errors have no number
                raise passing_error(self.folder / path, error) from error
            return row, str(error) or type(error).__name__
        return row, None


def decode_image(path, resize, budget=BUDGET_OF_THREADS):
    """An image file, or a Pillow image, as uint8 pixels (3, S, S). Raises one of UNREADABLE.

    `resize` is CLIP's transform up to the pixels.
    """
    return open_image(path, lambda image: np.asarray(resize(image)).transpose(2, 0, 1), budget)


def why_not_opened(folder, path):
    """Why the file `path` (relative to `folder`) could not be opened, with the spelling of a file that exists."""
    if is_device(folder / path):  # opening one may never end
        return "no regular file"
    try:
        open(folder / path, "rb").close()
    except (FileNotFoundError, NotADirectoryError):
        similar = similar_path(folder, path)
        hint = " (use / instead of \\)" if similar and "\\" in path else ""
        return f"missing; {similar} exists{hint}" if similar else "missing"
    except PermissionError:
        return "no permission"
    except IsADirectoryError:
        return "a folder"
    except OSError as error:
        return str(error.strerror)
    return "it could not be read"


def similar_path(folder, path):
    """An existing path that differs from `path` in letter case, in \\ for / or in how accents are encoded; else None."""
    found = Path()
    for part in PurePosixPath(path.replace("\\", "/")).parts:
        name = part if os.path.exists(folder / found / part) else names_in(folder / found).get(plain(part))
        if name is None:
            return None
        found /= name
    return found.as_posix() if found.parts else None


@functools.lru_cache
def names_in(folder):
    """{plain(name): name} of the files and folders in `folder`; {} if it cannot be listed."""
    try:
        return {plain(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


def plain(name):
    return nfc(name).casefold()


def build_pixels(target, files, size, workers):
    """Write the pixel store `target`, (N, 3, S, S) uint8. The list of unreadable images beside it is written first."""
    own_rows = distributed.shard(torch.arange(len(files))).tolist()
    workers = min(workers, 1 + len(own_rows) // IMAGES_PER_TASK) if workers > 1 else 0
    unreadable = {}
    with new_array(target, (len(files), 3, *size), np.uint8) as pixels:
        files.stored_in = pixels.filename
        if workers:
            files.budget = Budget(multiprocessing.get_context(START_METHOD))
        loader = DataLoader(files, IMAGES_PER_TASK, sampler=own_rows, num_workers=workers, collate_fn=list,
                            multiprocessing_context=START_METHOD if workers else None)
        with tqdm(total=len(own_rows), desc="decoding images", unit=" images", mininterval=0.5,
                  disable=distributed.get_rank() > 0) as bar:
            for results in batches_of(loader):
                unreadable |= {files.paths[row]: reason for row, reason in results if reason}
                bar.update(len(results))
                still_writing(pixels)
        for others in distributed.all_gather(unreadable):
            unreadable |= others
        if distributed.get_rank() == 0:
            unreadable = dict(sorted(unreadable.items()))
            write_json(target.with_suffix(".json"), {"unreadable": unreadable, "checksum": hash_of(unreadable)})
        vars(files).pop("pixels", None)
        del pixels  # see new_array


def batches_of(loader):
    """The batches of `loader`. Raises ValueError if one of its worker processes dies, OSError if it raises one."""
    try:
        yield from loader
    except OSError as error:
        raise OSError(str(error).splitlines()[-1].removeprefix("OSError: ")) from error  # without the worker's traceback
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise ValueError(f"a process that decodes images died ({str(error).splitlines()[0]}); if memory ran out, "
                         "use fewer --workers") from error


def read_unreadable(path):
    """{image path: reason} from the file beside the pixel store. Raises ValueError if it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if hash_of(content["unreadable"]) != content["checksum"]:
            raise ValueError("its checksum differs")
        return dict(content["unreadable"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.100}): delete it with the .npy file beside it and run again") from error


def report_unreadable(unreadable, total, max_unreadable, listed):
    """Print the number of unreadable images and the first names with their reasons. `listed`: the file that has them all.

    Raises ValueError instead if more than the share `max_unreadable` of the images is unreadable, or all.
    """
    count = f"{len(unreadable)} of {total} images cannot be read"
    reasons = "; ".join(printable(f"{path} ({reason})") for path, reason in sorted(unreadable.items())[:NUM_NAMED])
    if len(unreadable) > NUM_NAMED:
        reasons += f"; all are in {listed}"
    if len(unreadable) > max_unreadable * total or len(unreadable) == total:
        limit = f", more than {max_unreadable:.0%}" if max_unreadable < 1 else ""
        raise ValueError(f"{count}{limit}: {reasons}; repair or remove them, or build the data set again with "
                         "`python mini_vqa_v2.py`")
    print(f"{count}, their rows are left out: {reasons}")
