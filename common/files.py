"""Files are written whole or not at all: to a temporary name beside the target, then renamed."""
import contextlib
import fcntl
import json
import os
import re
from pathlib import Path

TEMPORARY = re.compile(r"\..+\.\d+\.tmp(\.\w+)?")


def is_text(text):
    """Whether every character of a str is one; JSON and the command line can hold halves, which no file takes."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


@contextlib.contextmanager
def atomic_write(path, durable=True):
    """Yield a temporary path beside `path`; rename it into place if the block succeeds, else delete it.

    The rename is atomic on one file system, so a reader sees the old file or the new one, never a
    part of one. The data reaches the disk before the name does, unless `durable` is given up for thousands
    of small files whose writer calls os.sync() once.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the temporary name keeps the suffix, from which Pillow and matplotlib choose their format
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder):
    """Delete what killed runs left of atomic_write in `folder`; the caller knows that no other run is at work there."""
    for path in Path(folder).glob(".*.tmp*"):
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def file_lock(path, complaint):
    """Hold a folder or file that exists for this process; ValueError(complaint) where another one does.

    Nothing is written, and the hold ends with the process, however it ends.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(complaint) from None
        except OSError:
            pass  # a file system without locks: nothing can be known
        yield
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Write `value` as indented UTF-8 JSON, whole or not at all. NaN is refused: it is not JSON."""
    with atomic_write(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
