"""manifest.csv beside images/: size and sha256 of every picture when it last proved whole.

A line is appended when a picture is in place, so a kill at any time costs at most one line, whose picture is decoded
once more. Lines that cannot be read count for nothing. A run that ends writes the file anew, in order of the names.
"""
import re
import threading
from pathlib import Path

from common.files import atomic_write

HEADER = "name,bytes,sha256,status\n"
LINE = re.compile(r"([^,\n]+),(\d{1,15}),([0-9a-f]{64}),(ok|missing)\n")


class Manifest:
    """{name: (bytes, sha256)} of the pictures that were once whole, here and on the disk. `with` it, record() appends."""

    def __init__(self, path):
        self.path, self.pictures, self.lock, self.stream = Path(path), {}, threading.Lock(), None
        if self.path.exists():
            with open(self.path, encoding="utf-8", errors="replace", newline="") as stream:
                for line in stream:
                    if match := LINE.fullmatch(line):
                        self.pictures[match[1]] = int(match[2]), match[3]

    def __enter__(self):
        self.rewrite(())  # without the half line that a kill may have left
        self.stream = open(self.path, "a", encoding="utf-8", newline="")  # noqa: SIM115  closed by __exit__
        return self

    def __exit__(self, *error):
        self.stream.close()

    def record(self, name, size, digest):
        """Note a picture that is whole and in place."""
        with self.lock:
            self.pictures[name] = size, digest
            self.stream.write(f"{name},{size},{digest},ok\n")
            self.stream.flush()

    def rewrite(self, missing):
        """The whole file anew; `missing` are the names of pictures that are not there as they should be."""
        lines = [f"{name},{size},{digest},{'missing' if name in missing else 'ok'}\n"
                 for name, (size, digest) in self.pictures.items()]
        lines += [f"{name},0,,missing\n" for name in missing if name not in self.pictures]
        with atomic_write(self.path) as temporary:
            temporary.write_text(HEADER + "".join(sorted(lines)), encoding="utf-8", newline="")
