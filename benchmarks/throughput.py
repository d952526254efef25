"""Measures speed beside a plain loop of the same model (plain_loop.py) and beside a limit, all in one run.

Generates COCO-sized images, questions, and encoders of real size with random weights (--tiny: the demo's encoders). Measures
decoding, encoding, training steps of both stages, answering, start-up, and whole trainings. Reads nothing else. Prints a
table; writes throughput.json and throughput.log into --output-dir. About three minutes on two cores, one with --tiny.
"""
import contextlib
import copy
import itertools
import multiprocessing
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are local

from common import settings  # first: before torch

# isort: split
import torch

import fine_tune
import train
from benchmarks.inputs import ANSWER_WORDS, ROOT, SEED, write_data, write_encoders
from benchmarks.plain_loop import PlainRows
from benchmarks.timing import count_operations, describe_machine, measure_rate, run_process
from common.device import Precision
from common.files import write_json
from evaluation.generation import answer_dataset
from features.encoders import load_encoders
from features.pixels import available_cores, decode_image, decode_images
from features.store import ENCODE_BATCH, encode_images, encode_questions, tokenize_questions
from model import ModelConfig, VQAModel
from preprocess import build_datasets, read_rows
from training.optimizer import make_optimizer, set_learning_rates
from training.step import evaluate, train_step
from vocab import SPECIALS, Vocab

IMAGES, BATCH_SIZES = {"cpu": 256, "cuda": 8_300}, {"cpu": (8, 32), "cuda": (32, 256)}
LARGE_BATCH = {"cpu": 32, "cuda": 1_024}  # for the limit of encoding
ANSWER_BATCH = 2_048  # as in test.py
START_UP_IMAGES = 10
READY = "epoch 0:"  # train.py prints this line before the first step
# what train.py imports before it does anything
IMPORTS = ("import open_clip, pandas, torch, torchvision, tqdm, tyro; from transformers import AutoTokenizer, GPT2Model; "
           f"print({READY!r}, flush=True)")


@dataclass
class Config:
    output_dir: str = "benchmarks/results"
    """folder for throughput.json and throughput.log"""
    images: int = 0
    """number of images, each with about 1.15 questions; 0 = 256 on the CPU, 8,300 on CUDA"""
    epochs: int = 10
    """of each stage, in whole trainings"""
    seconds: float = 1.0
    """least duration of a measurement"""
    tiny: bool = False
    """the demo's encoders instead of CLIP ViT-B/32 and distilgpt2"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""


@dataclass(frozen=True)
class Stage:
    name: str
    cfg: object  # the script's default Config
    learning_rates: dict
    clip_layers: int = 0
    gpt2_layers: int = 0


STAGES = (
    Stage("stage 1", train.Config(), {"head": train.Config.learning_rate}),
    Stage("stage 2", fine_tune.Config(), {"head": fine_tune.Config.learning_rate, "clip": fine_tune.Config.clip_learning_rate,
                                          "gpt2": fine_tune.Config.gpt2_learning_rate},
          fine_tune.Config.clip_layers, fine_tune.Config.gpt2_layers))


def main(cfg):
    precision = Precision(cfg.device)
    cfg.images = cfg.images or IMAGES[precision.device.type]
    settings.check_ranges(cfg, epochs=(1, 1_000), seconds=(1e-3, 1e3), images=(BATCH_SIZES[precision.device.type][-1], 10**6))
    folder = Path(cfg.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with (TemporaryDirectory(prefix="throughput.", dir=folder) as work, open(folder / "throughput.log", "w") as log,
          contextlib.redirect_stdout(log), contextlib.redirect_stderr(log)):
        content = measure(cfg, precision, Path(work))
    write_json(folder / "throughput.json", content)
    print_report(content)
    print(f"\nnumbers {folder / 'throughput.json'}")


def measure(cfg, precision, work):
    """The content of throughput.json."""
    report_progress("generating inputs")
    bench = Bench(cfg, precision, work)
    machine = describe_machine(precision)
    report_progress("decoding and encoding")
    rows, trainings = [decoding_row(bench), *encoding_rows(bench)], []
    for stage in STAGES:
        report_progress(stage.name)
        stage_rows, training = measure_stage(bench, stage, machine["matrix_tflops"] * 1e12)
        rows += stage_rows
        trainings.append(training)
    report_progress("start-up")
    return {"machine": machine, "inputs": bench.description, "rows": rows, "trainings": trainings,
            "times_of_float32": times_of_float32(bench), "start_up": measure_start_up(bench)}


def report_progress(part):
    print(f"{time.strftime('%H:%M:%S')} {part}", file=sys.__stdout__, flush=True)  # sys.stdout is the log


def make_row(name, unit, ours, plain, limit, limit_is):
    """One line of the table: three rates, and how many `times` faster than the plain loop, and the `share` of the limit."""
    return {"name": name, "unit": unit, "ours": ours, "plain": plain, "times": ours / plain, "limit": limit,
            "share": ours / limit, "limit_is": limit_is}


class Bench:
    """Inputs and settings of a run, and the models and datasets that are made from them."""

    def __init__(self, cfg, precision, work):
        self.cfg, self.precision, self.work, self.data_dir = cfg, precision, work, work / "data"
        self.workers, self.batch_sizes = available_cores(), BATCH_SIZES[precision.device.type]
        self.paths = write_data(self.data_dir, cfg.images)
        self.clip_model, self.gpt2_model = write_encoders(work / "encoders", cfg.tiny)
        self.encoders = load_encoders(self.clip_model, "", self.gpt2_model)
        self.rows = read_rows(self.data_dir).assign(split="train")  # one dataset of all rows
        self.vocab = Vocab([*SPECIALS, *ANSWER_WORDS])
        num_bytes = sum((self.data_dir / path).stat().st_size for path in self.paths)
        self.description = {"images": cfg.images, "questions": len(self.rows), "bytes_per_image": num_bytes // cfg.images,
                            "encoders": "the demo's" if cfg.tiny else "CLIP ViT-B/32 and distilgpt2, random weights"}

    def model(self, stage, precision=None):
        """A new VQAModel at the stage's freeze boundary, with its own copy of the encoders."""
        torch.manual_seed(SEED)
        encoders = copy.deepcopy(self.encoders)
        model = VQAModel(encoders.image.visual, encoders.question.gpt2, len(self.vocab), ModelConfig())
        model.unfreeze(stage.clip_layers, stage.gpt2_layers)
        return model.place(precision or self.precision)

    def dataset(self, model):
        """The VQADataset of all rows, decoded and encoded into an empty cache."""
        cfg = train.Config(cache_dir=str(self.work / f"cache-{time.time_ns()}"), workers=self.workers)
        datasets = build_datasets(model, self.encoders, self.vocab, self.rows, self.data_dir, cfg, self.precision, ["train"])
        return datasets["train"]

    def plain_rows(self, model, count=None):
        """The same rows, or the first `count` of them, for the plain loop."""
        return PlainRows(self.rows[:count], self.vocab, model, self.encoders, self.data_dir, self.precision)

    def rate(self, count, work):
        """`count` per second of `work`."""
        return measure_rate(count, work, self.cfg.seconds)


def decoding_row(bench):
    """Images/s of features.pixels.decode_images, with worker processes and the file that it writes."""
    def decode():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            decode_images(bench.data_dir, bench.paths, bench.encoders.image, cache_dir, workers)

    workers, few, files = bench.workers, bench.paths[:32], [bench.data_dir / path for path in bench.paths]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        decode_part = partial(decode_all, bench.encoders.image.resize)
        parts = [files[number::workers] for number in range(workers)]
        limit = bench.rate(len(files), lambda: list(pool.map(decode_part, parts)))
    return make_row(f"decode, {workers} workers", "images/s", bench.rate(len(files), decode),
                    bench.rate(len(few), lambda: bench.plain_rows(None).decode(few)),
                    limit, f"the decoder alone in {workers} processes")


def decode_all(resize, files):
    torch.set_num_threads(1)  # as in the worker processes of torch's DataLoader
    for path in files:
        decode_image(path, resize)


def encoding_rows(bench):
    """Images/s and questions/s of encoding for stage 1: from decoded images, and from texts, to stored features."""
    model, texts = bench.model(STAGES[0]), sorted(set(bench.rows["question"]))
    plain, small, large = bench.plain_rows(model), bench.batch_sizes[-1], LARGE_BATCH[bench.precision.device.type]
    pixels = decode_images(bench.data_dir, bench.paths, bench.encoders.image, bench.work / "pixels", bench.workers)
    batch = torch.from_numpy(pixels.pixels[:large].copy())

    def encode_all_images():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            encode_images(model, bench.encoders.image, pixels, cache_dir, bench.precision)

    def encode_all_questions():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            ids, lengths = tokenize_questions(bench.encoders.question.tokenizer, texts, model.config.question_max_len)
            encode_questions(model, bench.encoders.question, ids, lengths, cache_dir, bench.precision)

    limit_is = f"the encoder alone, batch {large}"
    return [make_row("encode images for stage 1", "images/s", bench.rate(len(bench.paths), encode_all_images),
                     bench.rate(len(batch[:small]), lambda: plain.encode_images(batch[:small])),
                     bench.rate(len(batch), lambda: plain.encode_images(batch)), limit_is),
            make_row("encode questions for stage 1", "questions/s", bench.rate(len(texts), encode_all_questions),
                     bench.rate(len(texts[:small]), lambda: plain.encode_questions(texts[:small])),
                     bench.rate(len(texts[:large]), lambda: plain.encode_questions(texts[:large])), limit_is)]


def times_of_float32(bench):
    """How many times as many images per second the frozen image encoder encodes with --amp auto as with --amp off."""
    device, rates = bench.precision.device, []
    images = torch.randn(ENCODE_BATCH[device.type], 3, *bench.encoders.image.visual.image_size, device=device)
    for amp in ("auto", "off"):
        precision = Precision(bench.cfg.device, amp)
        model = bench.model(STAGES[0], precision)
        with precision.autocast():
            rates.append(bench.rate(len(images), partial(model.encode_image_frozen, images)))
    return rates[0] / rates[1]


def measure_stage(bench, stage, matrix_rate):
    """(rows of the table, comparison of a whole training). `matrix_rate`: operations per second of a matrix product."""
    model, rows, started = bench.model(stage), [], time.perf_counter()
    dataset, plain_rows = bench.dataset(model), bench.plain_rows(model)
    once_s = time.perf_counter() - started
    for size in bench.batch_sizes:
        step, plain_step = (training_step(bench, stage, model, endless_batches(stage, source, size))
                            for source in (dataset, plain_rows))
        cached, plain = bench.rate(size, step), bench.rate(size, plain_step)
        if stage.clip_layers:
            operations = count_operations(step) / size
            limit = matrix_rate / operations
            limit_is = f"{operations / 1e9:.3g} GFLOP per sample at the rate of a matrix product"
        else:
            batch = next(endless_batches(stage, dataset, size))
            limit = bench.rate(size, training_step(bench, stage, model, itertools.repeat(batch)))
            limit_is = "the step alone, always on the same batch"
        rows.append(make_row(f"{stage.name}, batch {size}", "samples/s", cached, plain, limit, limit_is))
    rows.append(answering_row(bench, stage, model, dataset, bench.plain_rows(model, size)))
    # a whole training, at the last batch size
    samples = bench.cfg.epochs * len(bench.rows)
    images, questions = bench.paths[:size], sorted(set(bench.rows["question"]))
    once = (count_operations(lambda: plain_rows.encode_images(plain_rows.decode(images))) / size * len(bench.paths)
            + count_operations(lambda: plain_rows.encode_questions(questions[:size])) / size * len(questions))
    bound = samples * count_operations(plain_step) / (size * once + samples * count_operations(step))
    losses = [evaluate(model, source, size, bench.precision, torch.arange(size)) for source in (dataset, plain_rows)]
    return rows, {"name": f"{stage.name}, {bench.cfg.epochs} epochs, batch {size}", "once_s": once_s,
                  "ours_s": once_s + samples / cached, "plain_s": samples / plain, "bound": bound,
                  "loss_ours": losses[0], "loss_plain": losses[1]}


def endless_batches(stage, dataset, batch_size):
    """Full batches of `dataset`, epoch after epoch, in the order of the stage's training."""
    draw = train.generator(SEED, 1)
    while True:
        order = dataset.epoch_order(draw, stage.clip_layers > 0)
        yield from (dataset.batch(rows) for rows in order.split(batch_size) if len(rows) == batch_size)


def training_step(bench, stage, model, batches):
    """A function that trains on the next batch of `batches`."""
    optimizer, scaler = make_optimizer(model, stage.learning_rates, stage.cfg.weight_decay), bench.precision.scaler()
    set_learning_rates(optimizer, 1.0)
    model.train()
    return lambda: train_step(model, next(batches), optimizer, scaler, bench.precision, stage.cfg)


def answering_row(bench, stage, model, dataset, few_plain_rows):
    """Questions/s of greedy answers to all questions, as texts."""
    batch = dataset.batch(torch.arange(min(ANSWER_BATCH, len(dataset))))

    def generate():
        with torch.no_grad(), bench.precision.autocast():
            model.generate(batch)

    cached, plain = (bench.rate(len(source), partial(answer_dataset, model, source, bench.precision, ANSWER_BATCH))
                     for source in (dataset, few_plain_rows))
    return make_row(f"answer from the cache of {stage.name}", "questions/s", cached, plain,
                    bench.rate(len(batch["image_row"]), generate), "the model alone on one batch, without texts")


def measure_start_up(bench):
    """Seconds of train.py until its line of epoch 0, on a few images from the cache; and of its imports alone."""
    write_data(bench.work / "few", START_UP_IMAGES)
    command = [sys.executable, ROOT / "train.py", "--data-dir", bench.work / "few", "--cache-dir", bench.work / "few_cache",
               "--clip-model", bench.clip_model, "--gpt2-model", bench.gpt2_model, "--device", bench.cfg.device,
               "--min-word-freq", 1, "--epochs", 1]
    # of two runs the first fills the caches
    train_s = [run_process([*command, "--output-dir", name], bench.work, READY).ready_s for name in ("first", "second")][1]
    imports_s = [run_process([sys.executable, "-c", IMPORTS], bench.work, READY).ready_s for _ in range(2)][1]
    return {"train_s": train_s, "imports_s": imports_s}


def print_report(content):
    """Print the content of throughput.json."""
    for part in ("machine", "inputs"):
        print(f"{part}: " + ", ".join(f"{name} {short(value)}" for name, value in content[part].items()))
    print(f"\n{'':34} {'ours':>7} {'':11} {'plain loop':>10} {'times':>6} {'limit':>8} {'share':>6}")
    for row in content["rows"]:
        print(f"{row['name']:34} {short(row['ours']):>7} {row['unit']:11} {short(row['plain']):>10} {short(row['times']):>6} "
              f"{short(row['limit']):>8} {row['share']:>6.2f}  {row['limit_is']}")
    print(f"\nthe frozen image encoder with --amp auto: {content['times_of_float32']:.2f} times as fast as with --amp off")
    print("\nwhole trainings: ours is what is done once, as timed, and all epochs at the measured rate;\n"
          "bound: how many times fewer operations are needed, by count")
    for item in content["trainings"]:
        print(f"{item['name']}: {item['plain_s'] / item['ours_s']:.2f} times faster, {item['ours_s']:.1f} s "
              f"({item['once_s']:.1f} s of them once) against {item['plain_s']:.1f} s, bound {item['bound']:.2f}; "
              f"loss of the same rows {item['loss_ours']:.7f}, plain loop {item['loss_plain']:.7f}")
    print(f"start-up of train.py to epoch 0: {content['start_up']['train_s']:.1f} s; "
          f"its imports alone: {content['start_up']['imports_s']:.1f} s")


def short(value):
    """A value as text; floats with three digits or more."""
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    settings.run(main, Config)
