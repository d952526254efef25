"""The training loop: what it minimises, what it writes, and when it stops."""
import csv
import itertools
import math

import pytest
import tiny
import torch

import train
import training.step
from common.device import Precision
from evaluation.generation import answer_dataset
from features.trained_model import load_model, read_checkpoint
from preprocess import build_datasets, read_rows
from training import run_state
from training.optimizer import make_optimizer, schedule
from training.step import answer_loss, evaluate
from vocab import END, PAD, START, Vocab

CPU = Precision("cpu")


class ConstantModel(torch.nn.Module):
    """The same logits at every word of every answer."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, batch, answer_ids):
        return self.logits.expand(*answer_ids.shape, -1)


class Answers:
    """The part of a VQADataset that `evaluate` needs."""

    def __init__(self, answer_ids):
        self.answer_ids = answer_ids

    def __len__(self):
        return len(self.answer_ids)

    def batch(self, index):
        return {"answer_ids": self.answer_ids[index]}


def test_the_loss_is_the_sum_over_the_words_and_their_number():
    logits = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0])
    log_probs = logits.log_softmax(0)
    batch = {"answer_ids": torch.tensor([[START, 4, END, PAD], [START, 4, 4, END]])}
    loss, words = answer_loss(ConstantModel(logits), batch)
    assert words == 5
    assert loss.item() == pytest.approx(-(3 * log_probs[4] + 2 * log_probs[END]).item(), rel=1e-6)
    smoothed, _ = answer_loss(ConstantModel(logits), batch, label_smoothing=0.1)
    assert smoothed > loss


def test_the_validation_loss_does_not_depend_on_the_batch_size():
    """A mean of batch means would give the words of a short last batch a larger weight."""
    ids = torch.tensor([[START, 4, END, PAD], [START, 4, 3, END], [START, END, PAD, PAD]])
    model = ConstantModel(torch.tensor([0.0, 0.0, 1.0, 0.5, 2.0]))
    losses = [evaluate(model, Answers(ids), size, CPU) for size in (1, 2, 3)]
    assert max(losses) - min(losses) < 1e-6


@pytest.mark.parametrize("answers, expected", [
    (["a red cup"] * 100 + ["word " * 99], 16), (["สุนัขสีน้ำตาลกำลังวิ่งเล่นบนหาด", "แมวสีดำ"], 16),
    (["สุนัขสีน้ำตาลกำลังวิ่งเล่นบนหาด"] * 2, 22), (["word " * 99] * 3, 64)])
def test_answers_may_be_longer_if_more_than_one_in_a_hundred_training_answers_is(answers, expected, capsys):
    """88 of 242 answers in scripts without spaces were truncated to 15 words."""
    assert train.default_answer_length(Vocab.build([*answers, "x"]), answers) == expected
    assert (f"have {expected - 1} words (--answer-max-len {expected})" in capsys.readouterr().out) == (expected > 16)


def test_the_schedule_warms_up_then_follows_a_cosine():
    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[55] == pytest.approx(0.5) and factors[-1] < 0.001


def test_each_origin_has_its_learning_rate_and_only_matrices_decay(make_model):
    model = make_model(clip_layers=1, gpt2_layers=1)
    optimizer = make_optimizer(model, {"head": 1.0, "clip": 2.0, "gpt2": 3.0}, 0.1)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == len(model.trainable_weights())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            max_lr = 2.0 if name.startswith("image_encoder") else 3.0 if name.startswith("question_encoder") else 1.0
            assert group_of[id(parameter)]["max_lr"] == max_lr
            no_decay = parameter.dim() < 2 or name == "decoder.embedding.weight"
            assert (group_of[id(parameter)]["weight_decay"] == 0) == no_decay


def test_the_true_gradient_norm_is_clipped(run_config, monkeypatch):
    """Clipping before unscaling would clip to 1/65536 of the norm that was asked for."""
    norms, clip_grad_norm_ = [], torch.nn.utils.clip_grad_norm_

    def recorded(parameters, max_norm):
        before = clip_grad_norm_(parameters, max_norm).item()
        norms.append((before, math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))))

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu", init_scale=65536.0))
    train.main(run_config(max_grad_norm=0.01, epochs=1))
    assert norms and all(before > 0.01 and after == pytest.approx(0.01, rel=1e-3) for before, after in norms)
    assert norms[0][0] < 100, "this is the norm of the scaled gradients"


def test_training_learns_and_the_best_epoch_is_saved_with_its_scores(run_config, tmp_path):
    cfg = run_config(epochs=12)
    train.main(cfg)
    log = tiny.read_csv(tmp_path / "run/train_log.csv")
    assert [row["epoch"] for row in log] == [str(epoch) for epoch in range(13)]
    assert list(log[0]) == ["epoch", "train_loss", "val_loss", "val_bleu", "val_exact_match", "learning_rate_head",
                            "overflows", "seconds", "samples_per_s"]
    losses = [float(row["val_loss"]) for row in log]
    assert min(losses) < 0.6 * losses[0]
    assert (tmp_path / "run/config.json").is_file() and (tmp_path / "run/loss_plot.png").stat().st_size > 5000

    trained = load_model(tmp_path / "run/vqa_checkpoint.pt")
    model, checkpoint = trained.model, trained.checkpoint
    assert not model.training
    assert checkpoint["val_loss"] == min(losses) and losses[checkpoint["epoch"]] == min(losses)
    assert not any(name.startswith(("image_encoder", "question_encoder")) for name in checkpoint["weights"])
    val_set = build_datasets(model, trained.encoders, trained.vocab, read_rows(cfg.data_dir), cfg.data_dir, cfg, CPU,
                             ("val",))["val"]
    assert evaluate(model, val_set, 32, CPU) == pytest.approx(min(losses), abs=1e-6)
    texts = {question_id: answer.text for question_id, answer in
             zip(val_set.rows["question_id"], answer_dataset(model, val_set, CPU), strict=True)}
    for row in tiny.read_csv(tmp_path / "run/samples.csv"):
        assert row[f"epoch {checkpoint['epoch']}"] == texts[row["question_id"]]


@pytest.mark.parametrize("seconds", [-3600, 0], ids=["set back", "stands still"])
def test_a_clock_that_is_set_during_a_run_changes_no_duration(seconds, run_config, tmp_path, monkeypatch):
    """The log held negative durations, or the run ended in a ZeroDivisionError."""
    clock = itertools.count(1_000_000, seconds)
    monkeypatch.setattr("time.time", lambda: next(clock))
    train.main(run_config(epochs=1))
    for row in tiny.read_csv(tmp_path / "run/train_log.csv"):
        assert float(row["seconds"]) >= 0 and (float(row["samples_per_s"]) > 0) == (row["epoch"] == "1")


def test_every_epoch_is_saved_and_the_curves_are_drawn_now_and_then(run_config, tmp_path, monkeypatch):
    end_epoch, draw_curves, saved, drawn = run_state.Run.save_epoch, run_state.Run.draw_curves, [], []

    def watched_end(run, row, *rest):
        end_epoch(run, row, *rest)
        if row["epoch"] == 0:  # saved with epoch 1
            assert not list((tmp_path / "run").glob("[!.]*"))
            return
        with open(tmp_path / "run/samples.csv", newline="") as stream:
            saved.append((len(tiny.read_log(tmp_path / "run")), next(csv.reader(stream))[-1],
                          read_checkpoint(tmp_path / "run/last.pt")["epoch"]))

    def watched_draw(run):
        drawn.append(run.log[-1]["epoch"])
        draw_curves(run)

    monkeypatch.setattr(run_state.Run, "save_epoch", watched_end)
    monkeypatch.setattr(run_state.Run, "draw_curves", watched_draw)
    monkeypatch.setattr(run_state, "DRAW_EVERY", 1e9)
    train.main(run_config(epochs=3))
    assert saved == [(number + 1, f"epoch {number}", number) for number in range(1, 4)]
    assert drawn == [1, 3]


def test_training_stops_early(run_config, tmp_path, capsys):
    train.main(run_config(epochs=60, patience=2, learning_rate=0.05))
    losses = [float(row["val_loss"]) for row in tiny.read_log(tmp_path / "run")]
    best = losses.index(min(losses))
    assert len(losses) < 61 and best == len(losses) - 3, "the epochs without improvement are in the log"
    assert f"best epoch {best} of {len(losses) - 1}" in capsys.readouterr().out


@pytest.fixture
def change_loss(monkeypatch):
    """change_loss(change): `loss, words = change(loss, words, number)` in every training step, counted from 1."""
    def patch(change):
        true_loss, steps = answer_loss, []

        def changed(model, batch, label_smoothing=0.0):
            loss, words = true_loss(model, batch, label_smoothing)
            if not model.training:
                return loss, words
            steps.append(1)
            return change(loss, len(steps)), words
        monkeypatch.setattr(training.step, "answer_loss", changed)
    return patch


@pytest.fixture
def overflow_at(change_loss, monkeypatch):
    """overflow_at(steps): as in fp16 on a GPU, the gradients of these training steps overflow."""
    def patch(steps):
        def overflow(loss, number):
            if number in steps:
                loss.register_hook(lambda gradient: gradient * math.inf)
            return loss
        change_loss(overflow)
        monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu"))
    return patch


def test_overflows_are_counted_in_the_log_also_when_resumed(run_config, overflow_at, tmp_path, monkeypatch):
    """fp16 finds its scale by overflowing. Such a step changes no weight, and the log counts it."""
    overflow_at({1, 2, 6, 20})  # an epoch has 8 steps
    train.main(run_config(epochs=3))
    assert [row["overflows"] for row in tiny.read_log(tmp_path / "run")] == ["0", "3", "0", "1"]

    def killed(*_):
        raise SystemExit
    overflow_at({1, 2, 6, 20})
    with monkeypatch.context() as patched, pytest.raises(SystemExit):
        train_epoch = train.train_epoch
        patched.setattr(train, "train_epoch", lambda epoch, *rest: killed() if epoch == 3 else train_epoch(epoch, *rest))
        train.main(run_config(epochs=3, output_dir=str(tmp_path / "resumed")))
    train.main(run_config(epochs=3, output_dir=str(tmp_path / "resumed"), resume=True))
    tiny.check_equal_runs(tmp_path / "run", tmp_path / "resumed")


@pytest.mark.parametrize("batch_size, where", [(16, "epoch 3, up to step 8"), (1000, "epoch 17, up to step 1")],
                         ids=["epochs of 8 steps", "epochs of one step"])
def test_a_run_whose_every_step_overflows_stops(batch_size, where, run_config, overflow_at):
    """The scale starts at 2**16 and halves at each overflow: after 17 of them no scale helps."""
    overflow_at(range(1, 99))
    with pytest.raises(ValueError, match=f"the fp16 gradients overflow in {where}; .*vqa_checkpoint.pt; use --amp bf16"):
        train.main(run_config(epochs=30, patience=30, batch_size=batch_size))


def test_a_loss_that_is_not_finite_stops_the_run(run_config, change_loss, tmp_path):
    change_loss(lambda loss, number: loss * math.nan)
    with pytest.raises(ValueError, match=r"became nan in epoch 1, up to step 8 .*; no checkpoint is saved yet"):
        train.main(run_config())
    assert not (tmp_path / "run").exists()


def test_a_loss_that_becomes_infinite_later_names_the_last_good_checkpoint(run_config, change_loss, tmp_path):
    change_loss(lambda loss, number: loss * (math.inf if number > 8 else 1))
    with pytest.raises(ValueError, match="in epoch 2, up to step 8 .* last good checkpoint is .*vqa_checkpoint.pt"):
        train.main(run_config())
    assert read_checkpoint(tmp_path / "run/vqa_checkpoint.pt")["epoch"] <= 1


@pytest.mark.parametrize("module, name", [(train, "train_step"), (training.step, "answer_loss")])
def test_out_of_memory_says_which_batch_size_to_try(module, name, run_config, monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    monkeypatch.setattr(module, name, too_much)
    with pytest.raises(ValueError, match="--batch-size 16 does not fit the device's memory: try --batch-size 8"):
        train.main(run_config())
