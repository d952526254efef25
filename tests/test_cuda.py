"""What only a CUDA device can show; skipped without one. Each path against the plain one, with a stated tolerance."""
import csv
import os
import signal

import pytest
import torch

import fine_tune
import train
from features import store as features
from model import AnswerDecoder
from training import step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def losses_of(encoder_flags, data_dir, tmp_path):
    """losses_of(name, **settings) -> the validation losses of a small stage 1 on the device, dropout 0."""
    def run(name, **settings):
        cfg = {"data_dir": str(data_dir), "output_dir": str(tmp_path / name), "clip_model": encoder_flags[1],
               "gpt2_model": encoder_flags[3], "cache_dir": str(tmp_path / "cache" / name), "hidden_size": 24, "dropout": 0.0,
               "epochs": 4, "batch_size": 16, "learning_rate": 3e-3, "answer_max_len": 8, "device": "cuda", "amp": "off"}
        train.main(train.Config(**(cfg | settings)))
        return read_losses(tmp_path / name)
    return run


@pytest.fixture
def stage_two_losses(losses_of, data_dir, tmp_path):
    """stage_two_losses(name, **settings) -> the same of a small stage 2 from one stage 1."""
    def run(name, **settings):
        if not (tmp_path / "one/vqa_checkpoint.pt").is_file():
            losses_of("one")
        cfg = {"checkpoint": str(tmp_path / "one/vqa_checkpoint.pt"), "data_dir": str(data_dir), "clip_layers": 2,
               "gpt2_layers": 2, "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache" / name), "epochs": 3,
               "batch_size": 16, "device": "cuda", "amp": "off"}
        fine_tune.main(fine_tune.Config(**(cfg | settings)))
        return read_losses(tmp_path / name)
    return run


def read_losses(folder):
    with open(folder / "train_log.csv", newline="") as stream:
        return [float(row["val_loss"]) for row in csv.DictReader(stream)]


def test_the_device_gives_the_cpus_losses(losses_of):
    assert losses_of("cuda") == pytest.approx(losses_of("cpu", device="cpu"), abs=1e-3)


def test_bf16_stays_near_float32(losses_of):
    assert losses_of("bf16", amp="bf16") == pytest.approx(losses_of("off"), abs=0.02)


def test_fp16_with_its_scaler_stays_near_float32(stage_two_losses):
    assert stage_two_losses("fp16", amp="fp16") == pytest.approx(stage_two_losses("off"), abs=0.05)


def test_a_captured_step_gives_the_eager_losses(losses_of):
    assert losses_of("captured", capture=True) == pytest.approx(losses_of("eager"), abs=1e-3)


def test_a_captured_stage_two_step_gives_the_eager_losses(stage_two_losses):
    """With GPT-2's own dropout at its default both draw other numbers: near, not equal."""
    assert stage_two_losses("captured", capture=True) == pytest.approx(stage_two_losses("eager"), abs=0.05)


def test_compiled_blocks_give_the_eager_losses(stage_two_losses):
    assert stage_two_losses("compiled", compile=True) == pytest.approx(stage_two_losses("eager"), abs=0.05)


def test_capture_refuses_what_it_cannot_do(losses_of):
    with pytest.raises(ValueError, match="--capture needs a CUDA device, --amp bf16 or off and one process"):
        losses_of("fp16", capture=True, amp="fp16")


def test_states_in_pinned_host_memory_give_the_same_losses(stage_two_losses, monkeypatch):
    before = stage_two_losses("on_the_device")
    monkeypatch.setattr(features, "DEVICE_SHARE", 0.0)
    assert stage_two_losses("in_host_memory") == pytest.approx(before, abs=1e-3)


def test_compiled_and_captured_together_give_the_eager_losses(stage_two_losses):
    assert stage_two_losses("both", compile=True, capture=True) == pytest.approx(stage_two_losses("eager"), abs=0.05)


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_no_step_and_no_word_waits_for_the_device(capture, losses_of, monkeypatch):
    """Between two looks nothing may synchronise; torch raises where something does."""
    take, search = step.TrainingStep.take, AnswerDecoder.greedy_search

    def strict(function):
        def call(*arguments):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return call
    if not capture:  # recording a graph may wait once; replaying is one launch
        monkeypatch.setattr(step.TrainingStep, "take", strict(take))
    monkeypatch.setattr(AnswerDecoder, "greedy_search", strict(search))
    losses_of("strict", capture=capture)


@pytest.mark.parametrize("capture", [False, True], ids=["eager", "captured"])
def test_an_interrupted_run_resumes_within_tolerance(capture, losses_of, monkeypatch):
    whole, true_step, steps = losses_of("whole", dropout=0.3, capture=capture), step.TrainingStep.take, []

    def interrupted_step(self, rows):
        steps.append(1)
        if len(steps) == 13:  # within the second epoch
            os.kill(os.getpid(), signal.SIGTERM)
        return true_step(self, rows)

    monkeypatch.setattr(step.TrainingStep, "take", interrupted_step)
    with pytest.raises(KeyboardInterrupt, match="--resume continues"):
        losses_of("cut", dropout=0.3, capture=capture)
    monkeypatch.undo()
    assert losses_of("cut", dropout=0.3, capture=capture, resume=True) == pytest.approx(whole, abs=1e-3)
