"""The store of the frozen blocks' outputs: never outdated, never half-written, in step with the rows."""
import os
import subprocess
import sys

import pytest
import torch

from common.device import Precision
from common.files import remove_temporaries
from features import store as feature_store
from features.arrays import hash_of
from features.encoders import fingerprint
from features.pixels import decode_images
from features.store import build_store, stored_states, tokenize_questions
from preprocess import read_rows

CPU = Precision("cpu")


@pytest.mark.parametrize("change", ["weight", "freeze boundary", "pooling", "transform"])
def test_a_change_of_anything_that_states_depend_on_gives_new_states(change, encoders, make_model, data_dir, tmp_path):
    cache = tmp_path / "cache"
    paths = [f"images/{number:04d}.png" for number in range(12)]

    def build():
        pixels = decode_images(data_dir, paths, encoders.image, cache, 2)
        return build_store(model, encoders, pixels, ["What?", "Who is it?"], cache, CPU)

    model = make_model(clip_layers=1, gpt2_layers=1)
    before = build()
    if change == "weight":
        with torch.no_grad():
            encoders.image.visual.conv1.weight.mul_(2)
        encoders.image.fingerprint = fingerprint(encoders.image.visual, "")
    if change == "freeze boundary":
        model.unfreeze(2, 1)
    if change == "pooling":
        model = make_model(image_pooling="attention")
    if change == "transform":
        encoders.image.mean = (0.4, 0.4, 0.4)
    after = build()
    assert before.image_states.shape == after.image_states.shape
    assert not torch.equal(before.image_states, after.image_states)
    assert torch.equal(build().image_states, after.image_states)


def test_an_interrupted_build_is_not_mistaken_for_a_complete_one(tmp_path):
    def broken(rows):
        if rows.start:
            raise RuntimeError("pulled plug")
        return torch.ones(feature_store.ENCODE_BATCH["cpu"], 3)

    with pytest.raises(RuntimeError, match="pulled plug"):
        stored_states("states", ["key"], 200, broken, tmp_path, CPU, "things")
    assert list(tmp_path.iterdir()) == []
    states = stored_states("states", ["key"], 200, lambda rows: torch.full((rows.stop - rows.start, 3), 2.0), tmp_path,
                           CPU, "things")
    assert (states == 2).all() and states.shape == (200, 3)


@pytest.mark.parametrize("shape, dtype", [((3,), torch.float32), ((2, 3), torch.bfloat16)], ids=["features", "states"])
def test_under_bf16_states_are_stored_in_bf16_and_features_unrounded(shape, dtype, tmp_path):
    values = torch.rand(5, *shape)
    for _ in range(2):  # the second time from the cache
        states = stored_states("states", ["key"], 5, lambda rows: values[rows], tmp_path, Precision("cpu", "bf16"), "things")
        assert states.dtype == dtype and torch.equal(states, values.to(dtype))


@pytest.fixture
def temporaries():
    """(name of a temporary file of a killed process, name of one of a running process) for a stem and a suffix."""
    killed = subprocess.Popen([sys.executable, "-c", ""])
    killed.wait()
    running = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    yield lambda stem, suffix: [f".{stem}.{process.pid}.tmp{suffix}" for process in (killed, running)]
    running.kill()
    running.wait()


def test_a_build_removes_what_a_killed_build_left_and_nothing_else(temporaries, tmp_path):
    """Two runs may share the cache folder: the second must not delete what the first one is writing."""
    name = f"states-{hash_of(['states', feature_store.STATES_VERSION, ['key'], 'torch.float32'])}"
    left, in_use = temporaries(name, ".npy")
    other, _ = temporaries("states-other", ".npy")
    for temporary in (left, in_use, other):
        (tmp_path / temporary).write_bytes(b"half")
    stored_states("states", ["key"], 2, lambda rows: torch.zeros(2, 3), tmp_path, CPU, "things")
    assert {path.name for path in tmp_path.iterdir()} == {in_use, other, f"{name}.npy"}


def test_the_cleaner_removes_temporaries_of_killed_runs_only(temporaries, tmp_path):
    left, in_use = temporaries("last", ".pt")
    kept = {in_use, f".last.{os.getpid()}.tmp.pt", ".hidden", ".notes.tmp", ".last.x.tmp.pt", ".lock"}
    for name in (left, temporaries("no suffix", "")[0], f".no-process.{10 ** 30}.tmp.pt", *kept):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_if_memory_runs_out_while_encoding_the_batch_is_halved(tmp_path):
    sizes = []

    def encode(rows):
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.arange(rows.start, rows.stop).float().unsqueeze(1)

    states = stored_states("states", ["key"], 70, encode, tmp_path, CPU, "things")
    assert states[:, 0].tolist() == list(range(70)) and max(size for size in sizes if size <= 10) == 8


def test_truncated_questions_are_counted(encoders, capsys):
    ids, lengths = tokenize_questions(encoders.question.tokenizer, ["What is on the left?" * 9, "What?"], 6)
    assert ids.shape[1] == 6 and lengths.max() == 6 and "2 distinct, 1 truncated to 6" in capsys.readouterr().out


def test_each_distinct_image_and_question_is_stored_once(make_model, make_store, data_dir):
    store, rows = make_store(make_model()), read_rows(data_dir)
    assert list(store.row_of_image) == sorted(set(rows["image_path"])) and len(store.image_states) == len(store.row_of_image)
    assert list(store.row_of_question) == sorted(set(rows["question"]))
    assert len(store.question_states) == len(store.row_of_question)
