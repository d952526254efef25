"""Time and memory on generated data of the size of VQA v2's training set.

Writes as many questions and annotations as VQA v2 has, runs mini_vqa_v2.py on them, reads the rows as train.py does, and takes
training steps from a generated store of the states of all 82,783 images (6.4 GB with real encoders). Prints a table; writes
full_size.json into --output-dir and deletes everything else. About ten minutes on two cores, two with --tiny.
"""
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # all weights are local

from common import settings  # first: before torch

# isort: split
import numpy as np
import torch

import train
from benchmarks.inputs import ANSWERS, QUESTIONS, ROOT, SEED, draw_text, write_encoders
from benchmarks.timing import MEGABYTE, run_process
from common.device import Precision
from common.files import write_json
from features.arrays import new_array, open_tensor
from features.encoders import load_encoders
from features.store import FeatureStore
from model import ModelConfig, VQAModel
from preprocess import VQADataset, read_rows, rows_of_split
from training.optimizer import make_optimizer, set_learning_rates
from training.step import train_step
from vocab import Vocab

QUESTIONS_NAME, ANNOTATIONS_NAME = "v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"
READ_ROWS = "import sys; sys.path.insert(0, sys.argv[1]); from preprocess import read_rows; print(len(read_rows(sys.argv[2])))"
DISTINCT_TEXTS = 20_000  # distinct questions, and distinct answers, from which all rows are drawn
DISTINCT_STATES = 1_024  # images whose states are drawn; all others repeat them
BATCH_SIZE = 16


@dataclass
class Config:
    output_dir: str = "benchmarks/results"
    """folder for full_size.json"""
    questions: int = 443_757
    """as in VQA v2's training set"""
    images: int = 82_783
    """as in VQA v2's training set"""
    steps: int = 300
    """training steps from the stored states, with one trainable CLIP block"""
    tiny: bool = False
    """the demo's encoders instead of CLIP ViT-B/32 and distilgpt2"""


def main(cfg):
    settings.check_ranges(cfg, questions=settings.COUNT, images=settings.COUNT, steps=settings.COUNT)
    folder = Path(cfg.output_dir).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="full_size.", dir=folder) as work:
        result = {"text": measure_text(Path(work), cfg), "training": measure_training(Path(work), cfg)}
    write_json(folder / "full_size.json", result)
    for part, numbers in result.items():
        print(f"\n{part}")
        for name, value in numbers.items():
            print(f"  {name:<44}{value:>12,.1f}")


def measure_text(work, cfg):
    """{name: number}: building the data set from the official files, and reading it, each in its own process."""
    (work / "vqa").mkdir()
    write_official(work / "vqa", cfg)
    built = run_process([sys.executable, ROOT / "mini_vqa_v2.py", "--vqa-dir", work / "vqa", "--output-dir", work / "data",
                         "--no-pictures", "--min-answer-words", 1, "--min-agreement", 1], work)
    read = run_process([sys.executable, "-c", READ_ROWS, ROOT, work / "data"], work)
    return {"questions file, MB": (work / "vqa" / QUESTIONS_NAME).stat().st_size / MEGABYTE,
            "annotations file, MB": (work / "vqa" / ANNOTATIONS_NAME).stat().st_size / MEGABYTE,
            "mini_vqa_v2.py, s": built.seconds, "mini_vqa_v2.py, peak MB": built.peak_mb,
            "reading the data set, s": read.seconds, "reading the data set, peak MB": read.peak_mb}


def write_official(folder, cfg):
    """Write questions and annotations in the official layout, entry by entry."""
    rng = np.random.default_rng(SEED)
    texts = [draw_text(rng, *QUESTIONS) for _ in range(DISTINCT_TEXTS)]
    answers = [draw_text(rng, *ANSWERS) for _ in range(DISTINCT_TEXTS)]
    with (open(folder / QUESTIONS_NAME, "w", encoding="utf-8") as questions,
          open(folder / ANNOTATIONS_NAME, "w", encoding="utf-8") as annotations):
        questions.write('{"info": {}, "license": {}, "questions": [')
        annotations.write('{"info": {}, "license": {}, "annotations": [')
        for number in range(cfg.questions):
            image_id, comma = 1 + number % cfg.images, ", " if number else ""
            shared = {"image_id": image_id, "question_id": 1000 * image_id + number // cfg.images}
            label, *others = (answers[index] for index in rng.integers(DISTINCT_TEXTS, size=6))
            given = [label] * 5 + others
            questions.write(comma + json.dumps({**shared, "question": f"{texts[rng.integers(DISTINCT_TEXTS)]}?"}))
            annotations.write(comma + json.dumps({
                **shared, "question_type": "what is the", "answer_type": "other", "multiple_choice_answer": label,
                "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(given, 1)]}))
        questions.write("]}")
        annotations.write("]}")


def measure_training(work, cfg):
    """{name: number}: training steps from a memory-mapped store of the states of all images."""
    clip_model, gpt2_model = write_encoders(work / "encoders", cfg.tiny)
    encoders = load_encoders(clip_model, "", gpt2_model)
    rows = rows_of_split(read_rows(work / "data"), "train")
    vocab, precision = Vocab.build(rows["answer"], 2), Precision("cpu", "bf16")
    torch.manual_seed(SEED)
    model = VQAModel(encoders.image.visual, encoders.question.gpt2, len(vocab), ModelConfig())
    model.unfreeze(1, 0)
    store = generated_store(work, encoders, rows)
    started = time.perf_counter()
    dataset = VQADataset(rows, vocab, model.config.answer_max_len, store)
    built_s = time.perf_counter() - started
    optimizer = make_optimizer(model, {"head": 1e-3, "clip": 1e-5}, train.Config.weight_decay)
    set_learning_rates(optimizer, 1.0)
    model.train()
    order = dataset.epoch_order(train.generator(SEED, 1), by_image=True)
    memory, started = [], time.perf_counter()
    for index in order.split(BATCH_SIZE)[:cfg.steps]:
        train_step(model, dataset.batch(index), optimizer, precision.scaler(), precision, train.Config())
        memory.append(private_mb())
    seconds = time.perf_counter() - started
    return {"stored states, MB": store.image_states.nbytes / MEGABYTE, "rows": len(rows), "dataset built, s": built_s,
            "steps": len(memory), "samples/s": len(memory) * BATCH_SIZE / seconds,
            "private memory after a tenth of the steps, MB": memory[max(1, len(memory) // 10) - 1],
            "private memory at the end, MB": memory[-1]}


def generated_store(work, encoders, rows):
    """A FeatureStore of random states: images before CLIP's last block in bfloat16, questions as features."""
    tokens, width = encoders.image.visual.positional_embedding.shape
    paths, questions = sorted(set(rows["image_path"])), sorted(set(rows["question"]))
    drawn = torch.randn(DISTINCT_STATES, tokens, width, generator=torch.Generator().manual_seed(SEED)).bfloat16()
    with new_array(work / "image_states.npy", (len(paths), tokens, width), np.int16) as array:
        for start in range(0, len(paths), DISTINCT_STATES):
            stop = min(start + DISTINCT_STATES, len(paths))
            array[start:stop] = drawn[:stop - start].view(torch.int16).numpy()
    features = torch.randn(len(questions), encoders.question.gpt2.config.n_embd)
    return FeatureStore(paths, open_tensor(work / "image_states.npy", len(paths)), questions, features,
                        torch.full((len(questions),), 8), torch.device("cpu"))


def private_mb():
    """Megabytes of memory that only this process holds. Memory-mapped files do not count."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / MEGABYTE


if __name__ == "__main__":
    settings.run(main, Config)
