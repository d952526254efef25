"""SIGKILL to the real training scripts at random moments and inside saves; then --resume: as if nothing had happened."""
import csv
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NUM_RANDOM, NUM_IN_SAVE = 16, 8
EPOCHS = 12


def start(folder, script, flags):
    """The script in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(list(map(str, [sys.executable, ROOT / script, *flags])), cwd=folder, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors


def kill(process):
    """SIGKILL to the whole group; whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def kill_when(process, pattern, folder):
    """SIGKILL as soon as a file of `pattern` is seen under `folder`; whether it lies there still, half written."""
    while process.poll() is None:
        if any(folder.glob(pattern)):
            kill(process)
            return any(folder.glob(pattern))
    process.communicate()
    return False


def resumed(folder, output_dir, flags):
    """`flags`, with --resume where there is something to resume."""
    return [*flags, *(["--resume"] if (folder / output_dir / "last.pt").is_file() else [])]


def read_log(path):
    with open(path, newline="") as stream:
        return [{name: value for name, value in row.items() if name not in ("seconds", "samples_per_s")}
                for row in csv.DictReader(stream)]


@pytest.mark.parametrize("script", ["train.py", "fine_tune.py"])
def test_a_run_killed_again_and_again_ends_as_an_undisturbed_one(script, encoder_flags, data_dir, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    stage_1 = ["--data-dir", data_dir, "--batch-size", 8, *encoder_flags, "--hidden-size", 400, "--epochs", EPOCHS]
    flags, output_dir = stage_1, Path("output/feature_extraction")
    for folder in (whole, cut):
        folder.mkdir()
    if script == "fine_tune.py":
        for folder in (whole, cut):
            finish(start(folder, "train.py", [*stage_1, "--epochs", 2]))
        flags, output_dir = ["--data-dir", data_dir, "--batch-size", 8, "--epochs", EPOCHS, "--patience", EPOCHS], \
            Path("output/fine_tuning")
    began = time.monotonic()
    finish(start(whole, script, flags))
    seconds = time.monotonic() - began

    rng, random_kills, save_kills, cache_kills = random.Random(script), 0, 0, 0
    if script == "train.py":  # in stage 2 the pixels are there already
        for pattern in (".pixels-*.tmp.npy", ".image_states-*.tmp.npy", ".question_states-*.tmp.npy"):
            cache_kills += kill_when(start(cut, script, flags), f"cache/{pattern}", cut)
    for number in range(NUM_IN_SAVE):
        pattern = ".last.*.tmp.pt" if number % 2 else ".vqa_checkpoint.*.tmp.pt"
        save_kills += kill_when(start(cut, script, resumed(cut, output_dir, flags)), f"{output_dir}/{pattern}", cut)
    while random_kills < NUM_RANDOM:
        process = start(cut, script, resumed(cut, output_dir, flags))
        time.sleep(seconds * rng.random())  # spread over the whole run
        if kill(process):
            random_kills += 1
        else:  # it had come to its end: once more from the beginning
            check_equal(whole / output_dir, cut / output_dir)
            shutil.rmtree(cut / output_dir)
    finish(start(cut, script, resumed(cut, output_dir, flags)))
    print(f"{random_kills} random kills, {save_kills} inside a save, {cache_kills} inside a cache build")
    assert save_kills >= 5 and random_kills + save_kills + cache_kills >= 20
    check_equal(whole / output_dir, cut / output_dir)
    for folder in (whole, cut):
        finish(start(folder, "test.py", ["--data-dir", data_dir, "--checkpoint", output_dir / "vqa_checkpoint.pt"]))
        assert not list(folder.rglob(".*.tmp*")), "the last run leaves nothing half written"
    for name in ("vqa_test_results.csv", "vqa_test_metrics.json"):
        assert (whole / "output" / name).read_bytes() == (cut / "output" / name).read_bytes()


def check_equal(whole, cut):
    """Two output folders hold the same log, but for timing, the same samples, and the same weights to the bit."""
    assert read_log(whole / "train_log.csv") == read_log(cut / "train_log.csv")
    for name in ("vqa_checkpoint.pt", "last.pt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, cut))
        assert one["epoch"] == other["epoch"] and one["val_loss"] == other["val_loss"]
        assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])
    assert (whole / "samples.csv").read_bytes() == (cut / "samples.csv").read_bytes()
