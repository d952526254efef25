"""The real scripts as a user starts them, in processes of their own: start-up, the whole cold mini run, memory."""
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.clock import MEGABYTE
from benchmarks.report import Row
from benchmarks.workbench import STAGES
from preprocess import read_rows

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "fine_tune.py", "test.py")
READY = "epoch 0:"  # the line after which training begins
# what the scripts import before they do anything, whatever is asked of them
IMPORTS = ("import open_clip, pandas, torch, torchvision, tqdm, tyro; from transformers import AutoTokenizer, GPT2Model; "
           f"print({READY!r}, flush=True)")


@dataclass
class Finished:
    """A script that ran to its end."""

    seconds: float  # from its start to its end
    ready_s: float  # to the line that starts with READY, or to its end
    peak_mb: float  # of host memory, of its largest process


def run_process(command, folder, name):
    """Run a command in `folder` to its end; ValueError with the last line that it wrote where it fails."""
    log, ready_s, started = Path(folder) / f"{name}.log", None, time.perf_counter()
    with open(log, "wb") as errors:
        process = subprocess.Popen([str(part) for part in command], cwd=folder, stdout=subprocess.PIPE, stderr=errors)
        with process.stdout:
            for line in process.stdout:
                if ready_s is None and line.startswith(READY.encode()):
                    ready_s = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)  # unlike getrusage, of this process and its children alone
    seconds, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"{name} ended with status {process.returncode}: {' '.join(last):.300}")
    return Finished(seconds, ready_s or seconds, usage.ru_maxrss * 1024 / MEGABYTE)


def run_scripts(inputs, data_dir, cache_dir, cfg, epochs, more):
    """{script: Finished} of the three scripts in order, on `data_dir`. `more`: {script: further flags}."""
    common = ["--data-dir", data_dir, "--cache-dir", cache_dir, "--device", cfg.device, "--workers", cfg.workers]
    loop = ["--epochs", epochs, "--patience", epochs]
    flags = {
        "train.py": [*loop, "--output-dir", "stage_1", "--clip-model", inputs.clip_model, "--gpt2-model", inputs.gpt2_model],
        "fine_tune.py": [*loop, "--checkpoint", "stage_1/vqa_checkpoint.pt", "--output-dir", "stage_2"],
        "test.py": ["--checkpoint", "stage_2/vqa_checkpoint.pt", "--results-csv", "results.csv", "--metrics-json",
                    "metrics.json", "--results-dir", "results"]}
    with TemporaryDirectory(dir=cache_dir.parent) as folder:
        return {name: run_process([sys.executable, ROOT / name, *common, *flags[name], *more.get(name, ())], folder, name)
                for name in SCRIPTS}


def measure_cold_runs(inputs, cfg, precision, work):
    """{title: {script: Finished}}: the mini run from an empty cache, with the scripts' defaults; on CUDA also with the
    fast decoder and captured steps, which are off by default."""
    ways = {"cold mini run": {}}
    if precision.device.type == "cuda" and precision.amp != "fp16":
        ways["cold mini run, fast and captured"] = {"train.py": ("--picture-decoder", "fast", "--capture"),
                                                    "fine_tune.py": ("--capture",)}
    runs = {}
    for title, more in ways.items():
        with TemporaryDirectory(dir=work) as folder:
            runs[title] = run_scripts(inputs, inputs.data_dir, Path(folder) / "cache", cfg, cfg.epochs, more)
    return runs


def cold_rows(runs, title, plain_s):
    """The table's rows of a cold run. `plain_s`: {script: seconds of the plain loop for as many rows and epochs}."""
    plain_is = "as many rows and epochs at its published batch"
    rows = [Row(f"{title}: {name}", run.seconds, "s", plain_s[name], plain_is) for name, run in runs.items()]
    rows.append(Row(f"{title}: all three scripts", sum(run.seconds for run in runs.values()), "s", sum(plain_s.values()),
                    plain_is))
    return rows + [Row(f"{title}: host memory of {name}", run.peak_mb, "MB") for name, run in runs.items()]


def plain_seconds(rows, epochs, training, answering):
    """{script: seconds of the plain loop}, from samples/s of the stages and questions/s; validation left out."""
    counts = rows["split"].value_counts()
    seconds = [epochs * counts["train"] / training[stage.name][stage.published_batch] for stage in STAGES]
    return dict(zip(SCRIPTS, [*seconds, counts["test"] / answering], strict=True))


def measure_start_up(bench, cfg):
    """The table's rows of the scripts' start-up on a few rows whose pictures and questions are all in the cache."""
    with TemporaryDirectory(dir=bench.work) as folder:
        cache_dir, rows = Path(folder) / "cache", read_rows(bench.inputs.few_dir)
        for stage in STAGES:
            bench.dataset(bench.model(stage), rows, cache_dir, bench.inputs.few_dir)
        cached = sorted(cache_dir.iterdir())
        runs = [run_scripts(bench.inputs, bench.inputs.few_dir, cache_dir, cfg, 1,
                            {"train.py": ("--min-word-freq", 1)})
                for _ in range(cfg.repeats)]
        assert sorted(cache_dir.iterdir()) == cached, "start-up was to be timed with everything in the cache"
        imports = [run_process([sys.executable, "-c", IMPORTS], folder, "imports") for _ in range(cfg.repeats)]
    ready = [Row(f"start-up of {name}, to its first epoch", statistics.median(run[name].ready_s for run in runs), "s", None, "",
                 statistics.median(run.ready_s for run in imports), "the imports alone") for name in SCRIPTS[:2]]
    whole = [Row(f"{name} on a few cached rows, start to end", statistics.median(run[name].seconds for run in runs), "s", None,
                 "", statistics.median(run.seconds for run in imports), "a process that only imports and ends")
             for name in SCRIPTS]
    return ready + whole
