"""Measures speed beside a plain loop of the same model (plain_loop.py) and beside a ceiling, all in one run.

Generates COCO-sized images, questions, and encoders of real size with random weights (--tiny: the demo's encoders). Measures
decoding, encoding, training steps of both stages, answering, start-up, and whole trainings. Reads nothing else. Prints a
table; writes throughput.json and throughput.log into --output-dir. About seven minutes on two cores, one with --tiny.
"""
import contextlib
import copy
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are local

import torch

import fine_tune
import train
from benchmarks.inputs import ANSWER_WORDS, ROOT, write_data, write_encoders
from benchmarks.operations import operations_ratio, step_operations
from benchmarks.plain_loop import PlainRows
from benchmarks.timing import describe_machine, run_process, time_median
from common import settings
from common.device import Precision
from common.files import write_json
from evaluation.generation import answer_dataset
from features.encoders import load_encoders
from features.pixels import available_cores, decode_image, decode_images
from features.store import encode_images, encode_questions, tokenize_questions
from model import ModelConfig, VQAModel
from preprocess import build_datasets, read_rows
from training.optimizer import make_optimizer, set_learning_rates
from training.step import evaluate, train_step
from vocab import SPECIALS, Vocab

IMAGES, BATCH_SIZES = {"cpu": 256, "cuda": 8_300}, {"cpu": (8, 32), "cuda": (32, 256)}
LARGE_BATCH = {"cpu": 32, "cuda": 1_024}  # for the ceiling of encoding
ANSWER_BATCH = 2_048  # as in test.py
REPEAT_S = {"real": 0.5, "tiny": 0.1}  # least duration of a measurement
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
    batch_sizes: tuple[int, ...] = ()
    """of training steps; whole trainings use the last one; none = 8 32 on the CPU, 32 256 on CUDA"""
    epochs: int = 10
    """of each stage, in whole trainings"""
    repeats: int = 3
    """measurements per median"""
    tiny: bool = False
    """the demo's encoders instead of CLIP ViT-B/32 and distilgpt2"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    workers: int = 0
    """processes that decode images; 0 = one per core"""
    seed: int = 42
    """of images, texts and weights"""


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
    device = precision.device.type
    cfg.images, cfg.batch_sizes = cfg.images or IMAGES[device], cfg.batch_sizes or BATCH_SIZES[device]
    cfg.workers = cfg.workers or available_cores()
    settings.check_ranges(cfg, epochs=(1, 1_000), repeats=(1, 1_000), workers=(1, 1_000), images=(max(cfg.batch_sizes), 10**6))
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
        rows, trainings = rows + stage_rows, [*trainings, training]
    report_progress("start-up")
    return {"machine": machine, "inputs": bench.description, "rows": rows, "trainings": trainings,
            "start_up": measure_start_up(bench)}


def report_progress(part):
    print(f"{time.strftime('%H:%M:%S')} {part}", file=sys.__stdout__, flush=True)  # sys.stdout is the log


def make_row(name, unit, ours, plain, ceiling, ceiling_is):
    """One line of the table: three rates, and how many `times` faster than the plain loop, and the `share` of the ceiling."""
    return {"name": name, "unit": unit, "ours": ours, "plain": plain, "times": ours / plain, "ceiling": ceiling,
            "share": ours / ceiling, "ceiling_is": ceiling_is}


class Bench:
    """Inputs and settings of a run, and the models and datasets that are made from them."""

    def __init__(self, cfg, precision, work):
        self.cfg, self.precision, self.work, self.data_dir = cfg, precision, work, work / "data"
        self.paths = write_data(self.data_dir, cfg.images, cfg.seed)
        self.clip_model, self.gpt2_model = write_encoders(work / "encoders", cfg.tiny, cfg.seed)
        self.encoders = load_encoders(self.clip_model, "", self.gpt2_model)
        self.rows = read_rows(self.data_dir).assign(split="train")  # one dataset of all rows
        self.vocab = Vocab([*SPECIALS, *ANSWER_WORDS])
        num_bytes = sum((self.data_dir / path).stat().st_size for path in self.paths)
        self.description = {"images": cfg.images, "questions": len(self.rows), "bytes_per_image": num_bytes // cfg.images,
                            "encoders": "the demo's" if cfg.tiny else "CLIP ViT-B/32 and distilgpt2, random weights"}

    def model(self, stage):
        """A new VQAModel at the stage's freeze boundary, with its own copy of the encoders."""
        torch.manual_seed(self.cfg.seed)
        encoders = copy.deepcopy(self.encoders)
        model = VQAModel(encoders.image.visual, encoders.question.gpt2, len(self.vocab), ModelConfig())
        model.unfreeze(stage.clip_layers, stage.gpt2_layers)
        return model.to(self.precision.device)

    def dataset(self, model):
        """The VQADataset of all rows, decoded and encoded into an empty cache."""
        cfg = train.Config(cache_dir=str(self.work / f"cache-{time.time_ns()}"), workers=self.cfg.workers)
        datasets = build_datasets(model, self.encoders, self.vocab, self.rows, self.data_dir, cfg, self.precision, ["train"])
        return datasets["train"]

    def plain_rows(self, model, count=None):
        """The same rows, or the first `count` of them, for the plain loop."""
        return PlainRows(self.rows[:count], self.vocab, model, self.encoders, self.data_dir, self.precision)

    def rate(self, count, work):
        """`count` per second of `work`."""
        return count / time_median(work, self.precision.device, self.cfg.repeats, REPEAT_S["tiny" if self.cfg.tiny else "real"])


def decoding_row(bench):
    """Images/s of features.pixels.decode_images, with worker processes and the file that it writes."""
    def decode():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            decode_images(bench.data_dir, bench.paths, bench.encoders.image, cache_dir, workers)

    workers, few, files = bench.cfg.workers, bench.paths[:32], [bench.data_dir / path for path in bench.paths]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        decode_part = partial(decode_all, bench.encoders.image.resize)
        parts = [files[number::workers] for number in range(workers)]
        ceiling = bench.rate(len(files), lambda: list(pool.map(decode_part, parts)))
    return make_row(f"decode, {workers} workers", "images/s", bench.rate(len(files), decode),
                    bench.rate(len(few), lambda: bench.plain_rows(None).decode(few)),
                    ceiling, f"the decoder alone in {workers} processes")


def decode_all(resize, files):
    torch.set_num_threads(1)  # as in the worker processes of torch's DataLoader
    for path in files:
        decode_image(path, resize)


def encoding_rows(bench):
    """Images/s and questions/s of encoding for stage 1: from decoded images, and from texts, to stored features."""
    model, texts = bench.model(STAGES[0]), sorted(set(bench.rows["question"]))
    plain, small, large = bench.plain_rows(model), max(bench.cfg.batch_sizes), LARGE_BATCH[bench.precision.device.type]
    pixels = decode_images(bench.data_dir, bench.paths, bench.encoders.image, bench.work / "pixels", bench.cfg.workers)
    batch = torch.from_numpy(pixels.pixels[:large].copy())

    def encode_all_images():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            encode_images(model, bench.encoders.image, pixels, cache_dir, bench.precision)

    def encode_all_questions():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            ids, lengths = tokenize_questions(bench.encoders.question.tokenizer, texts, model.config.question_max_len)
            encode_questions(model, bench.encoders.question, ids, lengths, cache_dir, bench.precision)

    ceiling_is = f"the encoder alone, batch {large}"
    return [make_row("encode images for stage 1", "images/s", bench.rate(len(bench.paths), encode_all_images),
                     bench.rate(len(batch[:small]), lambda: plain.encode_images(batch[:small])),
                     bench.rate(len(batch), lambda: plain.encode_images(batch)), ceiling_is),
            make_row("encode questions for stage 1", "questions/s", bench.rate(len(texts), encode_all_questions),
                     bench.rate(len(texts[:small]), lambda: plain.encode_questions(texts[:small])),
                     bench.rate(len(texts[:large]), lambda: plain.encode_questions(texts[:large])), ceiling_is)]


def measure_stage(bench, stage, matrix_rate):
    """(rows of the table, comparison of a whole training). `matrix_rate`: operations per second of a matrix product."""
    model, rows, started = bench.model(stage), [], time.perf_counter()
    dataset, plain_rows = bench.dataset(model), bench.plain_rows(model)
    once_s = time.perf_counter() - started
    for size in bench.cfg.batch_sizes:
        batches, plain_batches = (endless_batches(bench, stage, source, size) for source in (dataset, plain_rows))
        cached = bench.rate(size, training_step(bench, stage, model, batches))
        plain = bench.rate(size, training_step(bench, stage, model, plain_batches))
        batch = next(batches)
        if stage.clip_layers:
            operations = step_operations(model, batch) / size
            ceiling = matrix_rate / operations
            ceiling_is = f"{operations / 1e9:.3g} GFLOP per sample at the rate of a matrix product"
        else:
            ceiling = bench.rate(size, training_step(bench, stage, model, itertools.repeat(batch)))
            ceiling_is = "the step alone, always on the same batch"
        rows.append(make_row(f"{stage.name}, batch {size}", "samples/s", cached, plain, ceiling, ceiling_is))
    # a whole training, at the last batch size
    losses = [evaluate(model, source, size, bench.precision, torch.arange(size)) for source in (dataset, plain_rows)]
    rows.append(answering_row(bench, stage, model, dataset, bench.plain_rows(model, size)))
    samples = bench.cfg.epochs * len(bench.rows)
    bound = operations_ratio(model, bench.rows, bench.encoders.question.tokenizer, bench.cfg.epochs)
    return rows, {"name": f"{stage.name}, {bench.cfg.epochs} epochs, batch {size}", "once_s": once_s,
                  "ours_s": once_s + samples / cached, "plain_s": samples / plain, "bound": bound,
                  "loss_ours": losses[0], "loss_plain": losses[1]}


def endless_batches(bench, stage, dataset, batch_size):
    """Full batches of `dataset`, epoch after epoch, in the order of the stage's training."""
    draw = train.generator(bench.cfg.seed, 1)
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
    """Median seconds of train.py until its line of epoch 0, on a few images from the cache; and of its imports alone."""
    write_data(bench.work / "few", START_UP_IMAGES, bench.cfg.seed)
    command = [sys.executable, ROOT / "train.py", "--data-dir", bench.work / "few", "--cache-dir", bench.work / "few_cache",
               "--clip-model", bench.clip_model, "--gpt2-model", bench.gpt2_model, "--device", bench.cfg.device,
               "--min-word-freq", 1, "--epochs", 1]
    # the first run of each fills the caches
    runs = [run_process([*command, "--output-dir", f"run_{number}"], bench.work, READY)
            for number in range(bench.cfg.repeats + 1)]
    imports = [run_process([sys.executable, "-c", IMPORTS], bench.work, READY) for _ in range(bench.cfg.repeats + 1)]
    return {"train_s": statistics.median(run.ready_s for run in runs[1:]),
            "imports_s": statistics.median(run.ready_s for run in imports[1:])}


def print_report(content):
    """Print the content of throughput.json."""
    for part in ("machine", "inputs"):
        print(f"{part}: " + ", ".join(f"{name} {short(value)}" for name, value in content[part].items()))
    print(f"\n{'':34} {'ours':>7} {'':11} {'plain loop':>10} {'times':>6} {'ceiling':>8} {'share':>6}")
    for row in content["rows"]:
        print(f"{row['name']:34} {short(row['ours']):>7} {row['unit']:11} {short(row['plain']):>10} {short(row['times']):>6} "
              f"{short(row['ceiling']):>8} {row['share']:>6.2f}  {row['ceiling_is']}")
    print("\nwhole trainings: ours is what is done once, as timed, and all epochs at the measured rate;\n"
          "bound: how many times fewer operations the encoders need, by count")
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
