"""Measures how fast stage 2 trains beside another program, for several values of GOMP_SPINCOUNT.

OpenMP's threads wait for each other in a loop, and GOMP_SPINCOUNT says how often it runs before a thread gives up its core.
Runs fine_tune.py with the demo's encoders on generated images: once alone and once beside one busy process for each value.
Prints a table; writes shared_machine.json into --output-dir. About five minutes on two cores.
"""
import contextlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

from common import settings  # first: before torch

# isort: split
import pandas as pd

from benchmarks.inputs import ROOT, write_data, write_encoders
from benchmarks.timing import run_process
from common.files import write_json


@dataclass
class Config:
    output_dir: str = "benchmarks/results"
    """folder for shared_machine.json"""
    spin_counts: tuple[int, ...] = (0, 1_000, 3_000, 10_000, 300_000)
    """values of GOMP_SPINCOUNT; 300,000 is what OpenMP takes by itself"""
    images: int = 1_000
    """number of images, each with about 1.15 questions"""
    epochs: int = 2
    """of each training; the last one is measured"""


def main(cfg):
    settings.check_ranges(cfg, images=(20, 10**6), epochs=(1, 1_000))
    folder, rates = Path(cfg.output_dir).resolve(), {}
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="shared_machine.", dir=folder) as work:
        write_data(Path(work) / "data", cfg.images)
        clip_model, gpt2_model = write_encoders(None, tiny=True)
        train(work, "train.py", "stage_1", ["--epochs", 1, "--clip-model", clip_model, "--gpt2-model", gpt2_model])
        print(f"\n{'GOMP_SPINCOUNT':>14} {'alone':>9} {'beside one':>11}   samples/s of stage 2")
        for count in cfg.spin_counts:
            flags = ["--epochs", cfg.epochs, "--checkpoint", "stage_1/vqa_checkpoint.pt"]
            alone = train(work, "fine_tune.py", f"alone_{count}", flags, count)
            with busy_process():
                beside = train(work, "fine_tune.py", f"beside_{count}", flags, count)
            rates[count] = {"alone": alone, "beside_one": beside}
            print(f"{count:>14} {alone:>9.1f} {beside:>11.1f}", flush=True)
    write_json(folder / "shared_machine.json", rates)


def train(work, script, output_dir, flags, spin_count=settings.SPIN_COUNT):
    """Samples/s of the last epoch of a training on the CPU."""
    run_process(["env", f"GOMP_SPINCOUNT={spin_count}", "HF_HUB_OFFLINE=1", sys.executable, ROOT / script, *flags,
                 "--device", "cpu", "--data-dir", "data", "--cache-dir", "cache", "--output-dir", output_dir], work)
    return float(pd.read_csv(Path(work) / output_dir / "train_log.csv")["samples_per_s"].iloc[-1])


@contextlib.contextmanager
def busy_process():
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    settings.run(main, Config)
