"""Measures how fast the project runs, beside a plain loop of the same model and the machine's ceiling, in one run.

Makes COCO-sized pictures, a mini data set, and encoders of real size with random weights (or --tiny ones); measures
decoding, encoding, both stages' steps, answering, start-up, memory, and the whole cold mini run of train.py, fine_tune.py
and test.py. Reads nothing. Prints a table; writes throughput.json, growth.png and throughput.log into --output-dir, and
keeps its inputs there. With real encoders it takes about a quarter of an hour on two slow cores, with --tiny under two minutes.
"""
import contextlib
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' modules lie one folder up
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are local

from benchmarks.clock import describe_machine, matrix_rate, own_peak_mb
from benchmarks.encoding import measure_encoding
from benchmarks.growth import measure_growth
from benchmarks.inputs import make_inputs
from benchmarks.report import Closing, Row, draw_growth, print_report
from benchmarks.scripts import cold_rows, measure_cold_runs, measure_start_up, plain_seconds
from benchmarks.training import measure_answering, measure_training
from benchmarks.workbench import FAIR_BATCH, STAGES, Workbench
from common import settings
from common.device import Precision
from common.files import write_json

PICTURES = {"cpu": 64, "cuda": 8_300}
DECODED = {"cpu": 512, "cuda": 8_300}
EXPECTED_ON_CPU = {"stage 1": 10, "stage 2": 1.7}  # times the plain loop over 10 epochs, with encoders of real size
EXPECTED_EPOCHS = 10


@dataclass
class Config:
    output_dir: str = "benchmarks/results"
    """where throughput.json, growth.png and the inputs go; what only the run needs lies there while it runs"""
    pictures: int = 0
    """pictures that are asked about, each about 1.15 questions, at least 32; 0 = 8,300 on CUDA, 64 on the CPU"""
    decoded: int = 0
    """pictures over which decoding alone is measured; 0 = 8,300 on CUDA, 512 on the CPU"""
    epochs: int = 10
    """of each stage, in the cold run and in what is said about a whole training"""
    repeats: int = 0
    """measurements that a median is of; 0 = 3, or 1 with --tiny"""
    tiny: bool = False
    """tiny encoders instead of CLIP ViT-B/32 and distilgpt2"""
    stage_1_batches: tuple[int, ...] = ()
    """further batch sizes of stage 1; none = 1024 4096 on CUDA, 64 on the CPU"""
    stage_2_batches: tuple[int, ...] = ()
    """further batch sizes of stage 2; none = 1024 2048 on CUDA"""
    compile: bool = True
    """on CUDA measure stage 2 with compiled blocks too, which takes some minutes"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    workers: int = 0
    """processes that decode pictures; 0 = one per core"""
    seed: int = 42
    """of pictures, texts and weights"""


def set_sizes(cfg, device):
    """Replace the zeros in `cfg` by what they stand for. Raises ValueError where a size is out of range."""
    cfg.pictures = cfg.pictures or PICTURES[device]
    cfg.decoded = cfg.decoded or DECODED[device]
    cfg.repeats = cfg.repeats or (1 if cfg.tiny else 3)
    settings.check_range(cfg, "pictures", low=FAIR_BATCH[device])
    for name in ("decoded", "epochs", "repeats"):
        settings.check_range(cfg, name, low=1)
    settings.check_range(cfg, "workers", low=0, high=256)
    settings.check_range(cfg, "seed", low=0, high=settings.MAX_SEED)
    for size in (*cfg.stage_1_batches, *cfg.stage_2_batches):
        if not 1 <= size <= cfg.pictures:
            raise ValueError(f"a batch of {size} is out of range: 1 to the number of --pictures, {cfg.pictures}")


def main(cfg):
    precision = Precision(cfg.device)
    set_sizes(cfg, precision.device.type)
    folder = Path(cfg.output_dir).resolve()
    tell(f"inputs, in {folder / 'inputs'}")
    inputs = make_inputs(folder / "inputs", cfg.pictures, cfg.decoded, cfg.tiny, cfg.seed)
    # the bars of parts that last a second, and what libraries warn of
    with TemporaryDirectory(prefix="work.", dir=folder) as work, open(folder / "throughput.log", "w") as log, \
            contextlib.redirect_stderr(log):
        content = measure(cfg, inputs, precision, work)
    print_report(content)
    write_json(folder / "throughput.json", content)
    draw_growth(content["growth"], cfg.epochs, folder / "growth.png")
    print(f"\nnumbers {folder / 'throughput.json'}, plot {folder / 'growth.png'}")


def measure(cfg, inputs, precision, work):
    """Everything that throughput.json holds."""
    bench = Workbench(inputs, precision, cfg, work)  # imports what the scripts import: none of them reads it from the disk
    tell("the cold mini run")
    cold = measure_cold_runs(inputs, cfg, precision, work)
    tell("matrix product")
    machine = describe_machine(precision) | {"matrix_tflops": matrix_rate(bench.clock, precision.dtype) / 1e12}
    tell("decoding and encoding")
    rows, parts = measure_encoding(bench)
    cached, plain, losses = {}, {}, {}
    for stage in STAGES:
        tell(f"training and answering, {stage.name}")
        stage_rows, cached[stage.name], plain[stage.name], losses[stage.name] = measure_training(
            bench, stage, machine["matrix_tflops"] * 1e12)
        answers = measure_answering(bench, stage)
        rows += [*stage_rows, answers]
    tell("start-up")
    rows += measure_start_up(bench, cfg)
    for title, runs in cold.items():
        rows += cold_rows(runs, title, plain_seconds(bench.rows, cfg.epochs, plain, answers.plain))
    tell("growth")
    growth = measure_growth(bench, cfg.epochs, plain, answers.plain)
    rows.append(Row("host memory of this benchmark", own_peak_mb(), "MB"))
    closing = [close(bench, stage, cfg, parts, cached[stage.name], plain[stage.name]) for stage in STAGES]
    return {"machine": machine, "settings": asdict(cfg), "inputs": describe_inputs(inputs, bench),
            "rows": [row.entry() for row in rows], "closing": [item.entry() for item in closing], "growth": growth,
            "losses": losses}


def tell(part):
    print(f"{time.strftime('%H:%M:%S')} {part}", flush=True)


def describe_inputs(inputs, bench):
    """{what: number} of the data set."""
    return {"pictures": bench.rows["image_path"].nunique(), "questions": len(bench.rows), "words": len(bench.vocab),
            "bytes_per_picture": round(inputs.bytes_per_picture),
            "encoders": "tiny" if bench.tiny else "CLIP ViT-B/32 and distilgpt2, random weights"}


def close(bench, stage, cfg, parts, cached, plain):
    """The Closing of one stage: what is done once and all epochs from the cache, against as many epochs of the plain loop.

    All questions of the data set are trained on, at the same batch size on both sides. `cached`, `plain`: {batch size:
    samples/s}.
    """
    once_s = parts["decode"] + parts[f"{stage.name} pictures"] + parts[f"{stage.name} questions"]
    samples, batch_size = cfg.epochs * len(bench.rows), FAIR_BATCH[bench.device]
    model = bench.model(stage)
    expected = EXPECTED_ON_CPU[stage.name] if bench.device == "cpu" and cfg.epochs == EXPECTED_EPOCHS and not cfg.tiny else None
    return Closing(f"cached {stage.name} over {cfg.epochs} epochs against the plain loop", batch_size,
                   once_s + samples / cached[batch_size], samples / plain[batch_size], bench.times_fewer(model, cfg.epochs),
                   "encoders' operations counted: frozen blocks once for each picture and question, not in every epoch for "
                   "every row; decoding, which only the plain loop repeats, comes on top", expected)


if __name__ == "__main__":
    settings.run(main, Config)
