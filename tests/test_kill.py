"""SIGKILL to the real training scripts at random moments and inside saves. --resume ends as an undisturbed run would."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NUM_RANDOM, NUM_IN_SAVE = 16, 8
EPOCHS = 12


def start(folder, script, flags):
    """The script in its own process group, as a terminal starts it."""
    return subprocess.Popen(list(map(str, [sys.executable, ROOT / script, *flags])), cwd=folder, start_new_session=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process):
    _, errors = process.communicate(timeout=280)
    assert process.returncode == 0, errors


def kill(process):
    """SIGKILL to the whole group. Returns whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def kill_when(process, pattern, folder):
    """SIGKILL as soon as `folder` has a file of `pattern`. Returns whether that file stayed, incomplete."""
    while process.poll() is None:
        if any(folder.glob(pattern)):
            kill(process)
            return any(folder.glob(pattern))
    process.communicate()
    return False


def with_resume(folder, output_dir, flags):
    """`flags`, and --resume if there is something to resume."""
    return [*flags, *(["--resume"] if (folder / output_dir / "last.pt").is_file() else [])]


@pytest.mark.parametrize("script", ["train.py", "fine_tune.py"])
def test_a_run_killed_many_times_ends_as_an_undisturbed_one(script, encoder_flags, data_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    stage_1 = ["--data-dir", data_dir, "--batch-size", 8, *encoder_flags, "--hidden-size", 400, "--epochs", EPOCHS]
    flags, output_dir = stage_1, Path("output/feature_extraction")
    for folder in (whole, killed):
        folder.mkdir()
    if script == "fine_tune.py":
        for folder in (whole, killed):
            finish(start(folder, "train.py", [*stage_1, "--epochs", 2]))
        flags = ["--data-dir", data_dir, "--batch-size", 8, "--epochs", EPOCHS, "--patience", EPOCHS]
        output_dir = Path("output/fine_tuning")
    began = time.monotonic()
    finish(start(whole, script, flags))
    seconds = time.monotonic() - began

    rng, random_kills, save_kills, cache_kills = random.Random(script), 0, 0, 0
    if script == "train.py":  # stage 2 finds the pixels of stage 1
        for pattern in (".pixels-*.tmp.npy", ".image_states-*.tmp.npy", ".question_states-*.tmp.npy"):
            cache_kills += kill_when(start(killed, script, flags), f"cache/{pattern}", killed)
    for number in range(NUM_IN_SAVE):
        pattern = ".last.*.tmp.pt" if number % 2 else ".vqa_checkpoint.*.tmp.pt"
        process = start(killed, script, with_resume(killed, output_dir, flags))
        save_kills += kill_when(process, f"{output_dir}/{pattern}", killed)
    while random_kills < NUM_RANDOM:
        process = start(killed, script, with_resume(killed, output_dir, flags))
        time.sleep(seconds * rng.random())  # spread over the whole run
        if kill(process):
            random_kills += 1
        else:  # the run had finished: start it again
            tiny.check_equal_runs(whole / output_dir, killed / output_dir)
            shutil.rmtree(killed / output_dir)
    finish(start(killed, script, with_resume(killed, output_dir, flags)))
    print(f"{random_kills} random kills, {save_kills} inside a save, {cache_kills} inside a cache build")
    assert save_kills >= 5 and random_kills + save_kills + cache_kills >= 20
    tiny.check_equal_runs(whole / output_dir, killed / output_dir)
    for folder in (whole, killed):
        finish(start(folder, "test.py", ["--data-dir", data_dir, "--checkpoint", output_dir / "vqa_checkpoint.pt"]))
        assert not list(folder.rglob(".*.tmp*")), "the last run leaves no temporary file"
    for name in ("vqa_test_results.csv", "vqa_test_metrics.json"):
        assert (whole / "output" / name).read_bytes() == (killed / "output" / name).read_bytes()
