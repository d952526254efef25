"""The store of the frozen blocks' outputs: never outdated, never half-written, in step with the rows."""
import errno
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from common.device import Precision
from common.files import atomic_write, remove_temporaries
from features import store as feature_store
from features.arrays import SECONDS_UNTIL_LEFT_OVER, checksum, fingerprint, new_array, open_array, open_tensor
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
        encoders.image.fingerprint = fingerprint(encoders.image.visual.state_dict())
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


def test_runs_with_equal_process_ids_share_a_cache(tmp_path, monkeypatch):
    """Two containers. The second run used to open the first one's temporary file and to empty it."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    target = tmp_path / "states.npy"
    with new_array(target, (4, 3), np.float32) as first:
        first[:2] = 1
        with new_array(target, (4, 3), np.float32) as second:
            second[:] = 1
        assert (open_array(target, 4) == 1).all()
        first[2:] = 1
    assert (open_array(target, 4) == 1).all() and list(tmp_path.iterdir()) == [target]


def test_a_build_removes_what_killed_builds_left_and_nothing_else(tmp_path):
    """Two runs may share the cache folder: the second must not delete what the first one is writing."""
    target = tmp_path / "states-a.npy"
    left, of_older_version, in_use, other = (tmp_path / f".{name}.tmp.npy" for name in
                                             ("states-a.0123abcd", "states-a.4711", "states-a.4567cdef", "states-b.89ab"))
    for temporary in (left, of_older_version, in_use, other):
        temporary.write_bytes(b"half")
    for temporary in (left, of_older_version, other):
        os.utime(temporary, (0, time.time() - 2 * SECONDS_UNTIL_LEFT_OVER))
    os.utime(in_use, (0, time.time() - SECONDS_UNTIL_LEFT_OVER / 2))
    with new_array(target, (2, 3), np.float32):
        pass
    assert set(tmp_path.iterdir()) == {in_use, other, target}


def test_the_temporary_file_of_a_long_build_stays_young(tmp_path):
    def encode(rows):
        for temporary in tmp_path.glob(".*.tmp.npy"):
            assert time.time() - temporary.stat().st_mtime < SECONDS_UNTIL_LEFT_OVER
            os.utime(temporary, (0, 0))  # this batch took very long
        return torch.zeros(rows.stop - rows.start, 3)

    stored_states("states", ["key"], 200, encode, tmp_path, CPU, "things")


def test_the_holder_of_a_folders_lock_removes_all_temporary_files_and_nothing_else(tmp_path):
    kept = {".hidden", ".notes.tmp", ".last.x.tmp.pt", ".lock"}
    for name in (".last.0123abcd.tmp.pt", ".no suffix.4567.tmp", *kept):
        (tmp_path / name).touch()
    remove_temporaries(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == kept


def test_a_full_disk_names_the_file(tmp_path):
    """The system names no file when a write fails."""
    with pytest.raises(OSError, match=r"No space left on device: '.*log.csv'"), atomic_write(tmp_path / "log.csv"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def damage(path, position=-20):
    """Change one byte of a file that this process may have verified."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    os.utime(path, (0, 0))  # file systems count time in steps of milliseconds


@pytest.mark.parametrize("name", ["image_states", "question_states", "pixels"])
def test_damaged_bytes_in_the_cache_are_found_before_they_are_used(name, encoders, make_model, data_dir, tmp_path):
    """They gave other answers without a word."""
    def build(clip_layers):
        pixels = decode_images(data_dir, ["images/0000.png", "images/0001.png"], encoders.image, tmp_path, 1)
        return build_store(make_model(clip_layers=clip_layers, gpt2_layers=1), encoders, pixels, ["What?"], tmp_path, CPU)

    build(clip_layers=1)
    path, = tmp_path.glob(f"{name}-*.npy")
    damage(path)
    message = f"{path.name} is damaged .its checksum differs.: delete it and run again"
    if name == "pixels":
        build(clip_layers=1)  # the states are there: it does not read the pixels
        with pytest.raises(ValueError, match=message):
            build(clip_layers=2)
    else:
        with pytest.raises(ValueError, match=message):
            build(clip_layers=1)
    path.unlink()
    build(clip_layers=2)


def test_a_file_is_verified_once_in_a_process(tmp_path, monkeypatch):
    target = tmp_path / "states.npy"
    with new_array(target, (2, 3), np.float32):
        pass
    monkeypatch.setattr("features.arrays.VERIFIED", set())
    calls = []
    monkeypatch.setattr("features.arrays.checksum", lambda *args: calls.append(args) or checksum(*args))
    for _ in range(3):
        open_tensor(target, 2)
    assert len(calls) == 1


TRUNCATED = """
import os, numpy, torch
from features.arrays import new_array, open_tensor
from features.store import FeatureStore
with new_array("states.npy", (5000, 100), numpy.float32):
    pass
store = FeatureStore([], open_tensor("states.npy", 5000), [], torch.zeros(1, 2), None, torch.device("cpu"))
store.select(store.image_states, torch.tensor([4999]))
os.truncate("states.npy", 1000)
try:
    store.select(store.image_states, torch.tensor([4999]))
except ValueError as error:
    print(error)
"""


def test_a_file_that_is_truncated_during_a_run_is_one_line(tmp_path):
    """The system kills a process that reads beyond the end of a memory-mapped file (SIGBUS)."""
    result = subprocess.run([sys.executable, "-c", TRUNCATED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
                            text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert "states.npy is damaged (it has 1000 bytes instead of 2000132): delete it and run again" in result.stdout


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


def test_a_question_has_the_same_tokens_with_composed_and_separate_accents(encoders):
    ids, _ = tokenize_questions(encoders.question.tokenizer, ["Où est le café?", "Ou\u0300 est le cafe\u0301?"], 32)
    assert (ids[0] == ids[1]).all()


def test_each_distinct_image_and_question_is_stored_once(make_model, make_store, data_dir):
    store, rows = make_store(make_model()), read_rows(data_dir)
    assert list(store.row_of_image) == sorted(set(rows["image_path"])) and len(store.image_states) == len(store.row_of_image)
    assert list(store.row_of_question) == sorted(set(rows["question"]))
    assert len(store.question_states) == len(store.row_of_question)
