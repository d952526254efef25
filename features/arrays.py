"""Memory-mapped arrays in the cache folder, and the hashes that name them.

A file is a .npy file with its checksum appended. Its name holds a hash of everything that its content depends on.
"""
import contextlib
import hashlib
import json
import os
import struct
import tokenize
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.files import atomic_write, remove_temporaries

# numpy has no bfloat16: its bits are stored as int16
STORED = {torch.float32: np.dtype(np.float32), torch.float16: np.dtype(np.float16), torch.bfloat16: np.dtype(np.int16)}
CHECKSUM_BYTES = 4
CHUNK = 1 << 24  # bytes of a file that one thread reads at a time
VERIFIED = set()  # `version_of` the files whose checksum this process has computed or compared
SECONDS_UNTIL_LEFT_OVER = 3600  # a temporary file that was not written for so long is of a killed run
DAMAGED = (ValueError, EOFError, SyntaxError, TypeError, OverflowError, tokenize.TokenError)  # what np.load raises


@contextlib.contextmanager
def new_array(target, shape, dtype):
    """Yield a memory-mapped .npy array to fill. It gets its name `target` only if the block succeeds.

    With several processes each of them gets the same array and fills its part. Other runs, also those of other
    machines, delete the temporary file as left over unless `still_writing` is called for every batch. Delete the variable
    of the array at the block's end: Windows renames no file that is mapped.
    """
    if distributed.get_rank() > 0:
        array = np.load(distributed.broadcast(), mmap_mode="r+")
        yield array
        array.flush()
        del array
        distributed.barrier()
    else:
        with atomic_write(target) as temporary:
            array = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
            # the age is counted from the new file: the clock of a file server may differ from ours
            remove_temporaries(Path(target).parent, Path(target).stem, temporary.stat().st_mtime - SECONDS_UNTIL_LEFT_OVER)
            if hasattr(os, "posix_fallocate"):  # without it a full disk would kill the process inside the memory map
                with open(temporary, "r+b") as stream:
                    os.posix_fallocate(stream.fileno(), 0, os.path.getsize(temporary))
            distributed.broadcast(temporary)
            yield array
            array.flush()
            size = array.offset + array.nbytes
            del array
            distributed.barrier()
            with open(temporary, "ab") as stream:
                stream.write(checksum(temporary, size))
        VERIFIED.add(version_of(target))
    distributed.barrier()  # rank 0 has renamed the file


def still_writing(array):
    """Tell other runs that the file of an array from `new_array` is still in use."""
    os.utime(array.filename)


def as_numpy(tensor):
    """A CPU tensor as a numpy array of its STORED dtype."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def checksum(path, size):
    """CRC-32 of the CRC-32s of the chunks that make up the first `size` bytes of a file. Takes about a second per GB."""
    def chunk_checksum(start):
        with open(path, "rb") as stream:
            stream.seek(start)
            return zlib.crc32(stream.read(min(CHUNK, size - start)))

    with ThreadPoolExecutor() as pool:
        checksums = list(pool.map(chunk_checksum, range(0, size, CHUNK)))
    return struct.pack("<I", zlib.crc32(struct.pack(f"<{len(checksums)}I", *checksums)))


def version_of(path):
    """Values that change when a file is written."""
    status = os.stat(path)
    return str(path), status.st_ino, status.st_size, status.st_mtime_ns


def open_array(path, count):
    """The stored array of `count` rows, memory-mapped; writes to it stay in memory. Raises ValueError if it is damaged.

    Call `require_whole` before reading from it.
    """
    try:
        array = np.load(path, mmap_mode="c")  # never unpickles
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged ({error!s:.100}): delete it and run again") from error
    if not isinstance(array, np.memmap) or array.ndim < 2 or len(array) != count or not array.flags.c_contiguous:
        raise ValueError(f"{path} is damaged (it should hold {count} rows): delete it and run again")
    return array


def require_whole(array):
    """Raise ValueError if the file of an array from `open_array` does not hold the bytes that were written.

    The checksum is compared once in a process, by rank 0.
    """
    require_length(array)
    path, size = array.filename, array.offset + array.nbytes
    if distributed.get_rank() > 0 or (version := version_of(path)) in VERIFIED:
        return
    with open(path, "rb") as stream:
        stream.seek(size)
        expected = stream.read()
    if checksum(path, size) != expected:
        raise ValueError(f"{path} is damaged (its checksum differs): delete it and run again")
    VERIFIED.add(version)


def require_length(array):
    """Raise ValueError if another program has changed the length of the file of an array from `open_array`.

    Reading beyond the end of the file would kill the process. A call takes a microsecond: call it for every batch.
    """
    found, expected = array.base.size(), array.offset + array.nbytes + CHECKSUM_BYTES
    if found != expected:
        raise ValueError(f"{array.filename} is damaged (it has {found} bytes instead of {expected}): delete it and run again")


def open_tensor(path, count):
    """The stored array as a memory-mapped tensor of `count` rows; its attribute `array` is for `require_length`."""
    array = open_array(path, count)
    if array.dtype not in STORED.values():
        raise ValueError(f"{path} is damaged (it holds {array.dtype}): delete it and run again")
    require_whole(array)
    tensor = torch.from_numpy(array)
    tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
    tensor.array = array
    return tensor


def hash_of(value):
    """32 hex digits of a value that JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()


def fingerprint(weights, *values):
    """32 hex digits that change with any name, shape, dtype or bytes of `weights` (a dict), and with the values (JSON).

    Nothing that a library prints goes in, such as repr(module): it changes from release to release.
    """
    def digest(item):
        name, tensor = item
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        return [name, list(tensor.shape), str(tensor.dtype), hashlib.blake2b(data, digest_size=16).hexdigest()]

    with ThreadPoolExecutor() as pool:  # hashing releases the GIL: 350 MB take a fraction of a second
        tensors = list(pool.map(digest, sorted(weights.items())))
    return hash_of([tensors, values])
