"""Decoding image files: CLIP's own pixels, each distinct image once, unreadable images named."""
import errno
import hashlib
import json
import os
import re
import unicodedata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from common import images
from common.images import open_image
from features import pixels
from features.pixels import decode_images, why_not_opened


def decode(encoders, data_dir, cache_dir, workers=2):
    """The PixelStore of twelve images."""
    return decode_images(data_dir, [f"images/{number:04d}.png" for number in range(12)], encoders.image, cache_dir, workers)


def test_pixels_are_those_of_clips_own_transform(encoders, data_dir, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    transform = image_transform_v2(PreprocessCfg(**encoders.image.visual.preprocess_cfg), is_train=False)
    store = decode(encoders, data_dir, tmp_path / "cache")
    for row, path in enumerate(store.paths):
        with Image.open(data_dir / path) as image:
            expected = transform(image)
        found = encoders.image.normalize(torch.from_numpy(store.pixels[row:row + 1]))[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_second_run_decodes_nothing(encoders, data_dir, tmp_path, monkeypatch):
    first = decode(encoders, data_dir, tmp_path / "cache")
    monkeypatch.setattr(pixels, "build_pixels", lambda *_: pytest.fail("decoded again"))
    assert np.array_equal(first.pixels, decode(encoders, data_dir, tmp_path / "cache").pixels)


def test_a_changed_image_is_decoded_again_even_with_its_old_time_and_size(encoders, tmp_path):
    """With a cache keyed by name, size and time the model would see an image that is gone."""
    target = tmp_path / "a.bmp"
    Image.new("RGB", (20, 20), "red").save(target)
    before, stat = decode_images(tmp_path, ["a.bmp"], encoders.image, tmp_path / "cache", 1), target.stat()
    Image.new("RGB", (20, 20), "blue").save(target)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert target.stat().st_size == stat.st_size
    after = decode_images(tmp_path, ["a.bmp"], encoders.image, tmp_path / "cache", 1)
    assert not np.array_equal(before.pixels[0], after.pixels[0])


def test_one_percent_of_the_images_may_be_unreadable(encoders, tmp_path, capsys):
    names = [f"{number:03d}.png" for number in range(200)]
    for name in names:
        Image.new("RGB", (8, 8), "green").save(tmp_path / name)
    (tmp_path / names[7]).write_bytes(b"<html>no image</html>")
    (tmp_path / names[9]).unlink()
    for _ in range(2):  # the second time from the cache
        store = decode_images(tmp_path, names, encoders.image, tmp_path / "cache", 2)
        assert len(store.paths) == 200 and set(store.unreadable) == {names[7], names[9]}
        rows = store.readable(pd.DataFrame({"image_path": names}))
        assert len(rows) == 198 and names[7] not in set(rows["image_path"])
        printed = capsys.readouterr().out
        assert "2 of 200" in printed and names[7] in printed and f"{names[9]} (missing)" in printed
    (tmp_path / names[11]).write_bytes((tmp_path / names[11]).read_bytes()[:50])
    with pytest.raises(ValueError, match=r"3 of 200 images cannot be read, more than 1%: .*011.png \(image file is truncated"):
        decode_images(tmp_path, names, encoders.image, tmp_path / "cache", 2)


def test_all_unreadable_images_are_counted_and_listed(encoders, tmp_path, monkeypatch):
    """The count stopped at the first batch: 7 of 400 where 40 were broken."""
    names = [f"{number:03d}.png" for number in range(100)]
    for name in names:
        Image.new("RGB", (8, 8), "green").save(tmp_path / name)
    broken = names[::10]
    for name in broken:
        (tmp_path / name).write_text("no image")
    message = r"10 of 100 images cannot be read, more than 1%: 000.png .*; all are in (\S+/pixels-\w+\.json);"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match=message) as error:
            decode_images(tmp_path, names, encoders.image, tmp_path / "cache", 2)
        monkeypatch.setattr(pixels, "build_pixels", lambda *_: pytest.fail("decoded again"))
    listed = Path(re.search(message, str(error.value))[1])
    assert list(json.loads(listed.read_text())["unreadable"]) == broken
    store = decode_images(tmp_path, names, encoders.image, tmp_path / "cache", 2, max_unreadable=1)
    assert list(store.unreadable) == broken


@pytest.mark.parametrize("path, reason", [
    ("Images/a.JPG", "missing; images/A.jpg exists"), ("images\\A.jpg", "missing; images/A.jpg exists (use / instead of \\)"),
    (unicodedata.normalize("NFD", "images/é.png"), "missing; images/é.png exists"), ("b.png", "missing"),
    ("images", "a folder"), ("images/A.jpg/b.png", "missing"), ("../{}/IMAGES/A.jpg", "missing; ../{}/images/A.jpg exists"),
    ("loop.png", "Too many levels of symbolic links"), ("x" * 300, "File name too long")])
def test_the_reason_says_what_is_wrong_with_a_path(path, reason, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("images/A.jpg", "images/é.png"):
        (tmp_path / name).touch()
    (tmp_path / "loop.png").symlink_to("loop.png")
    path, reason = path.format(tmp_path.name), reason.format(tmp_path.name)
    assert why_not_opened(tmp_path, path) == reason


def test_the_reason_of_a_missing_image_is_not_kept_in_the_cache(encoders, tmp_path):
    """A missing image that became a folder was still called missing."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = (tmp_path, ["a.png", "b.png"], encoders.image, tmp_path / "cache", 1)
    assert decode_images(*arguments, max_unreadable=1).unreadable == {"b.png": "missing"}
    (tmp_path / "b.png").mkdir()
    assert decode_images(*arguments, max_unreadable=1).unreadable == {"b.png": "a folder"}


def test_an_image_without_permission_is_not_called_missing(encoders, tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(pixels, "open", refuse, raising=False)
    with pytest.raises(ValueError, match=r"1 of 1 images cannot be read, more than 1%: a.png \(no permission\)"):
        decode_images(tmp_path, ["a.png"], encoders.image, tmp_path / "cache", 1)


def test_worker_processes_share_one_budget_of_memory(encoders, data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(pixels, "IMAGES_PER_TASK", 8)
    expected = decode(encoders, data_dir, tmp_path / "cache", 0)
    monkeypatch.setattr(images, "UNIT", 100)
    monkeypatch.setattr(images, "BUDGET", 30)  # one image has up to 25
    assert np.array_equal(expected.pixels, decode(encoders, data_dir, tmp_path / "other", 2).pixels)


def test_the_number_of_workers_changes_no_pixel(encoders, data_dir, tmp_path):
    stores = [decode(encoders, data_dir, tmp_path / str(workers), workers) for workers in (1, 3)]
    assert np.array_equal(stores[0].pixels, stores[1].pixels) and stores[0].pixels.any((1, 2, 3)).all()


def test_a_killed_worker_is_one_clear_line(encoders, data_dir, tmp_path, monkeypatch):
    parent = os.getpid()

    def die(*arguments):
        if os.getpid() != parent:
            os.kill(os.getpid(), 9)
        return open_image(*arguments)

    monkeypatch.setattr(pixels, "open_image", die)
    monkeypatch.setattr(pixels, "IMAGES_PER_TASK", 2)
    with pytest.raises(ValueError, match="a process that decodes images died .*--workers"):
        decode(encoders, data_dir, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("module, name", [(hashlib, "file_digest"), (pixels, "open_image")], ids=["hashing", "decoding"])
def test_a_passing_read_error_is_not_remembered_as_an_unreadable_image(module, name, workers, encoders, tmp_path, monkeypatch):
    """An image that could not be read for a moment, one of a hundred, was left out of every later run."""
    names, read = [f"{number:03d}.png" for number in range(100)], getattr(module, name)
    for image in names:
        Image.new("RGB", (8, 8), "green").save(tmp_path / image)

    def fail_once(file, *args, **kwargs):
        if str(getattr(file, "name", file)).endswith("007.png"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail_once)
        with pytest.raises(OSError, match=r"^\S*007.png cannot be read now .Input/output error.*run again$"):
            decode_images(tmp_path, names, encoders.image, tmp_path / "cache", workers)
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())
    assert not decode_images(tmp_path, names, encoders.image, tmp_path / "cache", workers).unreadable


def test_a_damaged_list_of_unreadable_images_is_one_line(encoders, data_dir, tmp_path):
    """With a name lost, a black image would be taken for a real one."""
    decode(encoders, data_dir, tmp_path)
    listed, = tmp_path.glob("pixels-*.json")
    listed.write_text(listed.read_text().replace("{}", '{"images/0001.png": "missing"}'))
    with pytest.raises(ValueError, match="damaged .its checksum differs.: delete it with the .npy file beside it"):
        decode(encoders, data_dir, tmp_path)
