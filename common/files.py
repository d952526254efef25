"""Atomic writes, locks that keep two runs out of one folder, and checks of paths."""
import contextlib
import json
import math
import os
import re
import secrets
from pathlib import Path

from filelock import FileLock, Timeout

SPLITS = ("train", "val", "test")  # values of the column `split` in metadata.csv
RUN_FILES = ("last.pt", "config.json", "train_log.csv", "samples.csv")  # of a training run, beside vqa_checkpoint.pt
MAX_NAME_BYTES = 230  # of an output: file systems allow 255, and `atomic_write` adds up to 25 to the name
TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp(\.\w+)?")


def is_text(text):
    """Whether `text` can be encoded as UTF-8. JSON and the command line can hold lone surrogates, which cannot."""
    return text.encode("utf-8", "ignore").decode("utf-8") == text


def is_device(path):
    """Whether `path` is a device, FIFO or socket. Reading from one may never end."""
    return os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)


def refuse_device(path):
    """Raise ValueError if `path` is a device, FIFO or socket."""
    if is_device(path):
        raise ValueError(f"{path} is no regular file")


def require_separate(files, folders, inputs):
    """Raise ValueError if an output of a script is also an input, if two outputs are the same, or if one cannot be written.

    files, folders: {flag: path} of what the script writes. inputs: {flag: paths} of what it reads; a path may be None.
    Paths that lead to one file through links are the same.
    """
    for kind, is_kind, outputs in (("regular file", os.path.isfile, files), ("folder", os.path.isdir, folders)):
        for flag, path in outputs.items():
            check_name(flag, Path(path))
            if os.path.exists(path) and not is_kind(path):
                raise ValueError(f"{flag} {path} exists and is no {kind}: choose another one")
    outputs = [*files.items(), *folders.items()]
    named = outputs + [(flag, path) for flag, paths in inputs.items() for path in paths if path is not None]
    for number, (flag, path) in enumerate(outputs, 1):
        for other_flag, other in named[number:]:
            if is_same(path, other):
                raise ValueError(f"{flag} {path} would {'write into' if flag in folders else 'overwrite'} {other}, which "
                                 f"{other_flag} names: choose another one")


def check_name(flag, path):
    """Raise ValueError if the output `path` has a name that is too long, or would lie below a file."""
    if any(len(os.fsencode(part)) > MAX_NAME_BYTES for part in path.parts):
        raise ValueError(f"{flag} {path!s:.60}... has a name of more than {MAX_NAME_BYTES} bytes: choose another one")
    parent = next((parent for parent in path.parents if os.path.lexists(parent)), Path())
    if not os.path.isdir(parent):
        raise ValueError(f"{flag} {path}: {parent} exists and is no folder: choose another one")


def is_same(path, other):
    """Whether two paths are one file or folder, through symbolic and hard links too; neither has to exist."""
    with contextlib.suppress(OSError):
        return os.path.samefile(path, other)
    return os.path.realpath(path) == os.path.realpath(other)


@contextlib.contextmanager
def atomic_write(path, durable=True):
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, else delete it.

    The rename is atomic on one file system: a reader sees the old file or the new one, never a part of one. Runs that
    write the same file do not disturb each other, also if they run on different machines. An OSError names `path`.
    `durable`: the data is flushed to the disk before the rename. Turn it off for thousands of small files,
    and call os.sync() once after them.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a rename would replace a device
        raise OSError(f"{path} exists and is no regular file: choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    # the suffix stays: Pillow and matplotlib choose the format by it
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(8)}.tmp{path.suffix}")
    try:
        yield temporary
        if durable:
            with open(temporary, "r+b") as stream:  # Windows flushes only what may be written
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and not error.filename:  # a failed write names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def remove_temporaries(folder, stem="*", older_than=math.inf):
    """Delete temporary files that killed runs left in `folder`, of targets named `stem`.suffix.

    `older_than`: only files that were last written before this time (st_mtime). The default is for callers that hold
    the folder's lock: nobody else writes there.
    """
    for path in Path(folder).glob(f".{stem}.*.tmp*"):
        with contextlib.suppress(FileNotFoundError):  # another run deleted or renamed it
            if TEMPORARY.fullmatch(path.name) and path.stat().st_mtime < older_than:
                path.unlink()


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
        with contextlib.suppress(PermissionError):  # Windows deletes no open file: the lock file stays, and locks nothing
            Path(path).unlink(missing_ok=True)
        lock.release()


def write_json(path, value):
    """Write `value` as indented UTF-8 JSON with `atomic_write`. Raises ValueError for NaN, which is not JSON."""
    with atomic_write(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)  # piece by piece: the text may have a GB
        stream.write("\n")
