"""Arrays on the disk, memory-mapped, under names that hold a hash of all that they depend on."""
import contextlib
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import torch

import ranks
from files import whole_file


@contextlib.contextmanager
def new_array(target, shape, dtype):
    """Yield a memory-mapped .npy array to fill; it appears under its name only when the block succeeds.

    Where several processes work together each of them gets the same array and fills its part.
    """
    if ranks.rank() == 0:
        remove_leftovers(target)
        with whole_file(target) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map would kill the process
                with open(temporary, "r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, os.path.getsize(temporary))
            ranks.share(temporary)
            yield array
            array.flush()
            ranks.wait()
    else:
        array = np.load(ranks.share(), mmap_mode="r+")
        yield array
        array.flush()
        ranks.wait()
    ranks.wait()  # rank 0 has given the file its name


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


def numpy_dtype(dtype):
    """numpy has no bfloat16: its bits are stored as int16."""
    return {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}[dtype]


def as_numpy(tensor):
    """A CPU tensor as an array of `numpy_dtype`."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def open_tensor(path):
    """The stored array as a tensor, memory-mapped; int16 stands for the bits of bfloat16."""
    array = torch.from_numpy(np.load(path, mmap_mode="c"))
    return array.view(torch.bfloat16) if array.dtype == torch.int16 else array


def hash_of(value):
    """32 hex digits of a JSON-able value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
