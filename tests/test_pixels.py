"""Decoding pictures once, in worker processes, by Pillow or the fast way."""
import os

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common.images import open_image
from features import pixels
from features.pixels import FastDecoder, PillowDecoder, decode_images


def paths(count=12):
    return [f"images/{number:02d}.png" for number in range(count)]


def test_pixels_are_what_clips_own_transform_gives(encoders, folder, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    whole = image_transform_v2(PreprocessCfg(**encoders.image.visual.preprocess_cfg), is_train=False)
    store = decode_images(folder, paths(), encoders.image, tmp_path / "cache", 2)
    for row, path in enumerate(store.paths):
        with Image.open(folder / path) as picture:
            expected = whole(picture)
        found = encoders.image.normalize(torch.from_numpy(store.pixels[row:row + 1]))[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_second_run_decodes_nothing(encoders, folder, tmp_path, monkeypatch):
    first = decode_images(folder, paths(), encoders.image, tmp_path / "cache", 2)
    monkeypatch.setattr(pixels, "build_pixels", lambda *_: pytest.fail("decoded again"))
    again = decode_images(folder, paths(), encoders.image, tmp_path / "cache", 2)
    assert np.array_equal(first.pixels, again.pixels)


def test_a_changed_picture_is_decoded_again_even_with_its_old_time_and_size(encoders, folder, tmp_path):
    """A cache keyed by name, size and time would answer with the features of a picture that is gone."""
    target = folder / "images/03.bmp"
    Image.new("RGB", (20, 20), "red").save(target)
    before = decode_images(folder, ["images/03.bmp"], encoders.image, tmp_path / "cache", 2)
    stat = target.stat()
    Image.new("RGB", (20, 20), "blue").save(target)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert target.stat().st_size == stat.st_size
    after = decode_images(folder, ["images/03.bmp"], encoders.image, tmp_path / "cache", 2)
    assert not np.array_equal(before.pixels[0], after.pixels[0])


def test_few_unreadable_pictures_are_named_and_left_out(encoders, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    names = [f"images/{number:03d}.png" for number in range(200)]
    for name in names:
        Image.new("RGB", (8, 8), "green").save(tmp_path / name)
    (tmp_path / names[7]).write_bytes(b"<html>not a picture</html>")
    (tmp_path / names[9]).unlink()
    for _ in range(2):  # the second time from the cache
        store = decode_images(tmp_path, names, encoders.image, tmp_path / "cache", 2)
        assert len(store.paths) == 200 and set(store.unreadable) == {names[7], names[9]}
        rows = store.readable(pd.DataFrame({"image_path": names}))
        assert len(rows) == 198 and names[7] not in set(rows["image_path"])
        printed = capsys.readouterr().out
        assert "2 of 200" in printed and names[7] in printed and f"{names[9]} (missing)" in printed


def test_many_unreadable_pictures_are_an_error(encoders, folder, tmp_path):
    (folder / "images/05.png").write_bytes((folder / "images/05.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="1 of 12 pictures cannot be read.*05.png"):
        decode_images(folder, paths(), encoders.image, tmp_path / "cache", 2)
    assert not list((tmp_path / "cache").glob("*.npy"))


@pytest.mark.parametrize("decoder", ["pillow", "fast"])
def test_the_number_of_workers_changes_no_pixel(decoder, encoders, folder, tmp_path):
    stores = [decode_images(folder, paths(), encoders.image, tmp_path / str(workers), workers, decoder) for workers in (1, 3)]
    assert np.array_equal(stores[0].pixels, stores[1].pixels) and stores[0].pixels.any((1, 2, 3)).all()


def test_the_decoder_is_part_of_the_files_name(encoders, folder, tmp_path):
    for decoder in ("pillow", "fast"):
        decode_images(folder, paths(), encoders.image, tmp_path / "cache", 1, decoder)
    assert len(list((tmp_path / "cache").glob("pixels-*.npy"))) == 2


def photo(path, size=(300, 220), **options):
    """A picture with edges, colours and gradients, as photos have them."""
    y, x = np.mgrid[:size[1], :size[0]]
    pixels = np.stack([x % 251, y % 241, (x * y // 97) % 255], -1).astype(np.uint8)
    pixels[40:90, 60:160] = (220, 40, 30)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_the_fast_way_sees_the_same_picture(encoders, tmp_path):
    """Features of both ways point in the same direction: cosine distance below 0.002 with random weights."""
    path = photo(tmp_path / "a.jpg", quality=90)
    ways = [torch.from_numpy(way(encoders.image)(path).copy()) for way in (PillowDecoder, FastDecoder)]
    assert (ways[0].float() - ways[1].float()).abs().mean() < 2  # of 255
    with torch.no_grad():
        one, other = (F.normalize(encoders.image.visual(encoders.image.normalize(picture[None])), dim=-1) for picture in ways)
    assert 1 - (one * other).sum().item() < 0.002


@pytest.mark.parametrize("options", [{"exif": 6}, {"mode": "CMYK"}, {"mode": "L"}, {"suffix": ".png"}, {"progressive": True}],
                         ids=["turned", "four colours", "grey", "png", "progressive"])
def test_the_fast_way_reads_odd_pictures_like_pillow(options, encoders, tmp_path):
    path = tmp_path / f"a{options.get('suffix', '.jpg')}"
    picture = Image.open(photo(tmp_path / "source.png")).convert(options.get("mode", "RGB"))
    exif = Image.Exif()
    if "exif" in options:
        exif[274] = options["exif"]
    picture.save(path, exif=exif, progressive=options.get("progressive", False))
    slow, fast = (way(encoders.image)(path).astype(float) for way in (PillowDecoder, FastDecoder))
    assert np.abs(slow - fast).mean() < 2


@pytest.mark.parametrize("way", [PillowDecoder, FastDecoder])
def test_a_cut_jpeg_is_unreadable_for_both_ways(way, encoders, tmp_path):
    path = photo(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(OSError, match="truncated"):
        way(encoders.image)(path)


def test_a_killed_worker_is_one_clear_line(encoders, folder, tmp_path, monkeypatch):
    parent = os.getpid()

    def die(path):
        if os.getpid() != parent:
            os.kill(os.getpid(), 9)
        return open_image(path)

    monkeypatch.setattr(pixels, "open_image", die)
    monkeypatch.setattr(pixels, "PICTURES_AT_ONCE", 2)
    with pytest.raises(ValueError, match="a process that decodes pictures died .*--workers"):
        decode_images(folder, paths(), encoders.image, tmp_path / "cache", 2)
    assert not list((tmp_path / "cache").iterdir())
