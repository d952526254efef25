"""Stage 1: train the fusion and the decoder on frozen encoders. And THE training loop, `fit`, of both stages.

Reads metadata.csv and qa_pairs.json of `data_dir`; writes vqa_checkpoint.pt (best by validation
loss), last.pt (for --resume), config.json, train_log.csv and loss_plot.png into `output_dir`.
Each picture and question goes through its frozen encoder once; what comes out is kept in `cache_dir`.
"""
import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from common import distributed, settings
from common.device import Precision
from evaluation.generation import answer_rows, validation_scores
from features.encoders import load_encoders
from features.pixels import decode_images
from features.store import build_store
from preprocess import VQADataset, data_folder, data_hashes, read_rows, report_answers, rows_of_split, training_answers
from training.checkpoint import FIXED, build_model
from training.optimizer import group_rates, make_optimizer, schedule, set_rates
from training.run_state import RunFolder, StopSignal, only_run_in, restore_random_state, watched_rows
from training.step import TrainingStep, evaluate, require_finite
from vocab import Vocab


@dataclass
class Config:
    data_dir: str = "mini_vqa_v2"
    """folder with metadata.csv and pictures, or a CSV with the columns image_path, question, answer"""
    output_dir: str = "output/feature_extraction"
    """where checkpoints, log and curves go; this default is for `inputs` both, others have BLIND_OUTPUT_DIRS"""
    clip_model: str = "ViT-B-32-quickgelu"
    """open_clip's model name, or local-dir:FOLDER"""
    clip_pretrained: str = "openai"
    """open_clip's weights tag, or a weights file; not used with local-dir:"""
    gpt2_model: str = "distilgpt2"
    """hub name or local folder of a GPT-2"""
    hidden_size: int = 256
    """width of fusion and decoder"""
    num_layers: int = 1
    """GRU layers"""
    dropout: float = 0.3
    """in fusion and decoder, 0 to below 1"""
    question_max_len: int = 32
    """GPT-2 tokens of a question; longer ones are cut and counted"""
    answer_max_len: int = 16
    """words of an answer plus its end; longer ones are cut and counted"""
    min_word_freq: int = 2
    """a word enters the answer vocabulary when training answers hold it this often"""
    inputs: Literal["both", "question", "image"] = "both"
    """what the model may see; `question` is the blind baseline"""
    fusion: Literal["gated", "concat"] = "gated"
    """how picture and question are joined"""
    image_pooling: Literal["pooled", "attention"] = "pooled"
    """CLIP's pooled feature alone, or with attention of the question over the picture's tokens"""
    answer_sampling: Literal["majority", "humans"] = "majority"
    """teach the majority answer, or in each epoch one of the humans' answers that have as many words as a label"""
    picture_decoder: Literal["pillow", "fast"] = "pillow"
    """pillow is CLIP's own transform; fast reads twice as many pictures a second, its features differ slightly"""
    epochs: int = 30
    """at most; early stopping may end sooner"""
    batch_size: int = 128
    """questions per step"""
    learning_rate: float = 1e-3
    """peak, after the warm-up; Adam's own default (Kingma and Ba 2015), usual for a head on frozen features"""
    weight_decay: float = 0.01
    """AdamW, on matrices only (Loshchilov and Hutter 2019)"""
    warmup_fraction: float = 0.05
    """share of all steps in which the learning rate rises from 0; then a cosine to 0"""
    label_smoothing: float = 0.1
    """in the training loss only; logged losses are without it"""
    max_grad_norm: float = 1.0
    """gradients are scaled down to this norm"""
    patience: int = 5
    """epochs without a better validation loss before training stops"""
    amp: str = "auto"
    """auto, bf16, fp16, off; auto is off on CPU"""
    capture: bool = False
    """replay the training step as a CUDA graph: pays where a step is short; not with fp16 or several processes"""
    compile: bool = False
    """compile the encoders' blocks (torch.compile): takes a minute, pays on long runs"""
    cache_dir: str = "cache"
    """stored outputs of the frozen encoders"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    workers: int = 0
    """processes that decode pictures; 0 = one per core"""
    seed: int = 42
    """of weights, order and dropout"""
    resume: bool = False
    """continue the interrupted run in output_dir"""


BLIND_OUTPUT_DIRS = {"question": "output/question_only", "image": "output/image_only"}
LOOK_STEPS = 50  # between looks at the loss: a look waits for the device


def check_loop_settings(cfg):
    """The ranges of the settings that both stages share."""
    for name in ("epochs", "batch_size", "patience"):
        settings.check_range(cfg, name, low=1, high=1_000_000)
    settings.check_range(cfg, "workers", low=0, high=256)
    settings.check_range(cfg, "seed", low=0, high=settings.MAX_SEED)
    for name in ("learning_rate", "max_grad_norm"):
        settings.check_range(cfg, name, low=0, low_open=True, high=1e6)
    settings.check_range(cfg, "weight_decay", low=0, high=10)
    settings.check_range(cfg, "warmup_fraction", low=0, high=1)
    settings.check_range(cfg, "label_smoothing", low=0, high=0.99)


def check_settings(cfg):
    check_loop_settings(cfg)
    settings.check_range(cfg, "dropout", low=0, high=0.99)
    settings.check_range(cfg, "hidden_size", low=4, high=65536)
    settings.check_range(cfg, "answer_max_len", low=2, high=512)
    settings.check_range(cfg, "question_max_len", low=1, high=1024)
    settings.check_range(cfg, "num_layers", low=1, high=64)
    settings.check_range(cfg, "min_word_freq", low=1)
    if cfg.image_pooling == "attention" and cfg.hidden_size % 4:
        raise ValueError(f"--hidden-size {cfg.hidden_size} must be a multiple of 4, the heads of --image-pooling attention")


def fit(model, train_set, val_set, learning_rates, cfg, precision, identity, earlier_stages=()):
    """Train until the last epoch or until `patience` epochs brought no better validation loss.

    `learning_rates`: {"head": peak, ...}, one for each group of `model.parameter_groups()`.
    `identity`: what a checkpoint says besides weights, epoch and loss. `earlier_stages`: logs that
    the curves show on the same scale. Returns the log, a list of dicts, one per epoch, row 0 before
    training. Same seed, same machine: same weights and losses, interrupted and resumed or not (on CPU).
    """
    model = model.to(precision.device)
    optimizer = make_optimizer(model, learning_rates, cfg.weight_decay, cfg.capture)
    scaler, watched = precision.scaler(), watched_rows(val_set, cfg.seed)
    take_step = TrainingStep(model, train_set, optimizer, scaler, cfg, precision)
    run = RunFolder(cfg.output_dir, model, optimizer, scaler, identity, earlier_stages, val_set.rows.iloc[watched])
    # the training loss is measured like the validation loss: on as many rows, always the same ones
    probe = torch.randperm(len(train_set), generator=generator(cfg.seed, -1))[:len(val_set)].sort().values
    vocab, answer_max_len = Vocab(identity["vocab"]), identity["sizes"]["answer_max_len"]

    def close_epoch(epoch, started, samples_per_s, rates):
        losses = {name: evaluate(model, dataset, cfg.batch_size, precision, order)
                  for name, dataset, order in (("train_loss", train_set, probe), ("val_loss", val_set, None))}
        require_finite(losses["val_loss"], epoch, "after its last step", rates, run.folder)
        texts = answer_rows(model, vocab, val_set, answer_max_len, precision)[0]
        row = {"epoch": epoch, **losses, **validation_scores(texts, val_set.rows["answer"]), **rates,
               "overflows": run.overflows(epoch * math.ceil(len(train_set) / cfg.batch_size)),
               "seconds": round(time.time() - started, 2), "samples_per_s": round(samples_per_s, 1)}
        run.close_epoch(row, [texts[number] for number in watched], cfg.epochs, cfg.patience)

    if cfg.resume:
        run.resume()
    else:
        close_epoch(0, time.time(), 0, group_rates(optimizer))
    with StopSignal() as stop:
        while not run.state["finished"]:
            started, first_step = time.time(), run.state["step"]
            rates = train_epoch(take_step, train_set, run, cfg, stop)
            if rates is None:
                save_and_stop(run)
            samples_per_s = (len(train_set) - first_step * cfg.batch_size) / (time.time() - started)
            close_epoch(run.state["epoch"] + 1, started, samples_per_s, rates)
            if not run.state["finished"] and distributed.any_rank(stop.noted):
                save_and_stop(run)
    best = min(run.state["log"], key=lambda row: row["val_loss"])
    print(f"best epoch {best['epoch']} of {run.state['epoch']}: validation loss {best['val_loss']:.4f}, "
          f"checkpoint {run.folder / 'vqa_checkpoint.pt'}")
    return run.state["log"]


def save_and_stop(run):
    """Save what is done, and end the program as an interruption does."""
    run.save()
    raise KeyboardInterrupt(f"stopped after step {run.state['step']} of epoch {run.state['epoch'] + 1}, which is "
                            "saved: the same command with --resume continues")


def train_epoch(take_step, dataset, run, cfg, stop):
    """One pass over the rows in an order drawn from (seed, epoch), from the step on that `run.state` holds.

    `take_step`: the TrainingStep. Returns the mean learning rates, or None where `stop` was signalled: the state then
    holds the steps done.
    """
    state, optimizer, epoch = run.state, run.optimizer, run.state["epoch"] + 1
    draw = generator(cfg.seed, epoch)
    order, answer_index = dataset.epoch_order(draw, by_picture=run.model.clip_layers > 0), dataset.drawn_answers(draw)
    steps = math.ceil(len(dataset) / cfg.batch_size)
    factors = [schedule((epoch - 1) * steps + step, cfg.epochs * steps, math.ceil(cfg.warmup_fraction * cfg.epochs * steps))
               for step in range(steps)]
    # every epoch starts from its own seed, so a resumed run draws the same dropout as an uninterrupted one
    torch.manual_seed((cfg.seed * 100_003 + epoch) * distributed.get_world_size() + distributed.get_rank())
    if state["random"]:
        restore_random_state(state["random"][distributed.get_rank()], run.model)
    take_step.start_epoch(state["step"], answer_index)
    # a CPU has nothing to wait for, and there a stop should not have to wait for 50 steps of several processes
    look_steps = 1 if distributed.get_world_size() > 1 and not torch.cuda.is_available() else LOOK_STEPS
    with tqdm(total=len(dataset), initial=state["step"] * cfg.batch_size, desc=f"epoch {epoch}", unit=" samples",
              mininterval=0.5, disable=distributed.get_rank() > 0) as bar:
        for step in range(state["step"], steps):
            set_rates(optimizer, factors[step])
            rows = order[step * cfg.batch_size:(step + 1) * cfg.batch_size]
            take_step(rows)
            bar.update(len(rows))
            state["step"] = step + 1
            # of several processes each looks at the same steps, since a look is a meeting
            if state["step"] % look_steps == 0 or state["step"] == steps or (stop.noted and distributed.get_world_size() == 1):
                bar.set_postfix(loss=f"{take_step.look(epoch):.3f}", refresh=False)
                run.require_few_overflows((epoch - 1) * steps + state["step"])
                if state["step"] < steps and distributed.any_rank(stop.noted):
                    return None
                if state["step"] < steps and run.due():
                    run.save()
    return {name: peak * sum(factors) / steps for name, peak in group_rates(optimizer, "peak").items()}


def generator(seed, epoch):
    """The generator of the order of rows in one epoch."""
    return torch.Generator().manual_seed(seed * 1_000_003 + epoch)


def main(cfg):
    check_settings(cfg)
    if cfg.inputs in BLIND_OUTPUT_DIRS and cfg.output_dir == Config.output_dir:
        cfg = dataclasses.replace(cfg, output_dir=BLIND_OUTPUT_DIRS[cfg.inputs])
        print(f"--inputs {cfg.inputs}: writing to {cfg.output_dir}, since {Config.output_dir} is for the model of both inputs")
    precision = Precision(cfg.device, cfg.amp, cfg.capture)
    print(f"computing on {precision}")
    distributed.init_process_group(precision.device)
    with only_run_in(cfg.output_dir):
        rows = read_trainable_rows(cfg.data_dir)
        encoders = load_encoders(cfg.clip_model, cfg.clip_pretrained, cfg.gpt2_model)
        check_question_length(cfg, encoders.question.gpt2.config.n_positions)
        pixels = decode_images(data_folder(cfg.data_dir), rows["image_path"], encoders.image, cfg.cache_dir, cfg.workers,
                                 cfg.picture_decoder)
        rows = pixels.readable(rows)
        vocab = Vocab.build(training_answers(rows_of_split(rows, "train"), cfg.answer_sampling), cfg.min_word_freq)
        print(f"vocabulary: {len(vocab)} words")

        torch.manual_seed(cfg.seed)
        sizes = {name: getattr(cfg, name) for name in FIXED}
        model = build_model(encoders, len(vocab), sizes).to(precision.device)
        train_set, val_set = make_datasets(model, encoders, pixels, rows, vocab, sizes, cfg, precision)
        names = {name: getattr(cfg, name) for name in ("clip_model", "clip_pretrained", "gpt2_model")}
        identity = {
            "stage": "feature extraction", "vocab": vocab.words, "sizes": sizes, "settings": dataclasses.asdict(cfg),
            "data": data_hashes(train_set, val_set, pixels), "encoders": {**names, "fingerprints": encoders.fingerprints()},
            "cut": {"clip_layers": 0, "gpt2_layers": 0}}
        fit(model, train_set, val_set, {"head": cfg.learning_rate}, cfg, precision, identity)


def read_trainable_rows(data_dir):
    """All rows of `data_dir`. Raises ValueError, before minutes of encoding, where none are for training or validation."""
    rows = read_rows(data_dir)
    for split in ("train", "val"):
        rows_of_split(rows, split)
    return rows


def check_question_length(cfg, positions):
    """Raise ValueError where questions may be longer than GPT-2's `positions`."""
    if cfg.question_max_len > positions:
        raise ValueError(f"--question-max-len {cfg.question_max_len} is more than the {positions} positions of "
                         f"{cfg.gpt2_model}")


def make_datasets(model, encoders, pixels, rows, vocab, sizes, cfg, precision):
    """The training and the validation set of `rows` at the model's cut; prints what lengths and vocabulary cost."""
    if cfg.compile:
        model.compile_blocks()
    parts = [rows_of_split(rows, split) for split in ("train", "val")]
    for part in parts:
        report_answers(part, vocab, sizes["answer_max_len"])
    # the test split's questions too, so that test.py finds them stored
    store = build_store(model, encoders, pixels, rows["question"], sizes["question_max_len"], cfg.cache_dir, precision)
    train_rows, val_rows = parts
    return (VQADataset(train_rows, vocab, sizes["answer_max_len"], store, sizes["answer_sampling"]),
            VQADataset(val_rows, vocab, sizes["answer_max_len"], store))


if __name__ == "__main__":
    settings.run(main, Config)
