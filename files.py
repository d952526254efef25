"""Files are written whole or not at all: to a temporary name beside the target, then renamed."""
import contextlib
import json
import os
from pathlib import Path


@contextlib.contextmanager
def whole_file(path):
    """Yield a temporary path beside `path`; rename it into place if the block succeeds, else delete it.

    The rename is atomic on one file system, so a reader sees the old file or the new one, never a
    part of one. The data reaches the disk before the name does.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the temporary name keeps the suffix, from which Pillow and matplotlib choose their format
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented UTF-8 JSON, whole or not at all. NaN is refused: it is not JSON."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")
