"""The full VQA v2 training set, as generated files of its size: do time and memory hold?

Writes questions and annotations of VQA v2's number and bytes, runs mini_vqa_v2.py on them, reads the rows as train.py does,
and takes some hundred training steps from a generated store of all 82,783 pictures' states (6.4 GB with real encoders).
Reads nothing. Prints a table; writes full_size.json into --output-dir and deletes the rest. About ten minutes on two cores,
one with --tiny; needs 8 GB of disk.
"""
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts' modules lie one folder up
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are local

import numpy as np
import torch

from benchmarks.clock import MEGABYTE
from benchmarks.inputs import ANSWER_WORDS, HUMANS, QUESTION_WORDS, draw_words, word_stocks, write_encoders
from benchmarks.scripts import ROOT, run_process
from common import settings
from common.device import Precision
from common.files import atomic_write, write_json
from features.arrays import new_array, open_tensor
from features.encoders import load_encoders
from features.store import FeatureStore
from preprocess import VQADataset, read_rows, rows_of_split
from train import Config as TrainConfig
from train import generator
from training.checkpoint import FIXED, build_model
from training.optimizer import make_optimizer, set_rates
from training.step import TrainingStep
from vocab import Vocab

QUESTIONS_NAME, ANNOTATIONS_NAME = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"
READ_ROWS = "import sys; sys.path.insert(0, sys.argv[1]); from preprocess import read_rows; print(len(read_rows(sys.argv[2])))"
DRAWN = 20_000  # different questions and answers each, from which all are taken
BLOCK = 1_024   # pictures whose states are drawn; the others repeat them


@dataclass
class Config:
    output_dir: str = "benchmarks/results"
    """where full_size.json goes, and what only the run needs while it runs"""
    questions: int = 443_757
    """of VQA v2's training set"""
    pictures: int = 82_783
    """of VQA v2's training set"""
    steps: int = 300
    """training steps of stage 2 (one CLIP block trained) from the stored states"""
    batch_size: int = 16
    """questions per step"""
    tiny: bool = False
    """tiny encoders instead of CLIP ViT-B/32 and distilgpt2"""
    seed: int = 42
    """of texts, states and order"""


def main(cfg):
    for name in ("questions", "pictures", "steps", "batch_size"):
        settings.check_range(cfg, name, low=1)
    folder = Path(cfg.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="full_size.", dir=folder) as work:
        work = Path(work)
        result = {"text": measure_text(work, cfg), "training": measure_training(work, cfg)}
    write_json(folder / "full_size.json", result)
    for part, numbers in result.items():
        print(f"\n{part}")
        for name, value in numbers.items():
            print(f"  {name:<44}{value:>12,.1f}")


def measure_text(work, cfg):
    """{what: number} of building the data set from the official text and of reading it back, in processes of their own."""
    (work / "vqa").mkdir()
    write_official(work / "vqa", cfg)
    built = run_process([sys.executable, ROOT / "mini_vqa_v2.py", "--vqa-dir", work / "vqa", "--output-dir", work / "data",
                         "--no-pictures", "--min-answer-words", 1, "--min-agreement", 1], work, "mini_vqa_v2")
    read = run_process([sys.executable, "-c", READ_ROWS, ROOT, work / "data"], work, "read_rows")
    return {"questions file, MB": (work / "vqa" / QUESTIONS_NAME).stat().st_size / MEGABYTE,
            "annotations file, MB": (work / "vqa" / ANNOTATIONS_NAME).stat().st_size / MEGABYTE,
            "mini_vqa_v2.py, s": built.seconds, "mini_vqa_v2.py, peak MB": built.peak_mb,
            "reading rows and human answers, s": read.seconds, "reading rows and human answers, peak MB": read.peak_mb}


def write_official(folder, cfg):
    """Questions and annotations in the official layout, written entry by entry."""
    rng, stocks = np.random.default_rng(cfg.seed), word_stocks(cfg.seed)
    texts, answers = ([draw_words(rng, stock, lengths) for _ in range(DRAWN)]
                      for stock, lengths in zip(stocks, (QUESTION_WORDS, ANSWER_WORDS), strict=True))
    with (atomic_write(folder / QUESTIONS_NAME) as one, open(one, "w", encoding="utf-8") as questions,
          atomic_write(folder / ANNOTATIONS_NAME) as other, open(other, "w", encoding="utf-8") as annotations):
        questions.write('{"info": {}, "license": {}, "questions": [')
        annotations.write('{"info": {}, "license": {}, "annotations": [')
        for number in range(cfg.questions):
            image_id, comma = 1 + number % cfg.pictures, ", " if number else ""
            shared = {"image_id": image_id, "question_id": 1000 * image_id + number // cfg.pictures}
            label, rest = answers[rng.integers(DRAWN)], [answers[index] for index in rng.integers(DRAWN, size=HUMANS // 2)]
            given = [label] * (HUMANS - len(rest)) + rest
            questions.write(comma + json.dumps({**shared, "question": f"{texts[rng.integers(DRAWN)]}?"}))
            annotations.write(comma + json.dumps({
                **shared, "question_type": "what is the", "answer_type": "other", "multiple_choice_answer": label,
                "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(given, 1)]}))
        questions.write("]}")
        annotations.write("]}")


def measure_training(work, cfg):
    """{what: number} of training steps from a memory-mapped store of all pictures' states."""
    write_encoders(work / "encoders", cfg.tiny, cfg.seed)
    encoders = load_encoders(f"local-dir:{work / 'encoders' / 'clip'}", "", str(work / "encoders" / "gpt2"))
    rows = rows_of_split(read_rows(work / "data"), "train")
    vocab, precision = Vocab.build(rows["answer"], 2), Precision("cpu", "bf16")
    torch.manual_seed(cfg.seed)
    model = build_model(encoders, len(vocab), {name: getattr(TrainConfig, name) for name in FIXED})
    model.unfreeze(1, 0)
    store = generated_store(work, encoders, rows, cfg)
    started = time.perf_counter()
    dataset = VQADataset(rows, vocab, TrainConfig.answer_max_len, store)
    built_s = time.perf_counter() - started
    loop = TrainConfig(batch_size=cfg.batch_size, output_dir=str(work))
    optimizer = make_optimizer(model, {"head": 1e-3, "clip": 1e-5}, loop.weight_decay)
    take_step = TrainingStep(model, dataset, optimizer, precision.scaler(), loop, precision)
    order = dataset.epoch_order(generator(cfg.seed, 1), by_picture=True)
    take_step.start_epoch(0, dataset.answer_index)
    set_rates(optimizer, 1.0)
    memory, seconds = [], 0.0
    for index in order.split(cfg.batch_size)[:cfg.steps]:
        started = time.perf_counter()
        take_step(index)
        seconds += time.perf_counter() - started
        memory.append(private_mb())
    tenth = max(1, len(memory) // 10)
    return {"stored states, MB": store.image_states.nbytes / MEGABYTE, "rows": len(rows), "data set built, s": built_s,
            "steps": len(memory), "samples/s": len(memory) * cfg.batch_size / seconds,
            "private memory after a tenth of the steps, MB": memory[tenth - 1], "private memory at the end, MB": memory[-1]}


def generated_store(work, encoders, rows, cfg):
    """A FeatureStore of random states: pictures at the cut of their last block in bfloat16, questions as features."""
    tokens, width = encoders.image.visual.positional_embedding.shape
    paths, questions = sorted(set(rows["image_path"])), sorted(set(rows["question"]))
    drawn = torch.randn(BLOCK, tokens, width, generator=torch.Generator().manual_seed(cfg.seed)).bfloat16()
    with new_array(work / "image_states.npy", (len(paths), tokens, width), np.int16) as array:
        for start in range(0, len(paths), BLOCK):
            stop = min(start + BLOCK, len(paths))
            array[start:stop] = drawn[:stop - start].view(torch.int16).numpy()
    features = torch.randn(len(questions), encoders.question.gpt2.config.n_embd)
    lengths = torch.full((len(questions),), 8)
    return FeatureStore(paths, open_tensor(work / "image_states.npy", len(paths)), questions, features, lengths,
                        torch.device("cpu"))


def private_mb():
    """Megabytes of memory that this process alone holds: what it maps from files does not count."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / MEGABYTE


if __name__ == "__main__":
    settings.run(main, Config)
