"""common/images.py: transparent colours, many bits, AVIF and HEIC, and the memory that decoding takes."""
import io
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from common import images
from common.images import Budget, open_image
from download.images import check_image


def png(bits, colour_type, row, transparent):
    """A PNG of one row of four pixels. `transparent`: the samples of its transparent colour."""
    width = len(row) * 8 // (bits * (3 if colour_type == 2 else 1))
    chunks = {b"IHDR": struct.pack(">IIBBBBB", width, 1, bits, colour_type, 0, 0, 0),
              b"tRNS": struct.pack(f">{len(transparent)}H", *transparent), b"IDAT": zlib.compress(b"\0" + row), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data +
                                            struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks.items())


@pytest.mark.parametrize("bits, colour_type, row, transparent, expected", [
    (1, 0, b"\x0f", [0], [255] * 8), (1, 0, b"\x0f", [1], [0] * 4 + [255] * 4),
    (2, 0, b"\x1b", [1], [0, 255, 170, 255]), (4, 0, b"\x13\x36", [3], [17, 255, 255, 102]),
    (8, 0, b"\x0a\x14\x1e", [20], [10, 255, 30]), (16, 0, struct.pack(">2H", 2570, 5140), [5140], [10, 255]),
    (8, 2, b"\x01\x02\x03\x04\x04\x04", [1, 2, 3], [255, 4]), (8, 2, b"\x04\x04\x04\x01\x01\x01", [7, 7, 7], [4, 1]),
    (16, 2, struct.pack(">6H", 300, 600, 900, 1285, 1285, 1285), [300, 600, 900], [255, 5])])
def test_the_transparent_colour_of_a_png_becomes_white(bits, colour_type, row, transparent, expected):
    """It was ignored: a black logo on a transparent black ground was black everywhere."""
    image = open_image(io.BytesIO(png(bits, colour_type, row, transparent)))
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("values, dtype, expected", [
    ([0, 0.25, 1], np.float32, [0, 64, 255]), ([0, 100, 255], np.float32, [0, 100, 255]),
    ([-5, 0, 5], np.float32, [0, 128, 255]), ([0, 1000, 65535], np.float32, [0, 4, 255]),
    ([np.nan, -np.inf, 0.5, np.inf], np.float32, [0, 0, 128, 255]), ([np.nan, np.nan], np.float32, [0, 0]),
    ([-3e38, 0, 3e38], np.float32, [0, 128, 255]), ([7000, 7000], np.float32, [0, 0]),
    ([0, 100, 255], np.int32, [0, 100, 255]), ([-100_000, 0, 100_000], np.int32, [0, 128, 255]),
    ([0, 2 ** 31, 2 ** 32 - 1], np.uint32, [0, 128, 255]), ([0, 25700, 65535], np.uint16, [0, 100, 255])])
def test_floats_and_32_bit_integers_are_scaled(values, dtype, expected, monkeypatch):
    """Floats from 0 to 1 came out black, integers above 65535 white."""
    array = np.repeat(np.array([values], dtype), 3, axis=0)
    mode = {np.float32: "F", np.uint16: "I;16"}.get(dtype, "I")
    image = Image.frombytes(mode, array.shape[::-1], array.tobytes())
    image.save(stream := io.BytesIO(), "TIFF")
    if dtype == np.uint32:  # Pillow only writes signed integers: the tag 339 says which ones they are
        stream = io.BytesIO(stream.getvalue().replace(struct.pack("<HHII", 339, 3, 1, 2), struct.pack("<HHII", 339, 3, 1, 1)))
    monkeypatch.setattr(images, "UNIT", 4)  # in strips of one row
    assert np.asarray(open_image(stream))[:, :, 1].tolist() == [expected] * 3


def heic(brand=b"heic"):
    return io.BytesIO(b"\0\0\0\x18ftyp" + brand + bytes(60))


def test_heic_without_pillow_heif_is_one_line_that_names_the_formats(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ValueError, match="a HEIC image, which needs `pip install pillow-heif`; without it JPEG, .* are read"):
        open_image(heic())
    with pytest.raises(ValueError, match="unreadable: a HEIC image"):
        check_image(heic().getvalue())


def test_an_avif_that_a_server_sends_is_accepted_if_it_is_whole():
    Image.effect_noise((60, 60), 90).save(stream := io.BytesIO(), "AVIF")
    check_image(stream.getvalue())
    with pytest.raises(ValueError, match="unreadable: .*Truncated data"):
        check_image(stream.getvalue()[:-40])


def test_large_images_are_decoded_as_in_one_piece(monkeypatch):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (90, 70, 4), dtype=np.uint8))
    palette = picture.convert("RGB").quantize(9)
    for image, options in ((picture, {}), (picture.convert("LA"), {}), (palette, {"transparency": 2})):
        image.save(stream := io.BytesIO(), "PNG", **options)
        whole = open_image(stream)
        with monkeypatch.context() as patch:
            patch.setattr(images, "UNIT", 200)
            assert open_image(stream, budget=Budget()).tobytes() == whole.tobytes()


def test_images_in_threads_share_one_budget(monkeypatch):
    """Sixteen threads took sixteen times the memory of one large image."""
    monkeypatch.setattr(images, "UNIT", 100)
    monkeypatch.setattr(images, "BUDGET", 10)
    budget, lock, held, most = Budget(), threading.Lock(), 0, 0

    def use(image):
        nonlocal held, most
        with lock:
            held += image.width * image.height
            most = max(most, held)
        time.sleep(0.01)
        with lock:
            held -= image.width * image.height

    def decode(number):
        Image.new("L", (20, 20 if number % 2 else 45)).save(stream := io.BytesIO(), "PNG")
        open_image(stream, use, budget)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, range(16)))
    assert most in (900, 800)  # one of 900 pixels, or two of 400


MEASURE = """
import sys
from concurrent.futures import ThreadPoolExecutor
from common import images

def peak():
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("VmHWM")) * 1024

images.keep_memory()
images.BUDGET = 10
budget, before = images.Budget(), peak()
with ThreadPoolExecutor(4) as pool:
    list(pool.map(lambda _: images.open_image(sys.argv[1], lambda image: None, budget), range(4)))
print((peak() - before) / 3000 ** 2)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_threads_take_the_memory_of_one_large_image(tmp_path):
    """A pixel of a transparent image took 12 bytes, times the number of threads."""
    Image.new("RGBA", (3000, 3000), (9, 9, 9, 99)).save(tmp_path / "a.png", compress_level=1)
    result = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "a.png"], cwd=ROOT, text=True, capture_output=True,
                            check=True)
    assert 8 < float(result.stdout) < 16
