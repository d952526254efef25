"""What each choice is worth: trains and scores the demo's variants with several seeds and prints one table.

Runs train.py, fine_tune.py and test.py with their own flags, one run per variant and seed, and leaves each run's results
CSV in OUTPUT_DIR; a run whose CSV is there, made with the same flags, data and encoders, is not made again. Writes
OUTPUT_DIR/ablations.md. `make ablations` passes the demo's flags; about an hour on two cores.
"""
import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' shared modules lie one folder up

import numpy as np
import pandas as pd
from tqdm import tqdm

from common import settings
from common.files import atomic_write, write_json
from evaluation.bootstrap import paired_difference
from evaluation.report import join_results


@dataclass
class Config:
    """Settings of the comparison."""

    data_dir: str = "demo/mini_vqa_v2"
    """the demo's data set, as `make demo` builds it"""
    cache_dir: str = "demo/cache"
    """stored outputs of the frozen blocks"""
    output_dir: str = "output/ablations"
    """one folder per run, and the table"""
    train_flags: str = ""
    """what train.py gets in every run, as one string"""
    fine_tune_flags: str = ""
    """what fine_tune.py gets in every run, but for the number of blocks"""
    seeds: int = 3
    """runs of each variant"""
    first_seed: int = 42
    """the seeds are this one and those after it"""


@dataclass(frozen=True)
class Variant:
    """One line of the table: its flags for train.py, fine_tune.py (None: stage 1 is scored) and test.py."""

    name: str
    against: str | None
    train: str = ""
    fine_tune: str | None = None
    test: str = ""


STAGE_1 = "stage 1: both inputs, gated, pooled, majority, greedy"
VARIANTS = (
    Variant(STAGE_1, None),
    Variant("question only", STAGE_1, train="--inputs question"),
    Variant("picture only", STAGE_1, train="--inputs image"),
    Variant("plain concatenation", STAGE_1, train="--fusion concat"),
    Variant("attention over the picture's tokens", STAGE_1, train="--image-pooling attention"),
    Variant("one of the humans' answers each epoch", STAGE_1, train="--answer-sampling humans"),
    Variant("beam of 3", STAGE_1, test="--beam-size 3"),
    Variant("stage 2, last 1 + 1 blocks", STAGE_1, fine_tune="--clip-layers 1 --gpt2-layers 1"),
    Variant("stage 2, last 2 + 2 blocks", STAGE_1, fine_tune="--clip-layers 2 --gpt2-layers 2"),
    Variant("stage 2, last 4 + 4 blocks", STAGE_1, fine_tune="--clip-layers 4 --gpt2-layers 4"),
)


def main(cfg):
    settings.check_range(cfg, "seeds", low=1, high=100)
    seeds = range(cfg.first_seed, cfg.first_seed + cfg.seeds)
    started = time.time()
    for variant, seed in tqdm([(variant, seed) for seed in seeds for variant in VARIANTS], "runs", unit=" runs"):
        run_variant(variant, seed, cfg)
    table = make_table(cfg, seeds)
    minutes = (time.time() - started) / 60
    text = (f"{table}\n\n{cfg.seeds} seeds each; mean sentence BLEU (lowest to highest seed), exact match, and the "
            "difference in mean sentence BLEU with its 95 % interval, paired by question, resampled by picture.\n")
    with atomic_write(Path(cfg.output_dir) / "ablations.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"\n{text}\n{minutes:.0f} minutes; table {Path(cfg.output_dir) / 'ablations.md'}")


def results_path(variant, seed, cfg):
    """The results CSV of one run."""
    return folder_of(variant.name, seed, cfg) / "results.csv"


def folder_of(name, seed, cfg):
    """The folder of one run: the variant's name in letters, digits and dashes, then the seed."""
    letters = "".join(letter if letter.isalnum() else " " for letter in name)
    return Path(cfg.output_dir) / f"{'-'.join(letters.split())}-seed-{seed}"


def run_variant(variant, seed, cfg):
    """Train what the variant needs and is not there, then score it on the test split."""
    made_with, note = what_it_is_made_with(variant, cfg), folder_of(variant.name, seed, cfg) / "made_with.json"
    if results_path(variant, seed, cfg).is_file() and note.is_file() and json.loads(note.read_text()) == made_with:
        return
    folder, data = folder_of(variant.name, seed, cfg), ["--data-dir", cfg.data_dir, "--cache-dir", cfg.cache_dir]
    stage_1 = folder_of(STAGE_1, seed, cfg)
    if variant.train or variant.name == STAGE_1:
        call("train.py", *data, *shlex.split(f"{cfg.train_flags} {variant.train}"), "--seed", seed, "--output-dir", folder)
        checkpoint = folder
    elif variant.fine_tune is not None:
        call("fine_tune.py", *data, *shlex.split(f"{cfg.fine_tune_flags} {variant.fine_tune}"), "--seed", seed,
             "--checkpoint", stage_1 / "vqa_checkpoint.pt", "--output-dir", folder)
        checkpoint = folder
    else:
        checkpoint = stage_1
    call("test.py", *data, *shlex.split(variant.test), "--checkpoint", checkpoint / "vqa_checkpoint.pt", "--num-pictures", 0,
         "--results-dir", folder / "results", "--results-csv", results_path(variant, seed, cfg),
         "--metrics-json", folder / "metrics.json", "--question-only-checkpoint", "none")
    write_json(note, made_with)


def what_it_is_made_with(variant, cfg):
    """Flags, and hashes of the data and of the demo's encoders: where one of them changes, a run is made again."""
    files = [Path(cfg.data_dir) / name for name in ("metadata.csv", "qa_pairs.json")]
    files += sorted((Path(__file__).parent / "encoders").glob("*/*"))
    return {"train": f"{cfg.train_flags} {variant.train}", "fine_tune": f"{cfg.fine_tune_flags} {variant.fine_tune}",
            "test": variant.test, "files": hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()}


def call(script, *flags):
    """Run a script as a user would; ValueError with its last words where it fails."""
    command = [sys.executable, script, *map(str, flags)]
    result = subprocess.run(command, cwd=Path(__file__).resolve().parents[1], text=True, capture_output=True)
    if result.returncode:
        last_words = (result.stderr.strip() or "no message").splitlines()[-1]
        raise ValueError(f"`{shlex.join(command[1:])}` failed: {last_words}")


def make_table(cfg, seeds):
    """The table in Markdown: a line per variant."""
    lines = ["| variant | mean sentence BLEU | exact match | against the line above all |", "|---|---|---|---|"]
    for variant in VARIANTS:
        runs = [pd.read_csv(results_path(variant, seed, cfg), dtype=str, keep_default_na=False) for seed in seeds]
        bleu = [run["sentence_bleu"].astype(float).mean() for run in runs]
        exact = np.mean([run["exact_match"].astype(float).mean() for run in runs])
        difference = "" if variant.against is None else format_difference(variant, seeds, cfg)
        spread = f"{np.mean(bleu):.1f} ({min(bleu):.1f} to {max(bleu):.1f})"
        lines.append(f"| {variant.name} | {spread} | {exact:.1f} | {difference} |")
    return "\n".join(lines)


def format_difference(variant, seeds, cfg):
    """The mean difference to `variant.against` over the seeds, with its interval; bold where that leaves out zero."""
    base = next(other for other in VARIANTS if other.name == variant.against)
    changes = []
    for seed in seeds:
        table = join_results(results_path(base, seed, cfg), results_path(variant, seed, cfg))
        changes.append(table["sentence_bleu_b"].astype(float) - table["sentence_bleu_a"].astype(float))
    # rows keep their order from seed to seed, so a row's changes are averaged before pictures are drawn
    difference, low, high = paired_difference(np.mean(changes, axis=0), np.zeros(len(table)), table["image_id_a"].tolist())
    text = f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


if __name__ == "__main__":
    settings.run(main, Config)
