"""Atomic writes, and locks that keep two runs out of one folder."""
import contextlib
import json
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

SPLITS = ("train", "val", "test")  # values of the column `split` in metadata.csv
TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp(\.\w+)?")


def is_text(text):
    """Whether `text` can be encoded as UTF-8. JSON and the command line can hold lone surrogates, which cannot."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


@contextlib.contextmanager
def atomic_write(path, durable=True):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, else delete it.

    The rename is atomic on one file system: a reader sees the old file or the new one, never a part of one.
    `durable`: the data is flushed to the disk before the rename. Turn it off for thousands of small files,
    and call os.sync() once after them.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays: Pillow and matplotlib choose the format by it
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder, stem="*"):
    """Delete temporary files of `atomic_write` that killed processes left in `folder`, of targets named `stem`.suffix."""
    for path in Path(folder).glob(f".{stem}.*.tmp*"):
        match = TEMPORARY.fullmatch(path.name)
        if match and not is_running(int(match[1])):
            path.unlink(missing_ok=True)


def is_running(process_id):
    try:
        os.kill(process_id, 0)  # signal 0 asks and does nothing
    except (ProcessLookupError, OverflowError):  # or a number that no process has
        return False
    except PermissionError:  # a process of another user
        return True
    return True


@contextlib.contextmanager
def file_lock(path, message):
    """Hold the lock file `path` for this process; raises ValueError(message) if another process holds it.

    The lock ends with the process, however it ends. The empty lock file is removed when the block ends.
    """
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(message) from None
    try:
        yield
    finally:
        Path(path).unlink(missing_ok=True)
        lock.release()


def write_json(path, value):
    """Write `value` as indented UTF-8 JSON with `atomic_write`. Raises ValueError for NaN, which is not JSON."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)  # piece by piece: the text may have a GB
        stream.write("\n")
