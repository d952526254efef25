"""The one loop: what it minimises, what it leaves on disk, and that a resumed run equals an uninterrupted one."""
import copy
import csv
import dataclasses
import math
import os
import shutil
import signal

import pytest
import torch
from PIL import Image

import train
from common.device import Precision
from training import run_state as run_folder
from training import step
from training.checkpoint import read_checkpoint, restore_model, save_checkpoint
from training.optimizer import load_optimizer, make_optimizer, schedule, set_rates
from training.step import answer_loss, evaluate
from vocab import END, PAD, START

CPU = Precision("cpu")


class FlatModel(torch.nn.Module):
    """Answers every question with the same logits; enough of a model for the loss."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, batch, inputs):
        return self.logits.expand(*inputs.shape, -1)


def test_the_loss_is_a_sum_over_scored_words_with_its_count():
    logits = torch.tensor([0.0, 0.0, 1.0, 0.0, 2.0])
    log_probs = logits.log_softmax(0)
    batch = {"answer_ids": torch.tensor([[START, 4, END, PAD], [START, 4, 4, END]])}
    loss, words = answer_loss(FlatModel(logits), batch)
    assert words == 5
    assert loss.item() == pytest.approx(-(3 * log_probs[4] + 2 * log_probs[END]).item(), rel=1e-6)
    smoothed, _ = answer_loss(FlatModel(logits), batch, label_smoothing=0.1)
    assert smoothed > loss


class Answers:
    """Just enough of a dataset for `evaluate`."""

    def __init__(self, answer_ids):
        self.answer_ids = answer_ids

    def __len__(self):
        return len(self.answer_ids)

    def batch(self, index):
        return {"answer_ids": self.answer_ids[index]}


def test_the_validation_loss_does_not_depend_on_the_batch_size():
    """A mean of batch means would weigh the words of a short last batch more."""
    ids = torch.tensor([[START, 4, END, PAD], [START, 4, 3, END], [START, END, PAD, PAD]])
    model = FlatModel(torch.tensor([0.0, 0.0, 1.0, 0.5, 2.0]))
    losses = [evaluate(model, Answers(ids), size, CPU) for size in (1, 2, 3)]
    assert max(losses) - min(losses) < 1e-6


def test_warm_up_then_cosine():
    factors = [schedule(step, 100, 10) for step in range(100)]
    assert factors[0] == 0.1 and factors[9] == 1.0 and factors[10] == 1.0
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    assert factors[55] == pytest.approx(0.5) and factors[-1] < 0.001


def test_one_learning_rate_per_origin_and_no_decay_on_norms_and_biases(make_model):
    model = make_model(clip_layers=1, gpt2_layers=1)
    optimizer = make_optimizer(model, {"head": 1.0, "clip": 2.0, "gpt2": 3.0}, 0.1)
    grouped = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(grouped) == len(model.trainable_weights())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = grouped[id(parameter)]
            peak = 2.0 if name.startswith("image_encoder") else 3.0 if name.startswith("question_encoder") else 1.0
            assert group["peak"] == peak
            assert (group["weight_decay"] == 0) == (parameter.dim() < 2 or name == "decoder.embedding.weight")


def test_the_clipped_norm_is_the_true_norm(monkeypatch, run_config):
    """Clipping before unscaling clips to 1/65536 of the norm that was meant."""
    norms = []
    true_clip = torch.nn.utils.clip_grad_norm_

    def noted(parameters, max_norm):
        norm = true_clip(parameters, max_norm)
        norms.append((norm.item(), math.sqrt(sum(p.grad.square().sum().item() for p in parameters if p.grad is not None))))
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", noted)

    class Scaler(torch.amp.GradScaler):
        """What fp16 does, on the CPU."""
        def __init__(self):
            super().__init__("cpu", init_scale=65536.0)

    monkeypatch.setattr(Precision, "scaler", lambda self: Scaler())
    train.main(run_config(max_grad_norm=0.01, epochs=1))
    assert norms and all(before > 0.01 and after == pytest.approx(0.01, rel=1e-3) for before, after in norms)
    assert norms[0][0] < 100, "the norm was taken of scaled gradients"


@pytest.fixture
def run_config(encoder_flags, data_dir, session_cache, tmp_path):
    """run_config(output_dir=..., epochs=...) -> settings of a small stage 1."""
    def make(**changes):
        return train.Config(**{"data_dir": str(data_dir), "output_dir": str(tmp_path / "run"), "clip_model": encoder_flags[1],
                               "gpt2_model": encoder_flags[3], "cache_dir": str(session_cache), "hidden_size": 24,
                               "epochs": 4, "batch_size": 16, "learning_rate": 3e-3, "answer_max_len": 8, **changes})
    return make


def read_log(folder):
    with open(folder / "train_log.csv", newline="") as stream:
        return list(csv.DictReader(stream))


def without_timing(log):
    return [{name: value for name, value in row.items() if name not in ("seconds", "samples_per_s")} for row in log]


def test_training_learns_logs_and_keeps_the_best(run_config, tmp_path):
    train.main(run_config(epochs=12))
    log = read_log(tmp_path / "run")
    assert [row["epoch"] for row in log] == [str(epoch) for epoch in range(13)]
    assert list(log[0]) == ["epoch", "train_loss", "val_loss", "val_bleu", "val_exact_match", "learning_rate_head",
                            "overflows", "seconds", "samples_per_s"]
    losses = [float(row["val_loss"]) for row in log]
    assert min(losses) < 0.6 * losses[0]
    checkpoint = read_checkpoint(tmp_path / "run" / "vqa_checkpoint.pt")
    assert checkpoint["val_loss"] == min(losses) and losses[checkpoint["epoch"]] == min(losses)
    assert not any(name.startswith(("image_encoder", "question_encoder")) for name in checkpoint["weights"])
    assert (tmp_path / "run/config.json").is_file() and (tmp_path / "run/loss_plot.png").stat().st_size > 5000


def test_one_can_watch_it_learn(run_config, tmp_path, monkeypatch):
    """The log and the samples stand on the disk after every epoch, however seldom the weights are saved."""
    seen, close_epoch = [], run_folder.RunFolder.close_epoch

    def spy(run, row, *rest):
        close_epoch(run, row, *rest)
        with open(tmp_path / "run/samples.csv", newline="") as stream:
            seen.append((len(read_log(tmp_path / "run")), list(next(csv.reader(stream)))[-1]))
    monkeypatch.setattr(run_folder.RunFolder, "close_epoch", spy)
    monkeypatch.setattr(run_folder, "SAVING_SHARE", 1e-9)
    train.main(run_config(epochs=3))
    assert seen == [(number + 1, f"epoch {number}") for number in range(4)]


def test_the_saved_model_is_the_one_that_was_measured(run_config, tmp_path):
    from features.pixels import decode_images
    from features.store import build_store
    from preprocess import VQADataset, read_rows, rows_of_split
    cfg = run_config()
    train.main(cfg)
    checkpoint, encoders, vocab, model = restore_model(tmp_path / "run/vqa_checkpoint.pt")
    rows = read_rows(cfg.data_dir)
    pixels = decode_images(cfg.data_dir, rows["image_path"], encoders.image, cfg.cache_dir, 1)
    store = build_store(model, encoders, pixels, rows["question"], 32, cfg.cache_dir, CPU)
    val_set = VQADataset(rows_of_split(rows, "val"), vocab, 8, store)
    assert evaluate(model, val_set, 32, CPU) == pytest.approx(checkpoint["val_loss"], abs=1e-6)


def test_two_runs_are_equal(run_config, tmp_path):
    for name in ("a", "b"):
        train.main(run_config(output_dir=str(tmp_path / name), epochs=2))
    logs = [without_timing(read_log(tmp_path / name)) for name in ("a", "b")]
    assert logs[0] == logs[1]
    weights = [read_checkpoint(tmp_path / name / "vqa_checkpoint.pt")["weights"] for name in ("a", "b")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class PulledPlug(Exception):
    pass


@pytest.fixture
def equal_runs(tmp_path):
    """equal_runs(): the runs in `whole` and `cut` left the same log, but for timing, and the same weights to the bit."""
    def check():
        assert without_timing(read_log(tmp_path / "whole")) == without_timing(read_log(tmp_path / "cut"))
        for name in ("vqa_checkpoint.pt", "last.pt"):
            whole, cut = (read_checkpoint(tmp_path / run / name) for run in ("whole", "cut"))
            assert whole["epoch"] == cut["epoch"] and whole["val_loss"] == cut["val_loss"]
            assert all(torch.equal(whole["weights"][key], cut["weights"][key]) for key in whole["weights"])
        assert (tmp_path / "whole/samples.csv").read_bytes() == (tmp_path / "cut/samples.csv").read_bytes()
    return check


@pytest.mark.parametrize("stop_at", ["in an epoch", "before last.pt"])
@pytest.mark.parametrize("saving_share", [run_folder.SAVING_SHARE, 1e9], ids=["saving now and then", "saving every epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(saving_share, stop_at, run_config, equal_runs, tmp_path,
                                                               monkeypatch):
    train.main(run_config(output_dir=str(tmp_path / "whole")))
    monkeypatch.setattr(run_folder, "SAVING_SHARE", saving_share)
    true_epoch, true_save = train.train_epoch, run_folder.save_checkpoint

    def epoch_or_stop(take_step, dataset, run, cfg, stop):
        if run.state["epoch"] == 2 and stop_at == "in an epoch":
            raise PulledPlug
        return true_epoch(take_step, dataset, run, cfg, stop)

    def save_or_stop(path, content):
        if path.name == "last.pt" and content["epoch"] >= 2 and stop_at == "before last.pt":
            raise PulledPlug
        true_save(path, content)

    monkeypatch.setattr(train, "train_epoch", epoch_or_stop)
    monkeypatch.setattr(run_folder, "save_checkpoint", save_or_stop)
    with pytest.raises(PulledPlug):
        train.main(run_config(output_dir=str(tmp_path / "cut")))
    monkeypatch.undo()
    train.main(run_config(output_dir=str(tmp_path / "cut"), resume=True))
    equal_runs()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(number, run_config, equal_runs, tmp_path, monkeypatch):
    train.main(run_config(output_dir=str(tmp_path / "whole"), answer_sampling="humans"))
    true_loss, steps = step.answer_loss, []

    def interrupted_loss(model, batch, label_smoothing=0.0):
        if model.training:
            steps.append(1)
            if len(steps) == 13:  # the fifth of the second epoch's eight
                os.kill(os.getpid(), number)
        return true_loss(model, batch, label_smoothing)

    monkeypatch.setattr(step, "answer_loss", interrupted_loss)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 5 of epoch 2, which is saved: .* --resume"):
        train.main(run_config(output_dir=str(tmp_path / "cut"), answer_sampling="humans"))
    monkeypatch.undo()
    assert len(steps) == 13 and signal.getsignal(number) != run_folder.StopSignal.note
    train.main(run_config(output_dir=str(tmp_path / "cut"), answer_sampling="humans", resume=True))
    equal_runs()


def test_a_signal_in_an_epoch_of_one_step_stops_after_it(run_config, equal_runs, tmp_path, monkeypatch):
    """There is no step left before which the run could stop: the end of the epoch is the place."""
    one_step = {"batch_size": 1000, "epochs": 6}
    train.main(run_config(output_dir=str(tmp_path / "whole"), **one_step))
    true_loss, steps = step.answer_loss, []

    def interrupted_loss(model, batch, label_smoothing=0.0):
        steps.extend([1] * model.training)
        if model.training and len(steps) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return true_loss(model, batch, label_smoothing)

    monkeypatch.setattr(step, "answer_loss", interrupted_loss)
    with pytest.raises(KeyboardInterrupt, match="stopped after step 0 of epoch 3, which is saved"):
        train.main(run_config(output_dir=str(tmp_path / "cut"), **one_step))
    monkeypatch.undo()
    train.main(run_config(output_dir=str(tmp_path / "cut"), resume=True, **one_step))
    equal_runs()


def test_a_second_signal_stops_at_once(run_config, monkeypatch):
    def impatient(*_):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "train_epoch", impatient)
    with pytest.raises(KeyboardInterrupt, match="stopped at once"):
        train.main(run_config())


def test_overflows_are_counted_and_too_many_stop_the_run(run_config, tmp_path, monkeypatch):
    """fp16's scale is found by overflowing: such a step changes nothing, and the log says how many there were."""
    true_loss, steps = step.answer_loss, []

    def overflowing_loss(model, batch, label_smoothing=0.0):
        loss, words = true_loss(model, batch, label_smoothing)
        steps.extend([1] * model.training)
        if model.training and len(steps) in (1, 2, 6):
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, words

    monkeypatch.setattr(step, "answer_loss", overflowing_loss)
    monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu"))
    train.main(run_config(epochs=2))
    assert [row["overflows"] for row in read_log(tmp_path / "run")] == ["0", "3", "0"]
    steps.clear()
    monkeypatch.setattr(run_folder, "MAX_OVERFLOWS", 0)
    with pytest.raises(ValueError, match="3 of 8 steps overflowed in fp16, more than 0, the last in epoch 1"):
        train.main(run_config(epochs=2))


def test_a_run_whose_every_step_overflows_stops_however_short_its_epochs_are(run_config, monkeypatch):
    true_loss = step.answer_loss

    def overflowing_loss(model, batch, label_smoothing=0.0):
        loss, words = true_loss(model, batch, label_smoothing)
        if model.training:
            loss.register_hook(lambda gradient: gradient * math.inf)
        return loss, words

    monkeypatch.setattr(step, "answer_loss", overflowing_loss)
    monkeypatch.setattr(Precision, "scaler", lambda self: torch.amp.GradScaler("cpu"))
    monkeypatch.setattr(run_folder, "MAX_OVERFLOWS", 9)
    with pytest.raises(ValueError, match="10 of 10 steps overflowed in fp16, more than 9"):
        train.main(run_config(epochs=30, patience=30, batch_size=1000))


def test_a_resumed_optimizer_keeps_the_learning_rates_that_a_captured_step_reads():
    """`load_state_dict` would put other tensors in their place, which no graph looks at."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([{"params": [weight], "lr": torch.tensor(0.5), "name": "head", "peak": 1.0}])
    rate = optimizer.param_groups[0]["lr"]
    load_optimizer(optimizer, copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups[0]["lr"] is rate
    set_rates(optimizer, 0.25)
    assert rate == 0.25


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(run_config, tmp_path, monkeypatch):
    train.main(run_config(epochs=1))
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("vqa_checkpoint.pt", "last.pt")}

    def full(path, data):
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match=r"vqa_checkpoint.pt cannot be written \(No space left on device\); .* intact"):
        train.main(run_config(epochs=2, learning_rate=1e-3, resume=False))
    assert (tmp_path / "run/vqa_checkpoint.pt").read_bytes() == before["vqa_checkpoint.pt"]
    assert not list((tmp_path / "run").glob(".*tmp*"))


def test_resuming_with_other_settings_lists_them(run_config):
    train.main(run_config(epochs=1))
    with pytest.raises(ValueError, match="batch_size was 16, is 8; learning_rate was 0.003, is 0.001"):
        train.main(run_config(epochs=1, batch_size=8, learning_rate=1e-3, resume=True))


def test_resuming_nothing_is_an_error(run_config):
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        train.main(run_config(resume=True))


def test_a_second_run_in_the_same_folder_is_refused(run_config, tmp_path):
    with run_folder.only_run_in(tmp_path / "run"), pytest.raises(ValueError, match="another run is writing"):
        train.main(run_config())
    train.main(run_config(epochs=1))


def test_training_stops_early(run_config, tmp_path, capsys):
    train.main(run_config(epochs=60, patience=2, learning_rate=0.05))
    losses = [float(row["val_loss"]) for row in read_log(tmp_path / "run")]
    best = losses.index(min(losses))
    assert len(losses) < 61 and best == len(losses) - 3, "the epochs that trigger the stop are in the log"
    assert f"best epoch {best} of {len(losses) - 1}" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(run_config, tmp_path, monkeypatch):
    true_loss = step.answer_loss

    def exploding(model, batch, label_smoothing=0.0):
        loss, words = true_loss(model, batch, label_smoothing)
        return (loss * math.nan if model.training else loss), words

    monkeypatch.setattr(step, "answer_loss", exploding)
    with pytest.raises(ValueError, match=r"the loss became nan in epoch 1, at step 0 \(learning_rate_head .*vqa_checkpoint.pt"):
        train.main(run_config())
    assert read_checkpoint(tmp_path / "run/vqa_checkpoint.pt")["epoch"] == 0


def test_out_of_memory_says_which_batch_size_to_try(run_config, monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    for place, name in ((step.TrainingStep, "train_on"), (step, "answer_loss")):  # in training, in validation
        with monkeypatch.context() as patched, \
                pytest.raises(ValueError, match="--batch-size 16 does not fit the device's memory: try --batch-size 8"):
            patched.setattr(place, name, too_much)
            train.main(run_config())


@pytest.mark.parametrize("name", ["optimizer", "state"])
def test_a_last_pt_without_what_it_should_hold_is_one_line(name, run_config, tmp_path):
    train.main(run_config(epochs=1))
    path = tmp_path / "run/last.pt"
    save_checkpoint(path, read_checkpoint(path) | {name: {}})
    with pytest.raises(ValueError, match="last.pt is damaged .* start without --resume"):
        train.main(run_config(epochs=1, resume=True))


def test_resuming_with_other_pictures_under_the_same_names_is_refused(run_config, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    cfg = run_config(data_dir=str(tmp_path / "data"), epochs=1)
    train.main(cfg)
    picture = next((tmp_path / "data/images").iterdir())
    Image.new("RGB", (20, 20), "pink").save(picture)
    with pytest.raises(ValueError, match="pictures was .*, is "):
        train.main(dataclasses.replace(cfg, resume=True))


@pytest.mark.parametrize("damage, message", [
    (lambda c: c.pop("vocab"), "lacks vocab"),
    (lambda c: c.update(format="nanoGPT"), "'nanoGPT'"),
    (lambda c: c["vocab"].append("one-more"), "vocabulary has .* words and the decoder"),
    (lambda c: c["encoders"]["fingerprints"].update(clip="0" * 32), "0{32}.*the one found here has"),
    (lambda c: c["weights"].pop("decoder.output.bias"), "decoder.output.bias"),
    (lambda c: c["sizes"].update(hidden_size=28), r"has the shape .* the model"),
    (lambda c: c["sizes"].update(hidden_size="abc"), "sizes hidden_size is 'abc', no number from 1"),
    (lambda c: c["sizes"].update(answer_max_len=0), "sizes answer_max_len is 0, no number from 1"),
    (lambda c: c["sizes"].update(inputs="nonsense"), "sizes inputs is 'nonsense', none of both, question, image"),
    (lambda c: c["sizes"].pop("dropout"), "sizes holds .* not .*dropout"),
    (lambda c: c.update(vocab=None), "vocab is None, which is no list"),
    (lambda c: c.update(encoders={}), r"encoders holds \[\], not"),
    (lambda c: c["encoders"]["fingerprints"].update(third="0"), "fingerprints holds"),
    (lambda c: c.update(cut="x"), "cut is 'x', which is no dict"),
    (lambda c: c["weights"].update({"decoder.output.bias": [1.0]}), "decoder.output.bias is no tensor of finite numbers"),
    (lambda c: c["weights"]["decoder.output.bias"].fill_(math.nan), "decoder.output.bias is no tensor of finite numbers"),
    (lambda c: c["weights"].pop("decoder.embedding.weight"), "lacks decoder.embedding.weight"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_with_both_values(damage, message, run_config, tmp_path):
    train.main(run_config(epochs=1))
    path = tmp_path / "run/vqa_checkpoint.pt"
    content = read_checkpoint(path)
    damage(content)
    save_checkpoint(path, content)
    with pytest.raises(ValueError, match=message):
        restore_model(path)


@pytest.mark.parametrize("content", [b"", b"hello", None, "other"])
def test_files_that_are_no_checkpoint_are_refused(content, tmp_path):
    path = tmp_path / "x.pt"
    if content is None:
        torch.save({"model": {"w": torch.ones(2)}}, path)
    elif content == "other":
        torch.save({"weights": torch.ones(300)}, path)
        path.write_bytes(path.read_bytes()[:500])
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint of this program"):
        read_checkpoint(path)


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    torch.save({"format": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        read_checkpoint(tmp_path / "evil.pt")
