"""How fast pictures of COCO's size are fetched, decoded, hashed and written, and how much memory that takes."""
import io
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from builder import NO_PROXY
from PIL import Image

from download import images as collect

NUM_PICTURES = 2000
FLOOR = 60  # pictures/s that even a machine busy with other work must reach; an idle one of two cores does over 200
SERVER = """
import sys
sys.path.insert(0, sys.argv[1])
from picture_server import PictureServer
body = open(sys.argv[2], "rb").read()

class OnePictureServer(PictureServer):
    def draw(self, path, name):
        return body

with OnePictureServer() as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def coco_sized_jpeg():
    """640 x 480 noisy pixels whose JPEG has about 160 kB."""
    rng = random.Random(0)
    smooth = Image.frombytes("RGB", (40, 30), rng.randbytes(3600)).resize((640, 480), Image.Resampling.BICUBIC)
    noisy = Image.blend(smooth, Image.frombytes("RGB", (640, 480), rng.randbytes(921600)), 0.2)
    buffer = io.BytesIO()
    noisy.save(buffer, "JPEG", quality=91)
    assert 150_000 < buffer.tell() < 170_000, buffer.tell()
    return buffer.getvalue()


@pytest.fixture
def server_url(tmp_path):
    """A server in a process of its own, since one in this process would compete for its interpreter."""
    (tmp_path / "picture.jpg").write_bytes(coco_sized_jpeg())
    process = subprocess.Popen([sys.executable, "-c", SERVER, Path(__file__).parent, tmp_path / "picture.jpg"],
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.communicate()


@pytest.mark.slow
def test_pictures_per_second_and_flat_memory(server_url, tmp_path, monkeypatch):
    for name, value in NO_PROXY.items():
        monkeypatch.setenv(name, value)
    names, resident, done = [f"COCO_train2014_{i:012d}.jpg" for i in range(NUM_PICTURES)], [], threading.Event()

    def watch():
        while not done.wait(0.1):
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)

    threading.Thread(target=watch, daemon=True).start()
    seconds = []
    for _ in range(2):  # fetch, then check
        start = time.perf_counter()
        assert collect.collect_pictures(names, tmp_path, "train2014", None, server_url, 16) == {}
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            quarter, fetched = max(resident[:len(resident) // 4]), max(resident)
    done.set()
    size = len(coco_sized_jpeg())
    print(f"fetched {NUM_PICTURES / seconds[0]:.0f} pictures/s, {NUM_PICTURES * size / seconds[0] / 1e6:.0f} MB/s; checked "
          f"{NUM_PICTURES / seconds[1]:.0f} pictures/s; {fetched:.0f} MB at most, {quarter:.0f} in the first quarter")
    assert NUM_PICTURES / seconds[0] > FLOOR and fetched < quarter + 20 and len(resident) > 20
