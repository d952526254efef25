"""Measures speed beside a plain loop of the same model (plain_loop.py) and beside a ceiling, all in one run.

Generates COCO-sized images, questions, and encoders of real size with random weights (--tiny: the demo's encoders). Measures
decoding, encoding, training steps of both stages, answering, start-up, and ten epochs of each stage. Reads nothing else.
Prints a table; writes throughput.json and throughput.log into --output-dir. About seven minutes on two cores, one with --tiny.
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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are local

import torch

import fine_tune
import train
from benchmarks.inputs import ANSWER_WORDS, write_data, write_encoders
from benchmarks.operations import operations_ratio, step_operations
from benchmarks.plain_loop import PlainRows
from benchmarks.timing import Clock, describe_machine, matrix_rate, run_process
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
ANSWER_BATCH = 2_048  # as in test.py
LARGE_BATCH = {"cpu": 32, "cuda": 1_024}  # for the ceiling of encoding
START_UP_IMAGES = 10
# all that train.py imports before it does anything
IMPORTS = "import open_clip, pandas, torch, torchvision, tqdm, tyro; from transformers import AutoTokenizer, GPT2Model"


@dataclass
class Config:
    output_dir: str = "benchmarks/results"
    """folder for throughput.json and throughput.log"""
    images: int = 0
    """number of images; each has about 1.15 questions; 0 = 256 on the CPU, 8,300 on CUDA"""
    batch_sizes: tuple[int, ...] = ()
    """of training steps; ten epochs are computed for the last one; none = 8 32 on the CPU, 32 256 on CUDA"""
    epochs: int = 10
    """of each stage, in the comparison of whole trainings"""
    repeats: int = 3
    """measurements per median"""
    repeat_s: float = 0.5
    """least duration of a measurement, seconds"""
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


@dataclass
class Row:
    """One line of the table: a measured rate (or seconds), the plain loop's, and a ceiling. None: not measured."""

    name: str
    value: float
    unit: str
    plain: float | None
    ceiling: float | None
    ceiling_is: str


def main(cfg):
    precision = Precision(cfg.device)
    device = precision.device.type
    cfg.images, cfg.batch_sizes = cfg.images or IMAGES[device], cfg.batch_sizes or BATCH_SIZES[device]
    cfg.workers = cfg.workers or available_cores()
    for name in ("epochs", "repeats", "workers"):
        settings.check_range(cfg, name, low=1, high=1_000)
    settings.check_range(cfg, "images", low=max(cfg.batch_sizes))
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
    machine = describe_machine(precision) | {"matrix_tflops": matrix_rate(bench.clock, precision.dtype) / 1e12}
    report_progress("decoding and encoding")
    rows, trainings = [decoding_row(bench), *encoding_rows(bench)], []
    for stage in STAGES:
        report_progress(stage.name)
        stage_rows, training = measure_stage(bench, stage, machine["matrix_tflops"] * 1e12)
        rows, trainings = rows + stage_rows, [*trainings, training]
    report_progress("start-up")
    rows.append(start_up_row(bench))
    inputs = {"images": cfg.images, "questions": len(bench.rows), "bytes_per_image": round(bench.bytes_per_image),
              "encoders": "the demo's" if cfg.tiny else "CLIP ViT-B/32 and distilgpt2, random weights"}
    return {"machine": machine, "inputs": inputs, "settings": asdict(cfg), "rows": [entry_of(row) for row in rows],
            "trainings": trainings}


def report_progress(part):
    print(f"{time.strftime('%H:%M:%S')} {part}", file=sys.__stdout__, flush=True)  # sys.stdout is the log


class Bench:
    """Inputs and settings of a run, and the models and datasets that are made from them."""

    def __init__(self, cfg, precision, work):
        self.cfg, self.precision, self.work, self.data_dir = cfg, precision, work, work / "data"
        self.clock = Clock(precision.device, cfg.repeats, cfg.repeat_s)
        self.paths = write_data(self.data_dir, cfg.images, cfg.seed)
        self.bytes_per_image = sum((self.data_dir / path).stat().st_size for path in self.paths) / len(self.paths)
        self.clip_model, self.gpt2_model = write_encoders(work / "encoders", cfg.tiny, cfg.seed)
        self.encoders = load_encoders(self.clip_model, "", self.gpt2_model)
        self.rows = read_rows(self.data_dir).assign(split="train")  # one dataset of all rows
        self.vocab = Vocab([*SPECIALS, *ANSWER_WORDS])

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
        return build_datasets(model, self.encoders, self.vocab, self.rows, self.data_dir, cfg, self.precision, ("train",))["train"]

    def plain_rows(self, model, count=None):
        """The same rows, or the first `count` of them, for the plain loop."""
        return PlainRows(self.rows[:count], self.vocab, model, self.encoders, self.data_dir, self.precision)

    def bound(self, model):
        """How many times fewer operations than the plain loop the encoders need over all epochs, by count."""
        lengths = [len(ids) for ids in self.encoders.question.tokenizer(list(self.rows["question"]))["input_ids"]]
        image_tokens = self.encoders.image.visual.positional_embedding.shape[0]
        return operations_ratio(model, self.rows, image_tokens, statistics.mean(lengths), self.cfg.epochs)

    def rate(self, count, work, warm_up=1):
        """`count` per median second of `work`."""
        return count / self.clock.seconds(work, warm_up)


def decoding_row(bench):
    """Images/s of features.pixels.decode_images, with worker processes and the file that it writes."""
    def decode():
        with TemporaryDirectory(dir=bench.work) as cache_dir:
            decode_images(bench.data_dir, bench.paths, bench.encoders.image, cache_dir, workers)

    workers, plain = bench.cfg.workers, bench.plain_rows(None)
    few, files = bench.paths[:32], [bench.data_dir / path for path in bench.paths]
    chunks = [files[number::workers] for number in range(workers)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        decode_chunk = partial(decode_all, bench.encoders.image.resize)
        ceiling = bench.rate(len(files), lambda: list(pool.map(decode_chunk, chunks)))
    return Row(f"decode, {workers} workers", bench.rate(len(files), decode), "images/s",
               bench.rate(len(few), lambda: plain.decode(few)), ceiling, f"the decoder alone in {workers} processes")


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
    return [Row("encode images for stage 1", bench.rate(len(bench.paths), encode_all_images), "images/s",
                bench.rate(small, lambda: plain.encode_images(batch[:small])),
                bench.rate(len(batch), lambda: plain.encode_images(batch)), ceiling_is),
            Row("encode questions for stage 1", bench.rate(len(texts), encode_all_questions), "questions/s",
                bench.rate(small, lambda: plain.encode_questions(texts[:small])),
                bench.rate(len(texts[:large]), lambda: plain.encode_questions(texts[:large])), ceiling_is)]


def measure_stage(bench, stage, matrix_rate):
    """(rows of the table, comparison of a whole training as a dict). `matrix_rate`: operations per second."""
    model, datasets = bench.model(stage), []
    once_s = bench.clock.once(lambda: datasets.append(bench.dataset(model)))
    dataset, plain_rows, rows = datasets[0], bench.plain_rows(model), []
    for size in bench.cfg.batch_sizes:
        batches, plain_batches = (endless_batches(bench, stage, source, size) for source in (dataset, plain_rows))
        cached = bench.rate(size, training_step(bench, stage, model, batches))
        plain = bench.rate(size, training_step(bench, stage, model, plain_batches))
        batch = next(batches)
        if stage.clip_layers:
            operations = step_operations(model, batch) / size
            ceiling, ceiling_is = matrix_rate / operations, f"{operations / 1e9:.3g} GFLOP per sample at the rate of a matrix product"
        else:
            ceiling = bench.rate(size, training_step(bench, stage, model, itertools.repeat(batch)))
            ceiling_is = "the step alone, always on the same batch"
        rows.append(Row(f"{stage.name}, batch {size}", cached, "samples/s", plain, ceiling, ceiling_is))
    # `size`, `cached` and `plain` are those of the last batch size
    samples, order = bench.cfg.epochs * len(bench.rows), torch.arange(size)
    losses = [evaluate(model, source, size, bench.precision, order) for source in (dataset, plain_rows)]
    rows.append(answering_row(bench, stage, model, dataset, bench.plain_rows(model, size)))
    return rows, {"name": f"{stage.name}, {bench.cfg.epochs} epochs, batch {size}", "once_s": once_s,
                  "ours_s": once_s + samples / cached, "plain_s": samples / plain, "bound": bench.bound(model),
                  "loss_ours": losses[0], "loss_plain": losses[1]}


def endless_batches(bench, stage, dataset, batch_size):
    """Full batches of `dataset`, epoch after epoch, in the order of the stage's training."""
    draw = train.epoch_generator(bench.cfg.seed, 1)
    while True:
        order = dataset.epoch_order(draw, stage.clip_layers > 0)
        yield from (dataset.batch(rows) for rows in order.split(batch_size) if len(rows) == batch_size)


def training_step(bench, stage, model, batches):
    """A function that takes the next batch of `batches` and trains on it."""
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

    cached, plain = (bench.rate(len(source), lambda source=source: answer_dataset(model, source, bench.precision, ANSWER_BATCH))
                     for source in (dataset, few_plain_rows))
    return Row(f"answer from the cache of {stage.name}", cached, "questions/s", plain,
               bench.rate(len(batch["image_row"]), generate), "the model alone on one batch, without texts")


def start_up_row(bench):
    """Seconds from the start of train.py to its line of epoch 0, on a few images whose features are in the cache."""
    write_data(bench.work / "few", START_UP_IMAGES, bench.cfg.seed)
    command = [sys.executable, ROOT / "train.py", "--data-dir", bench.work / "few", "--cache-dir", bench.work / "few_cache",
               "--clip-model", bench.clip_model, "--gpt2-model", bench.gpt2_model, "--device", bench.cfg.device,
               "--min-word-freq", 1, "--epochs", 1]
    runs = [run_process([*command, "--output-dir", f"run_{number}"], bench.work, "epoch 0:")
            for number in range(bench.cfg.repeats + 1)]  # the first one fills the cache
    imports = [run_process([sys.executable, "-c", IMPORTS], bench.work) for _ in range(bench.cfg.repeats)]
    return Row("start-up of train.py, to epoch 0", statistics.median(run.ready_s for run in runs[1:]), "s", None,
               statistics.median(run.seconds for run in imports), "the imports alone")


def entry_of(row):
    """The row as a dict, with `times` (better than the plain loop) and `share` (of the ceiling). Seconds: less is better."""
    better = {name: None if other is None else other / row.value if row.unit == "s" else row.value / other
              for name, other in (("times", row.plain), ("share", row.ceiling))}
    return asdict(row) | better


def print_report(content):
    """Print the table and the comparison of whole trainings. `content`: as in throughput.json."""
    for part in ("machine", "inputs"):
        print(f"{part}: " + ", ".join(f"{name} {short(value)}" for name, value in content[part].items()))
    width = max(len(row["name"]) for row in content["rows"])
    print(f"\n{'':{width}} {'ours':>9} {'':11} {'plain loop':>10} {'times':>7} {'ceiling':>9} {'share':>6}")
    for row in content["rows"]:
        print(f"{row['name']:{width}} {short(row['value']):>9} {row['unit']:11} {short(row['plain']):>10} "
              f"{short(row['times']):>7} {short(row['ceiling']):>9} {short(row['share']):>6}  {row['ceiling_is']}")
    print("\nwhole trainings: ours is what is done once, as timed, and all epochs at the measured rate; bound: the ratio of the\n"
          "encoders' operations, by count, without decoding")
    for item in content["trainings"]:
        print(f"{item['name']}: {item['plain_s'] / item['ours_s']:.2f} times faster ({item['ours_s']:.1f} s, of which "
              f"{item['once_s']:.1f} s once, against {item['plain_s']:.1f} s), bound {item['bound']:.2f}; "
              f"loss on the same rows {item['loss_ours']:.7f}, plain loop {item['loss_plain']:.7f}")


def short(value):
    """A value for the table: floats with three or more digits, None as empty."""
    if value is None:
        return ""
    return (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}") if isinstance(value, float) else str(value)


if __name__ == "__main__":
    settings.run(main, Config)
