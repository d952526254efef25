"""SIGKILL to the real training scripts at random moments and inside saves. --resume ends as an undisturbed run would."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, call_script, start

NUM_RANDOM, NUM_IN_SAVE = 16, 8
EPOCHS = 12


def kill(process):
    """SIGKILL to the whole group. Returns whether it was still running."""
    running = process.poll() is None
    if running:
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return running


def kill_when(process, folder, pattern):
    """SIGKILL as soon as `folder` has a file of `pattern`. Returns whether that file stayed, incomplete."""
    while process.poll() is None:
        if any(folder.glob(pattern)):
            kill(process)
            return any(folder.glob(pattern))
    process.communicate()
    return False


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("script", ["train.py", "fine_tune.py"])
def test_a_run_killed_many_times_ends_as_an_undisturbed_one(script, run_script, encoder_flags, data_dir, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    common = ["--data-dir", data_dir, "--batch-size", 8, "--epochs", EPOCHS, "--patience", EPOCHS]
    flags, output_dir = [*common, *encoder_flags, "--hidden-size", 400], Path("output/feature_extraction")
    if script == "fine_tune.py":
        call_script("train.py", *flags, "--epochs", 2, cwd=whole)
        flags, output_dir = common, Path("output/fine_tuning")
    shutil.copytree(whole, killed)
    began = time.monotonic()
    run_script(script, *flags, cwd=whole)
    seconds = time.monotonic() - began

    def resume():
        """The run in `killed`, with --resume if there is something to resume."""
        flag = "--resume" if (killed / output_dir / "last.pt").is_file() else "--overwrite"
        return start(ROOT / script, *flags, flag, cwd=killed)

    rng, random_kills, save_kills, cache_kills = random.Random(script), 0, 0, 0
    if script == "train.py":  # stage 2 finds the pixels of stage 1
        for name in ("pixels", "image_states", "question_states"):
            cache_kills += kill_when(resume(), killed / "cache", f".{name}-*.tmp.npy")
    for number in range(NUM_IN_SAVE):
        save_kills += kill_when(resume(), killed / output_dir, f".{('last', 'vqa_checkpoint')[number % 2]}.*.tmp.pt")
    while random_kills < NUM_RANDOM:
        process = resume()
        time.sleep(seconds * rng.random())  # spread over the whole run
        if kill(process):
            random_kills += 1
        else:  # the run had finished: start it again
            tiny.check_equal_runs(whole / output_dir, killed / output_dir)
            shutil.rmtree(killed / output_dir)
    _, errors = (process := resume()).communicate(timeout=280)
    assert process.returncode == 0, errors
    print(f"{random_kills} random kills, {save_kills} inside a save, {cache_kills} inside a cache build")
    assert save_kills >= 5 and random_kills + save_kills + cache_kills >= 20
    tiny.check_equal_runs(whole / output_dir, killed / output_dir)
    for folder in (whole, killed):
        call_script("test.py", "--data-dir", data_dir, "--checkpoint", output_dir / "vqa_checkpoint.pt", cwd=folder)
        # the cache has no lock: there the files of killed runs stay for an hour
        assert not list((folder / output_dir).rglob(".*.tmp*")), "the last run leaves no temporary file"
    for name in ("vqa_test_results.csv", "vqa_test_metrics.json"):
        assert (whole / "output" / name).read_bytes() == (killed / "output" / name).read_bytes()
