import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import features
from device import Precision
from features import build_store, decode_pictures, stored_states
from preprocess import read_rows

CPU = Precision("cpu")


@pytest.fixture
def folder(tmp_path):
    """A folder with twelve pictures of different sizes and a broken copy of one."""
    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 255, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02d}.png")
    return tmp_path


def paths(count=12):
    return [f"images/{number:02d}.png" for number in range(count)]


def test_pixels_are_what_clips_own_transform_gives(encoders, folder, tmp_path):
    from open_clip.transform import PreprocessCfg, image_transform_v2
    whole = image_transform_v2(PreprocessCfg(**encoders.image.visual.preprocess_cfg), is_train=False)
    store = decode_pictures(folder, paths(), encoders.image, tmp_path / "cache", 2)
    for row, path in enumerate(store.paths):
        with Image.open(folder / path) as picture:
            expected = whole(picture)
        found = encoders.image.normalize(torch.from_numpy(store.pixels[row:row + 1]))[0]
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_second_run_decodes_nothing(encoders, folder, tmp_path, monkeypatch):
    first = decode_pictures(folder, paths(), encoders.image, tmp_path / "cache", 2)
    monkeypatch.setattr(features, "build_pixels", lambda *_: pytest.fail("decoded again"))
    again = decode_pictures(folder, paths(), encoders.image, tmp_path / "cache", 2)
    assert np.array_equal(first.pixels, again.pixels)


def test_a_changed_picture_is_decoded_again_even_with_its_old_time_and_size(encoders, folder, tmp_path):
    """A cache keyed by name, size and time would answer with the features of a picture that is gone."""
    import os
    target = folder / "images/03.bmp"
    Image.new("RGB", (20, 20), "red").save(target)
    before = decode_pictures(folder, ["images/03.bmp"], encoders.image, tmp_path / "cache", 2)
    stat = target.stat()
    Image.new("RGB", (20, 20), "blue").save(target)
    os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert target.stat().st_size == stat.st_size
    after = decode_pictures(folder, ["images/03.bmp"], encoders.image, tmp_path / "cache", 2)
    assert not np.array_equal(before.pixels[0], after.pixels[0])


@pytest.mark.parametrize("change", ["weight", "cut", "pooling", "transform"])
def test_any_change_of_what_states_depend_on_makes_new_ones(change, encoders, make_model, folder, tmp_path):
    import encoders as encoder_module
    cache = tmp_path / "cache"

    def build():
        store = decode_pictures(folder, paths(), encoders.image, cache, 2)
        return build_store(model, encoders, store, ["What?", "Who is it?"], 8, cache, CPU)

    model = make_model(clip_layers=1, gpt2_layers=1)
    before = build()
    if change == "weight":
        with torch.no_grad():
            encoders.image.visual.conv1.weight.mul_(2)
        encoders.image.fingerprint = encoder_module.fingerprint(encoders.image.visual, "")
    if change == "cut":
        model.unfreeze(2, 1)
    if change == "pooling":
        model = make_model(image_pooling="attention")
    if change == "transform":
        encoders.image.mean = (0.4, 0.4, 0.4)
    after = build()
    assert before.image_states.shape == after.image_states.shape
    assert not torch.equal(before.image_states, after.image_states)
    assert torch.equal(build().image_states, after.image_states)


def test_an_interrupted_build_is_not_mistaken_for_a_whole_one(tmp_path):
    def broken(rows):
        if rows.start:
            raise RuntimeError("pulled plug")
        return torch.ones(features.ENCODE_BATCH, 3)

    with pytest.raises(RuntimeError, match="pulled plug"):
        stored_states("states", ["key"], 200, broken, tmp_path, CPU, "things")
    assert list(tmp_path.iterdir()) == []
    whole = stored_states("states", ["key"], 200, lambda rows: torch.full((rows.stop - rows.start, 3), 2.0), tmp_path,
                          CPU, "things")
    assert (whole == 2).all() and whole.shape == (200, 3)


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    name = features.hash_of(["states", features.CODE_VERSION, ["key"], "torch.float32"])
    leftover = tmp_path / f".states-{name}.{killed.pid}.tmp.npy"
    leftover.write_bytes(b"half")
    stored_states("states", ["key"], 2, lambda rows: torch.zeros(2, 3), tmp_path, CPU, "things")
    assert [path.name for path in tmp_path.iterdir()] == [f"states-{name}.npy"]


def test_few_unreadable_pictures_are_named_and_left_out(encoders, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    names = [f"images/{number:03d}.png" for number in range(200)]
    for name in names:
        Image.new("RGB", (8, 8), "green").save(tmp_path / name)
    (tmp_path / names[7]).write_bytes(b"<html>not a picture</html>")
    (tmp_path / names[9]).unlink()
    for _ in range(2):  # the second time from the cache
        store = decode_pictures(tmp_path, names, encoders.image, tmp_path / "cache", 2)
        assert len(store.paths) == 198 and names[7] not in store.paths and names[9] not in store.paths
        printed = capsys.readouterr().out
        assert "2 of 200" in printed and names[7] in printed and f"{names[9]} (missing)" in printed


def test_many_unreadable_pictures_are_an_error(encoders, folder, tmp_path):
    (folder / "images/05.png").write_bytes((folder / "images/05.png").read_bytes()[:200])
    with pytest.raises(ValueError, match="1 of 12 pictures cannot be read.*05.png"):
        decode_pictures(folder, paths(), encoders.image, tmp_path / "cache", 2)
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_cut_questions_are_counted(encoders, capsys):
    ids, lengths = features.tokenize_questions(encoders.question.tokenizer, ["What is on the left?" * 9, "What?"], 6)
    assert ids.shape[1] == 6 and lengths.max() == 6 and "2 distinct, 1 cut" in capsys.readouterr().out


def test_rows_find_their_own_states(make_model, make_store, data_dir):
    model = make_model()
    store = make_store(model)
    rows = read_rows(data_dir)
    assert sorted(set(rows["image_path"])) == list(store.image_row)
    assert len(store.image_states) == rows["image_path"].nunique()
    assert len(store.question_states) == rows["question"].nunique()
    assert json.dumps(sorted(store.question_row)) == json.dumps(list(store.question_row))
