"""Interrupted runs: what an interruption costs, what it leaves on the disk, and how --resume continues."""
import functools
import os
import re
import shutil
import signal

import pytest
import tiny
import torch
from conftest import call_script
from PIL import Image

import train
import training.step
from common.device import Precision
from training import run_state
from training.checkpoint import read_checkpoint, save_checkpoint


class Killed(BaseException):
    """Ends the run at one place, as SIGKILL would."""


@pytest.fixture
def stop_before(monkeypatch):
    """stop_before(saves, cfg): train until a file would be saved of which `saves(path, content)` is true."""
    def stop(saves, cfg):
        def save_or_stop(path, content):
            if saves(path, content):
                raise Killed
            save_checkpoint(path, content)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(run_state, "save_checkpoint", save_or_stop)
            train.main(cfg)
    return stop


@pytest.fixture(scope="module")
def whole(small_settings, tmp_path_factory):
    """The output folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    train.main(train.Config(**small_settings, answer_sampling="humans", output_dir=str(folder)))
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "TERM"])
def test_a_signal_costs_the_running_epoch_and_resume_continues(number, whole, train_flags, tmp_path, monkeypatch):
    """The resumed run equals an uninterrupted one bit for bit."""
    command = ["train.py", *train_flags, "--epochs", 4, "--answer-sampling", "humans", "--output-dir", "run"]
    true_loss, steps = training.step.answer_loss, []

    def interrupted_loss(model, *rest):
        steps.extend([1] * model.training)
        if model.training and len(steps) == 13:  # the fifth of the second epoch's eight
            os.kill(os.getpid(), number)
        return true_loss(model, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(training.step, "answer_loss", interrupted_loss)
        error = call_script(*command, expect=130, cwd=tmp_path)
    assert len(steps) == 13
    assert "stopped in epoch 2, which is lost; the epochs before it are saved: the same command with --resume" in error
    assert read_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1
    call_script(*command, "--resume", cwd=tmp_path)
    tiny.check_equal_runs(whole, tmp_path / "run")


def test_a_kill_between_the_two_checkpoints_repeats_the_epoch(whole, run_config, stop_before, tmp_path):
    cfg = run_config(answer_sampling="humans")
    stop_before(lambda path, content: path.name == "last.pt" and content["epoch"] == 2, cfg)
    epochs = [read_checkpoint(tmp_path / "run" / name)["epoch"] for name in ("vqa_checkpoint.pt", "last.pt")]
    assert epochs == [2, 1]
    cfg.resume = True
    train.main(cfg)
    tiny.check_equal_runs(whole, tmp_path / "run")


@pytest.mark.parametrize("first, second", [("fp16", "off"), ("off", "fp16")])
def test_a_run_resumes_on_a_device_with_another_precision(first, second, run_config, stop_before, tmp_path, monkeypatch):
    """--amp auto is fp16 on some GPUs and off on a CPU: only fp16 has a gradient scaler with a state."""
    def use(amp):
        monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu", enabled=amp == "fp16"))

    use(first)
    stop_before(lambda path, content: content["epoch"] == 2, run_config(epochs=2))
    assert bool(read_checkpoint(tmp_path / "run/last.pt")["scaler"]) == (first == "fp16")
    use(second)
    train.main(run_config(epochs=2, resume=True))
    assert [row["overflows"] for row in tiny.read_log(tmp_path / "run")] == ["0"] * 3
    assert bool(read_checkpoint(tmp_path / "run/last.pt")["scaler"]) == (second == "fp16")


@pytest.fixture
def finished(stage_one, tmp_path):
    """The output folder of a finished run of one epoch."""
    return shutil.copytree(stage_one, tmp_path / "run")


@pytest.fixture
def resume(finished, train_flags):
    """resume(*flags) -> what the finished run prints if it is resumed with further flags; expect=2: its error line."""
    return functools.partial(call_script, "train.py", *train_flags, "--output-dir", "run", "--resume", cwd=finished.parent)


def test_a_new_run_does_not_leave_the_last_pt_of_the_run_before(finished, resume, run_config, stop_before):
    """Resuming the old run would leave the new run's vqa_checkpoint.pt as the best of the old run."""
    stop_before(lambda path, content: path.name == "last.pt", run_config(epochs=1))
    assert "nothing to resume: run/last.pt not found; start without --resume" in resume(expect=2)


def test_resuming_a_finished_run_writes_lost_tables_and_curves_again(finished, resume):
    names = ("train_log.csv", "samples.csv", "config.json", "loss_plot.png")
    for name in names:
        (finished / name).unlink()
    assert "resumed after epoch 1\nbest epoch 1 of 1" in resume()
    assert all((finished / name).is_file() for name in names)


def test_resuming_with_other_settings_lists_them(resume):
    error = resume("--batch-size", 8, "--learning-rate", 1e-3, expect=2)
    assert "other settings: batch_size was 16, is 8; learning_rate was 0.003, is 0.001. Set them back" in error


def test_resuming_with_other_images_under_the_same_names_is_refused(resume, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    Image.new("RGB", (20, 20), "pink").save(tmp_path / "data/images/0003.png")
    assert "; images was " in resume("--data-dir", "data", expect=2)


@pytest.mark.parametrize("changes, message", [
    *[(change, "last.pt is damaged .* start without --resume")
      for change in ({"optimizer": {}}, {"log": []}, {"log": ["x"]}, {"log": [1]}, {"log": {}})],
    ({"log": None}, "last.pt is not a checkpoint of this program: it lacks log")], ids=str)
def test_a_damaged_last_pt_is_refused(changes, message, finished, resume):
    last = {**read_checkpoint(finished / "last.pt"), **changes}
    save_checkpoint(finished / "last.pt", {name: value for name, value in last.items() if value is not None})
    assert re.search(message, resume(expect=2))


def test_a_full_disk_leaves_the_checkpoint_and_says_so(finished, run_config, monkeypatch):
    before = (finished / "vqa_checkpoint.pt").read_bytes()

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"vqa_checkpoint.pt cannot be written \(No space left on device\); .* intact"):
        train.main(run_config(epochs=2, learning_rate=1e-3))
    assert (finished / "vqa_checkpoint.pt").read_bytes() == before
    assert not list(finished.glob(".*"))
