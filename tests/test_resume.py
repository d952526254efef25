"""Interrupted runs: what an interruption costs, what it leaves on the disk, and how --resume continues."""
import dataclasses
import functools
import itertools
import json
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
from features.trained_model import read_checkpoint
from training import run_state
from training.checkpoint import save_checkpoint
from training.optimizer import schedule

TABLES = ("train_log.csv", "samples.csv", "config.json", "loss_plot.png")


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


def test_a_signal_in_the_first_epoch_says_that_nothing_is_saved(train_flags, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train_epoch", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    error = call_script("train.py", *train_flags, "--output-dir", "run", expect=130, cwd=tmp_path)
    assert error == "stopped in epoch 1, which is lost; there is nothing to resume yet"
    assert not (tmp_path / "run").exists()


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
    stop_before(lambda path, content: path.name == "last.pt", run_config(epochs=1, overwrite=True))
    assert "nothing to resume: run/last.pt not found; start without --resume" in resume(expect=2)


def test_resuming_a_finished_run_writes_lost_tables_and_curves_again(finished, resume):
    for name in TABLES:
        (finished / name).unlink()
    output = resume()
    assert "\nthis run has ended after epoch 1: with more --epochs" in output and "\nbest epoch 1 of 1" in output
    assert all((finished / name).is_file() for name in TABLES)


@pytest.mark.parametrize("flags", [("--epochs", 2), ("--epochs", 9, "--patience", 1)], ids=str)
def test_a_run_that_has_ended_under_the_new_settings_stays_as_it_is(flags, train_flags, tmp_path, monkeypatch):
    """With fewer epochs than trained it announced their schedule, and config.json told that it had been trained with them."""
    command, losses = ["train.py", *train_flags, "--output-dir", "run"], itertools.count(1.0)
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    call_script(*command, "--epochs", 3, cwd=tmp_path)
    before = bytes_of(tmp_path / "run")
    output = call_script(*command, *flags, "--resume", cwd=tmp_path)
    assert "\nthis run has ended after epoch 3: with more --epochs or a larger --patience it goes on\n" in output
    assert "schedule" not in output and "resumed" not in output
    assert bytes_of(tmp_path / "run") == before


def test_resuming_without_the_best_weights_is_refused_at_the_start(finished, resume, monkeypatch):
    """It went on, and without a better epoch the run ended with no vqa_checkpoint.pt."""
    (finished / "vqa_checkpoint.pt").unlink()
    monkeypatch.setattr(train, "read_rows", None)  # not reached
    before = bytes_of(finished)
    assert resume(expect=2) == ("error: the best weights are missing: copy run/vqa_checkpoint.pt back, or replace the run with "
                                "--overwrite")
    assert bytes_of(finished) == before


def test_resuming_with_other_settings_lists_them(resume):
    error = resume("--batch-size", 8, "--learning-rate", 1e-3, expect=2)
    assert "other settings or data: batch_size was 16, is 8; learning_rate was 0.003, is 0.001. Use the same" in error
    assert "--output-dir run_2 and without --resume" in error and "--overwrite" not in error


def test_resuming_with_other_images_under_the_same_names_is_refused(resume, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    Image.new("RGB", (20, 20), "pink").save(tmp_path / "data/images/0003.png")
    error = resume("--data-dir", "data", expect=2)
    assert "other settings or data: images of --data-dir was " in error
    assert ". Use the same settings and data, or start a new run with --output-dir run_2" in error


def test_resuming_with_other_rows_names_their_flag(resume, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    for name in ("metadata.csv", "qa_pairs.json"):
        path = tmp_path / "data" / name
        path.write_text(path.read_text().replace("?", " now?"))
    error = resume("--data-dir", "data", expect=2)
    assert "training rows of --data-dir was " in error and "; validation rows of --data-dir was " in error


@pytest.mark.parametrize("changes, message", [
    *[(change, "last.pt is damaged .* --overwrite, or take --output-dir run_2")
      for change in ({"optimizer": {}}, {"log": []}, {"log": ["x"]}, {"log": [1]}, {"log": {}})],
    ({"log": None}, "last.pt is not a checkpoint of this program: it lacks log; replace the run with --overwrite, "
     "or take --output-dir run_2")], ids=str)
def test_a_damaged_last_pt_is_refused(changes, message, finished, resume):
    last = {**read_checkpoint(finished / "last.pt"), **changes}
    save_checkpoint(finished / "last.pt", {name: last[name] for name in last if changes.get(name, "") is not None})
    assert re.search(message, resume(expect=2))


def test_a_last_pt_that_is_no_zip_is_refused_with_the_remedy(finished, resume):
    (finished / "last.pt").write_bytes(b"x")
    assert resume(expect=2) == ("error: run/last.pt is not a checkpoint of this program, or is damaged (BadZipFile); replace "
                                "the run with --overwrite, or take --output-dir run_2")


@pytest.fixture
def full_disk(monkeypatch):
    """full_disk(names): from now on files of these names cannot be written. As from a real write, the error names no file."""
    def fill(*names):
        true_replace = os.replace

        def replace(source, target):
            if os.path.basename(target) in names:
                raise OSError(28, "No space left on device")
            true_replace(source, target)
        monkeypatch.setattr(os, "replace", replace)
    return fill


@pytest.mark.parametrize("name", ["vqa_checkpoint.pt", "last.pt"])
def test_a_full_disk_in_the_first_epoch_does_not_advise_to_resume(name, full_disk, train_flags, tmp_path):
    full_disk(name)
    error = call_script("train.py", *train_flags, "--output-dir", "run", expect=2, cwd=tmp_path)
    assert error == (f"error: [Errno 28] No space left on device: 'run/{name}': epoch 1 is lost; there is nothing to resume "
                     "yet")


def test_a_full_disk_later_loses_one_epoch_and_says_how_to_continue(whole, full_disk, run_config, tmp_path, monkeypatch):
    cfg, save_epoch = run_config(answer_sampling="humans"), run_state.Run.save_epoch

    def fill_in_epoch_2(run, row, *rest):
        if row["epoch"] == 2:
            full_disk("last.pt")
        save_epoch(run, row, *rest)
    with monkeypatch.context() as patched:
        patched.setattr(run_state.Run, "save_epoch", fill_in_epoch_2)
        with pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: .*run/last.pt': epoch 2 is lost; the "
                                          "epochs before it are saved: the same command with --resume continues"):
            train.main(cfg)
    monkeypatch.undo()
    train.main(dataclasses.replace(cfg, resume=True))
    tiny.check_equal_runs(whole, tmp_path / "run")


def test_a_full_disk_under_tables_and_curves_is_a_warning(whole, full_disk, run_config, tmp_path, capsys):
    """It ended the training: hours of computing for the sake of a table."""
    full_disk(*TABLES)
    train.main(run_config(answer_sampling="humans"))
    output = capsys.readouterr().out
    assert all(f"warning: [Errno 28] No space left on device: '{tmp_path}/run/{name}'" in output for name in TABLES)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["last.pt", "vqa_checkpoint.pt"]
    for name in ("last.pt", "vqa_checkpoint.pt"):
        one, other = (read_checkpoint(folder / name) for folder in (whole, tmp_path / "run"))
        assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in one["weights"])


# ---- a folder that holds a run

def bytes_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("lost, message", [
    ((), "run holds a trained run: continue it with --resume, replace it with --overwrite, or take --output-dir run_3"),
    (("last.pt",), "run holds a trained run: replace it with --overwrite, or take --output-dir run_3"),
    (("vqa_checkpoint.pt",), "run holds a trained run: replace it with --overwrite, or take --output-dir run_3")], ids=str)
def test_a_folder_that_holds_a_run_is_refused(lost, message, finished, train_flags):
    """Forgetting --resume replaced a trained checkpoint by epoch 0 at once."""
    for name in lost:
        (finished / name).unlink()
    (finished.parent / "run_2").mkdir()
    before = bytes_of(finished)
    assert message in call_script("train.py", *train_flags, "--output-dir", "run", expect=2, cwd=finished.parent)
    assert bytes_of(finished) == before


def test_stage_two_refuses_a_folder_that_holds_a_run_too(stage_one, finished, data_dir):
    error = call_script("fine_tune.py", "--checkpoint", stage_one / "vqa_checkpoint.pt", "--data-dir", data_dir,
                        "--output-dir", "run", expect=2, cwd=finished.parent)
    assert "run holds a trained run: continue it with --resume" in error


def test_resume_and_overwrite_exclude_each_other(resume):
    assert "--resume continues the run in --output-dir and --overwrite replaces it" in resume("--overwrite", expect=2)


def test_an_overwritten_run_stays_until_an_epoch_of_the_new_one_is_trained(whole, finished, run_config, monkeypatch):
    """Whatever ends the new run before: a kill, or a loss that is not finite."""
    before, cfg = bytes_of(finished), run_config(answer_sampling="humans", overwrite=True)

    def killed(*_):
        raise Killed
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(train, "train_epoch", killed)
        train.main(cfg)
    assert {name: content for name, content in bytes_of(finished).items() if name != ".lock"} == before
    train.main(cfg)
    tiny.check_equal_runs(whole, finished)


def test_epoch_0_is_the_best_checkpoint_if_training_only_harms(run_config, tmp_path, monkeypatch):
    """Its weights are kept in memory until epoch 1 is saved: training changes them in place."""
    losses = itertools.count(1.0)
    monkeypatch.setattr(train, "evaluate", lambda *_: next(losses))
    for name, rate in (("run", 3e-3), ("slow", 1e-9)):
        train.main(run_config(epochs=1, learning_rate=rate, output_dir=str(tmp_path / name)))
    files = ("run/vqa_checkpoint.pt", "run/last.pt", "slow/last.pt")
    best, last, untrained = (read_checkpoint(tmp_path / name) for name in files)
    assert (best["epoch"], last["epoch"]) == (0, 1)
    assert all(torch.allclose(best["weights"][key], untrained["weights"][key], atol=1e-6) for key in best["weights"])


# ---- what may change

def test_a_finished_run_goes_on_for_more_epochs(finished, resume):
    output = resume("--epochs", 3, "--patience", 9, "--workers", 1)
    assert "epochs was 1, is 3: from epoch 2 on the learning rates follow the schedule of 3 epochs" in output
    rates = [float(row["learning_rate_head"]) for row in tiny.read_log(finished)]
    assert len(rates) == 4
    factors = [schedule(step, total_steps=24, warmup_steps=2) for step in range(24)]  # 8 steps in an epoch
    assert rates[2:] == pytest.approx([0.003 * sum(factors[8:16]) / 8, 0.003 * sum(factors[16:]) / 8])
    assert json.loads((finished / "config.json").read_text())["epochs"] == 3


def test_the_config_of_a_run_trains_it_again(stage_one, data_dir, session_cache, tmp_path):
    """Both stages. --overwrite and --resume of the first run are not inherited."""
    call_script("fine_tune.py", "--checkpoint", stage_one / "vqa_checkpoint.pt", "--clip-layers", 1, "--gpt2-layers", 1,
                "--data-dir", data_dir, "--cache-dir", session_cache, "--epochs", 1, "--output-dir", tmp_path / "two",
                "--overwrite", cwd=tmp_path)
    for script, folder in (("train.py", stage_one), ("fine_tune.py", tmp_path / "two")):
        again = tmp_path / f"{folder.name}_again"
        call_script(script, "--config", folder / "config.json", "--output-dir", again, cwd=tmp_path)
        tiny.check_equal_runs(folder, again)
        first, second = (json.loads((path / "config.json").read_text()) for path in (folder, again))
        assert first | {"output_dir": str(again), "overwrite": False} == second
    message = call_script("fine_tune.py", "--config", tmp_path / "two/config.json", expect=2, cwd=tmp_path)
    assert "holds a trained run: continue it with --resume, replace it with --overwrite" in message


def test_a_moved_run_with_moved_data_and_encoders_goes_on(whole, run_config, stop_before, tmp_path, monkeypatch):
    """The content is compared, not its place."""
    cfg = run_config(answer_sampling="humans")
    stop_before(lambda path, content: content["epoch"] == 3, cfg)
    for source, target in ((cfg.data_dir, "data"), (cfg.clip_model.removeprefix("local-dir:"), "clip"),
                           (cfg.gpt2_model, "gpt2"), (tmp_path / "run", "moved")):
        shutil.copytree(source, tmp_path / "place" / target)
    monkeypatch.chdir(tmp_path / "place")
    train.main(dataclasses.replace(cfg, data_dir="data", clip_model="local-dir:./clip", gpt2_model="gpt2", cache_dir="cache",
                                   output_dir="moved", resume=True))
    tiny.check_equal_runs(whole, tmp_path / "place/moved")


def test_other_encoders_under_the_same_name_are_refused(resume, run_config, tmp_path):
    clip_flag, clip, gpt2_flag, gpt2 = tiny.write_encoders(tmp_path / "other", seed=1)
    assert "fingerprint of --clip-model was " in resume(clip_flag, clip, gpt2_flag, gpt2, expect=2)


def test_stage_two_goes_on_from_a_moved_stage_one_only(stage_one, train_flags, data_dir, session_cache, tmp_path):
    shutil.copytree(stage_one, tmp_path / "one")
    command = ["fine_tune.py", "--data-dir", data_dir, "--cache-dir", session_cache, "--clip-layers", 0, "--gpt2-layers", 1]
    call_script(*command, "--checkpoint", "one/vqa_checkpoint.pt", "--epochs", 1, cwd=tmp_path)
    (tmp_path / "one").rename(tmp_path / "moved")
    moved = ["--checkpoint", "moved/vqa_checkpoint.pt", "--epochs", 2, "--resume"]
    assert "from epoch 2 on" in call_script(*command, *moved, cwd=tmp_path)
    call_script("train.py", *train_flags, "--seed", 7, "--output-dir", "moved", "--overwrite", cwd=tmp_path)
    assert "other settings or data: fingerprint of --checkpoint was" in call_script(*command, *moved, expect=2, cwd=tmp_path)
