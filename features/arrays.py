"""Arrays on the disk, memory-mapped, under names that hold a hash of all that they depend on."""
import contextlib
import hashlib
import json
import os
import tokenize
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.files import atomic_write

STORED = {torch.float32: np.dtype(np.float32), torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(np.int16)}


@contextlib.contextmanager
def new_array(target, shape, dtype):
    """Yield a memory-mapped .npy array to fill; it appears under its name only when the block succeeds.

    Where several processes work together each of them gets the same array and fills its part.
    """
    if distributed.get_rank() == 0:
        remove_leftovers(target)
        with atomic_write(target) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map would kill the process
                with open(temporary, "r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, os.path.getsize(temporary))
            distributed.broadcast(temporary)
            yield array
            array.flush()
            distributed.barrier()
    else:
        array = np.load(distributed.broadcast(), mmap_mode="r+")
        yield array
        array.flush()
        distributed.barrier()
    distributed.barrier()  # rank 0 has given the file its name


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
    return STORED[dtype]


def as_numpy(tensor):
    """A CPU tensor as an array of `numpy_dtype`."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def open_array(path, count):
    """The stored array, memory-mapped; writes to it stay in memory. ValueError unless it is whole and has `count` rows."""
    try:
        array = np.load(path, mmap_mode="c")  # never unpickles
    except (ValueError, EOFError, SyntaxError, TypeError, OverflowError, tokenize.TokenError) as error:
        raise ValueError(f"{path} is damaged ({error!s:.100}): delete it and run again") from error
    if not isinstance(array, np.memmap) or array.ndim < 2 or len(array) != count or not array.flags.c_contiguous:
        raise ValueError(f"{path} is damaged (it should hold {count} rows): delete it and run again")
    return array


def open_tensor(path, count):
    """The stored array of `count` rows as a tensor, memory-mapped; int16 stands for the bits of bfloat16."""
    array = open_array(path, count)
    if array.dtype not in STORED.values():
        raise ValueError(f"{path} is damaged (it holds {array.dtype}): delete it and run again")
    array = torch.from_numpy(array)
    return array.view(torch.bfloat16) if array.dtype == torch.int16 else array


def hash_of(value):
    """32 hex digits of a JSON-able value."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
