"""Ablations: trains and scores variants of the demo with several seeds and prints one table.

Calls train.py, fine_tune.py and test.py, once per variant and seed. Reads the data set of `make demo-data`. Writes one
folder per run and ablations.md into OUTPUT_DIR. A finished run with the same flags, data and encoders is not repeated.
`make ablations` passes the demo's flags; about an hour on two cores.
"""
import hashlib
import json
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

import numpy as np
from tqdm import tqdm

from common import settings
from common.files import atomic_write, write_json
from evaluation.bootstrap import difference_over_seeds
from evaluation.comparison import join_all
from evaluation.metrics import HEADLINE

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Config:
    data_dir: str = "demo/mini_vqa_v2"
    """the demo's data set"""
    cache_dir: str = "demo/cache"
    """cached outputs of the frozen blocks"""
    output_dir: str = "output/ablations"
    """folder for the runs and the table"""
    train_flags: str = ""
    """flags of train.py for every run, as one string"""
    fine_tune_flags: str = ""
    """flags of fine_tune.py for every run, without the number of blocks"""
    split: Literal["val", "test"] = "val"
    """split to score; variants are chosen on val, and test is kept for the chosen one"""
    seeds: int = 3
    """runs per variant"""
    first_seed: int = 42
    """the next seeds follow it"""


@dataclass(frozen=True)
class Variant:
    """One line of the table, and the flags in which it differs. `fine_tune` is None for variants of stage 1."""

    name: str
    train: str = ""
    fine_tune: str | None = None
    test: str = ""


STAGE_1 = Variant("stage 1: both inputs, gated, pooled, majority, greedy")
VARIANTS = (
    STAGE_1,
    Variant("question only", train="--inputs question --patience 30"),
    Variant("image only", train="--inputs image"),
    Variant("gate fixed at one half", train="--fusion constant"),
    Variant("plain concatenation", train="--fusion concat"),
    Variant("attention over the image's tokens", train="--image-pooling attention"),
    Variant("a random annotation per epoch instead of the majority", train="--answer-sampling humans"),
    Variant("a classifier over training answers", train="--decoder classifier --min-word-freq 1"),
    Variant("no label smoothing", train="--label-smoothing 0"),
    Variant("beam of 3", test="--beam-size 3"),
    Variant("stage 2, last 1 + 1 blocks", fine_tune="--clip-layers 1 --gpt2-layers 1"),
    Variant("stage 2, last 2 + 2 blocks", fine_tune="--clip-layers 2 --gpt2-layers 2"),
    Variant("stage 2, all 4 + 4 blocks", fine_tune="--clip-layers 4 --gpt2-layers 4"),
    Variant("stage 2, all 4 + 4 blocks, six epochs", fine_tune="--clip-layers 4 --gpt2-layers 4 --epochs 6"),
)


def main(cfg):
    settings.check_ranges(cfg, seeds=(1, 100))
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    for variant, seed in tqdm([(variant, seed) for seed in seeds for variant in VARIANTS], "runs", unit=" runs"):
        run_variant(variant, seed, cfg)
    lines = ["| variant | mean sentence BLEU | exact match | BLEU on unseen labels | against the first line |",
             "|---|---|---|---|---|"]
    lines += [table_line(variant, seeds, cfg) for variant in VARIANTS]
    text = ("\n".join(lines) + f"\n\n{cfg.seeds} seed{'s' * (cfg.seeds > 1)} each, {cfg.split} split: mean sentence BLEU "
            "(lowest to highest seed), exact match, BLEU on the questions whose label is no training label, and the "
            "difference in mean sentence BLEU with its 95 % interval over seeds and images, paired by seed and question. "
            "Bold: the interval excludes zero.\n")
    with atomic_write(Path(cfg.output_dir) / "ablations.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\ntable {Path(cfg.output_dir) / 'ablations.md'}")


def run_folder(variant, seed, cfg):
    """The folder of one run, named after variant and seed."""
    return Path(cfg.output_dir) / f"{re.sub('[^a-z0-9]+', '-', variant.name)}-seed-{seed}"


def run_variant(variant, seed, cfg):
    """Train the variant if it needs training, then score it. Does nothing if the same run is finished."""
    folder, made_with = run_folder(variant, seed, cfg), describe_run(variant, cfg)
    if (folder / "run.json").is_file() and json.loads((folder / "run.json").read_text(encoding="utf-8")) == made_with:
        return
    data = ["--data-dir", cfg.data_dir, "--cache-dir", cfg.cache_dir]
    stage_1, trained = run_folder(STAGE_1, seed, cfg), folder
    if variant.fine_tune is not None:
        call("fine_tune.py", *data, *shlex.split(f"{cfg.fine_tune_flags} {variant.fine_tune}"), "--seed", seed,
             "--checkpoint", stage_1 / "vqa_checkpoint.pt", "--output-dir", folder, "--overwrite")
    elif variant.train or variant == STAGE_1:
        call("train.py", *data, *shlex.split(f"{cfg.train_flags} {variant.train}"), "--seed", seed, "--output-dir", folder,
             "--overwrite")
    else:
        trained = stage_1
    call("test.py", *data, *shlex.split(variant.test), "--checkpoint", trained / "vqa_checkpoint.pt", "--split", cfg.split,
         "--num-pictures", 0, "--results-dir", folder / "results", "--results-csv", folder / "results.csv",
         "--metrics-json", folder / "metrics.json", "--question-only-checkpoint", "None")
    write_json(folder / "run.json", made_with)


def describe_run(variant, cfg):
    """Everything that a run's scores depend on: the flags, the split, and a hash of data and encoders."""
    files = [Path(cfg.data_dir) / name for name in ("metadata.csv", "qa_pairs.json")]
    files += sorted((ROOT / "demo" / "encoders").glob("*/*"))
    return {"train": f"{cfg.train_flags} {variant.train}", "fine_tune": f"{cfg.fine_tune_flags} {variant.fine_tune}",
            "test": variant.test, "split": cfg.split,
            "files": hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()}


def call(script, *flags):
    """Run a script in a subprocess. Raises ValueError with its last line of output if it fails."""
    command = [sys.executable, script, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if result.returncode:
        last_line = (result.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"`{shlex.join(command[1:])}` failed: {last_line}")


def table_line(variant, seeds, cfg):
    """One line of the Markdown table: scores, and the difference to stage 1 with its interval over seeds and images."""
    tables = join_all(*([run_folder(run, seed, cfg) / "results.csv" for seed in seeds] for run in (STAGE_1, variant)))
    bleu_1, bleu, exact = (np.array([table[column] for table in tables])
                           for column in ("sentence_bleu_a", "sentence_bleu_b", "exact_match_b"))     # (seeds, questions)
    difference = ""
    if variant != STAGE_1:
        mean, low, high = difference_over_seeds(bleu, bleu_1, tables[0]["image_id_a"])
        bold = "**" if low > 0 or high < 0 else ""
        difference = f"{bold}{mean:+.1f} [{low:+.1f}, {high:+.1f}]{bold}"
    per_seed = bleu.mean(axis=1)
    spread = f"{per_seed.mean():.1f} ({per_seed.min():.1f} to {per_seed.max():.1f})"
    metrics = [json.loads((run_folder(variant, seed, cfg) / "metrics.json").read_text(encoding="utf-8")) for seed in seeds]
    unseen = [table["by_training_label"]["unseen"][HEADLINE]["value"] for table in metrics]
    return f"| {variant.name} | {spread} | {exact.mean():.1f} | {np.mean(unseen):.1f} | {difference} |"


if __name__ == "__main__":
    settings.run(main, Config)
