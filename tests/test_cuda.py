"""What only a CUDA device can show; skipped without one. Each path is compared with the plain one, within a tolerance."""
import os
import signal

import pytest
import tiny
import torch

import fine_tune
import train
from features import store
from model import AnswerDecoder

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.fixture
def losses_of(run_config, tmp_path):
    """losses_of(name, **settings) -> the validation losses of a small stage 1 on the device, dropout 0."""
    def run(name, **changes):
        train.main(run_config(**{"output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache" / name),
                                 "dropout": 0.0, "device": "cuda", "amp": "off", **changes}))
        return read_losses(tmp_path / name)
    return run


@pytest.fixture
def stage_two_losses(stage_one, data_dir, tmp_path):
    """stage_two_losses(name, **settings) -> the same of a small stage 2."""
    def run(name, **changes):
        cfg = {"checkpoint": str(stage_one / "vqa_checkpoint.pt"), "data_dir": str(data_dir), "clip_layers": 2,
               "gpt2_layers": 2, "output_dir": str(tmp_path / name), "cache_dir": str(tmp_path / "cache" / name), "epochs": 3,
               "batch_size": 16, "device": "cuda", "amp": "off"}
        fine_tune.main(fine_tune.Config(**(cfg | changes)))
        return read_losses(tmp_path / name)
    return run


def read_losses(folder):
    return [float(row["val_loss"]) for row in tiny.read_log(folder)]


def test_the_device_gives_the_losses_of_the_cpu(losses_of):
    assert losses_of("cuda") == pytest.approx(losses_of("cpu", device="cpu"), abs=1e-3)


def test_bf16_stays_near_float32(losses_of):
    assert losses_of("bf16", amp="bf16") == pytest.approx(losses_of("off"), abs=0.02)


def test_fp16_with_its_scaler_stays_near_float32(stage_two_losses):
    assert stage_two_losses("fp16", amp="fp16") == pytest.approx(stage_two_losses("off"), abs=0.05)


def test_compiled_blocks_stay_near_the_others(stage_two_losses):
    """GPT-2's own dropout draws other numbers in a compiled block."""
    assert stage_two_losses("compiled", compile=True) == pytest.approx(stage_two_losses("plain"), abs=0.05)


def test_states_in_pinned_host_memory_give_the_same_losses(stage_two_losses, monkeypatch):
    before = stage_two_losses("on_the_device")
    monkeypatch.setattr(store, "DEVICE_SHARE", 0.0)
    assert stage_two_losses("in_host_memory") == pytest.approx(before, abs=1e-3)


def test_no_step_and_no_word_synchronises_the_device(losses_of, monkeypatch):
    """torch raises if a training step or a word of an answer waits for the device."""
    def strict(function):
        def call(*arguments, **names):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return function(*arguments, **names)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return call
    monkeypatch.setattr(train, "train_step", strict(train.train_step))
    monkeypatch.setattr(AnswerDecoder, "greedy_search", strict(AnswerDecoder.greedy_search))
    losses_of("strict")


def test_an_interrupted_run_resumes_within_a_tolerance(losses_of, monkeypatch):
    whole, train_step, steps = losses_of("whole", dropout=0.3), train.train_step, []

    def interrupted_step(*arguments, **names):
        steps.append(1)
        if len(steps) == 13:  # in the second epoch
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(*arguments, **names)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt, match="--resume continues"):
        patched.setattr(train, "train_step", interrupted_step)
        losses_of("resumed", dropout=0.3)
    assert losses_of("resumed", dropout=0.3, resume=True) == pytest.approx(whole, abs=1e-3)
