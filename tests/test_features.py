import json
import subprocess
import sys

import pytest
import torch

from common.device import Precision
from features import store as features
from features.arrays import hash_of
from features.pixels import decode_images
from features.store import build_store, stored_states
from preprocess import read_rows

CPU = Precision("cpu")


def paths(count=12):
    return [f"images/{number:02d}.png" for number in range(count)]


@pytest.mark.parametrize("change", ["weight", "cut", "pooling", "transform"])
def test_any_change_of_what_states_depend_on_makes_new_ones(change, encoders, make_model, folder, tmp_path):
    import encoders as encoder_module
    cache = tmp_path / "cache"

    def build():
        store = decode_images(folder, paths(), encoders.image, cache, 2)
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
        return torch.ones(features.ENCODE_BATCH["cpu"], 3)

    with pytest.raises(RuntimeError, match="pulled plug"):
        stored_states("states", ["key"], 200, broken, tmp_path, CPU, "things")
    assert list(tmp_path.iterdir()) == []
    whole = stored_states("states", ["key"], 200, lambda rows: torch.full((rows.stop - rows.start, 3), 2.0), tmp_path,
                          CPU, "things")
    assert (whole == 2).all() and whole.shape == (200, 3)


def test_what_a_killed_build_left_is_removed_by_the_next(tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    name = hash_of(["states", features.STATES_VERSION, ["key"], "torch.float32"])
    leftover = tmp_path / f".states-{name}.{killed.pid}.tmp.npy"
    leftover.write_bytes(b"half")
    stored_states("states", ["key"], 2, lambda rows: torch.zeros(2, 3), tmp_path, CPU, "things")
    assert [path.name for path in tmp_path.iterdir()] == [f"states-{name}.npy"]


def test_out_of_memory_while_encoding_halves_the_batch(tmp_path):
    sizes = []

    def encode(rows):
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.arange(rows.start, rows.stop).float().unsqueeze(1)

    states = stored_states("states", ["key"], 70, encode, tmp_path, CPU, "things")
    assert states[:, 0].tolist() == list(range(70)) and max(size for size in sizes if size <= 10) == 8


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
