"""Interrupted runs: what an interruption costs, what it leaves on the disk, and how --resume continues."""
import dataclasses
import os
import shutil
import signal

import pytest
import tiny
import torch
from PIL import Image

import train
import training.step
from common import settings
from common.device import Precision
from training import run_state
from training.checkpoint import read_checkpoint, save_checkpoint


class Killed(BaseException):
    """Ends the run at one place, as SIGKILL would."""


@pytest.fixture
def stop_before(monkeypatch):
    """stop_before(saves, run): `run()` until it would save a file of which `saves(path, content)` is true."""
    def stop(saves, run):
        def save_or_stop(path, content):
            if saves(path, content):
                raise Killed
            save_checkpoint(path, content)
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(run_state, "save_checkpoint", save_or_stop)
            run()
    return stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "TERM"])
def test_a_signal_costs_the_running_epoch_and_resume_continues(number, run_config, tmp_path, monkeypatch, capsys):
    """The resumed run equals an uninterrupted one bit for bit."""
    train.main(run_config(output_dir=str(tmp_path / "whole"), answer_sampling="humans"))
    cfg, true_loss, steps = run_config(answer_sampling="humans"), training.step.answer_loss, []

    def interrupted_loss(model, *rest):
        steps.extend([1] * model.training)
        if model.training and len(steps) == 13:  # the fifth of the second epoch's eight
            os.kill(os.getpid(), number)
        return true_loss(model, *rest)

    handler = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr("tyro.cli", lambda *_, **__: cfg)
        patched.setattr(training.step, "answer_loss", interrupted_loss)
        settings.run(train.main, train.Config)
    signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == 130 and len(steps) == 13
    assert ("stopped in epoch 2, which is lost; the epochs before it are saved: the same command with --resume continues"
            in capsys.readouterr().err)
    assert read_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1
    train.main(dataclasses.replace(cfg, resume=True))
    tiny.check_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_kill_between_the_two_checkpoints_repeats_the_epoch(run_config, stop_before, tmp_path):
    train.main(run_config(output_dir=str(tmp_path / "whole")))
    stop_before(lambda path, content: path.name == "last.pt" and content["epoch"] == 2, lambda: train.main(run_config()))
    epochs = [read_checkpoint(tmp_path / "run" / name)["epoch"] for name in ("vqa_checkpoint.pt", "last.pt")]
    assert epochs == [2, 1]
    train.main(run_config(resume=True))
    tiny.check_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_new_run_does_not_leave_the_last_pt_of_the_run_before(run_config, stop_before):
    """Resuming the old run would leave the new run's vqa_checkpoint.pt as the best of the old run."""
    train.main(run_config(epochs=2))
    stop_before(lambda path, content: path.name == "last.pt", lambda: train.main(run_config(epochs=2)))
    with pytest.raises(FileNotFoundError, match="nothing to resume: .*last.pt not found; start without --resume"):
        train.main(run_config(epochs=2, resume=True))


@pytest.mark.parametrize("first, second", [("fp16", "off"), ("off", "fp16")])
def test_a_run_resumes_on_a_device_with_another_precision(first, second, run_config, stop_before, tmp_path, monkeypatch):
    """--amp auto is fp16 on some GPUs and off on a CPU: only fp16 has a gradient scaler with a state."""
    def use(amp):
        monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu", enabled=amp == "fp16"))

    use(first)
    stop_before(lambda path, content: content["epoch"] == 2, lambda: train.main(run_config(epochs=3)))
    assert bool(read_checkpoint(tmp_path / "run/last.pt")["scaler"]) == (first == "fp16")
    use(second)
    train.main(run_config(epochs=3, resume=True))
    assert [row["overflows"] for row in tiny.read_log(tmp_path / "run")] == ["0"] * 4
    assert bool(read_checkpoint(tmp_path / "run/last.pt")["scaler"]) == (second == "fp16")


def test_resuming_a_finished_run_writes_lost_tables_and_curves_again(run_config, tmp_path, capsys):
    train.main(run_config(epochs=1))
    names = ("train_log.csv", "samples.csv", "config.json", "loss_plot.png")
    for name in names:
        (tmp_path / "run" / name).unlink()
    train.main(run_config(epochs=1, resume=True))
    assert all((tmp_path / "run" / name).is_file() for name in names)
    assert "resumed after epoch 1\nbest epoch 1 of 1" in capsys.readouterr().out


def test_resuming_with_other_settings_lists_them(run_config):
    train.main(run_config(epochs=1))
    with pytest.raises(ValueError, match="batch_size was 16, is 8; learning_rate was 0.003, is 0.001"):
        train.main(run_config(epochs=1, batch_size=8, learning_rate=1e-3, resume=True))


def test_resuming_with_other_images_under_the_same_names_is_refused(run_config, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    cfg = run_config(data_dir=str(tmp_path / "data"), epochs=1)
    train.main(cfg)
    Image.new("RGB", (20, 20), "pink").save(next((tmp_path / "data/images").iterdir()))
    with pytest.raises(ValueError, match="images was .*, is "):
        train.main(dataclasses.replace(cfg, resume=True))


@pytest.mark.parametrize("damage, message", [
    (lambda last: last.update(optimizer={}), "last.pt is damaged .* start without --resume"),
    (lambda last: last.pop("log"), "last.pt is not a checkpoint of this program: it lacks log")])
def test_a_damaged_last_pt_is_refused(damage, message, run_config, tmp_path):
    train.main(run_config(epochs=1))
    last = read_checkpoint(tmp_path / "run/last.pt")
    damage(last)
    save_checkpoint(tmp_path / "run/last.pt", last)
    with pytest.raises(ValueError, match=message):
        train.main(run_config(epochs=1, resume=True))


def test_a_full_disk_leaves_the_checkpoint_and_says_so(run_config, tmp_path, monkeypatch):
    train.main(run_config(epochs=1))
    before = (tmp_path / "run/vqa_checkpoint.pt").read_bytes()

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"vqa_checkpoint.pt cannot be written \(No space left on device\); .* intact"):
        train.main(run_config(epochs=2, learning_rate=1e-3))
    assert (tmp_path / "run/vqa_checkpoint.pt").read_bytes() == before
    assert not list((tmp_path / "run").glob(".*"))


def test_a_second_run_in_the_same_folder_is_refused(run_config, tmp_path):
    with run_state.lock_output_folder(tmp_path / "run"), pytest.raises(ValueError, match="another run is writing"):
        train.main(run_config())
    train.main(run_config(epochs=1))
