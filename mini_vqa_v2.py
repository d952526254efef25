"""Build the mini VQA v2 dataset: questions whose majority answer is a phrase on which several humans agree.

Reads the official VQA v2 question and annotation files from --vqa-dir (fetched when absent) and the COCO pictures
from --image-dir (fetched when not given). Writes images/, qa_pairs.json and, last, metadata.csv into --output-dir, and
beside them manifest.csv (what each picture is, so that the next run checks instead of fetching) and, while pictures are
missing, missing.csv. Whatever stops a run, the next one goes on from there.
Prints how many rows were read, kept and dropped by each reason, and the images and rows of every split.
The text of the whole training set takes half a minute and 1.1 GB of memory, the pictures as long as the network needs.
"""
import csv
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import settings
from common.files import atomic_write, file_lock, is_text, remove_temporaries, write_json
from download.http import check_address
from download.images import collect_pictures
from download.official import find_official, read_json


@dataclass
class Config:
    vqa_dir: str = "vqa_v2"
    """Folder of the official text files (.json, .json.gz or the published .zip); missing ones are fetched into it."""
    image_dir: str | None = None
    """Local folder of COCO pictures, in it or in its subfolder SUBSET; None fetches the needed ones."""
    output_dir: str = "mini_vqa_v2"
    """Folder that gets images/, metadata.csv and qa_pairs.json."""
    subset: Literal["train2014", "val2014"] = "train2014"
    """Which official files and pictures to use."""
    base_url: str = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
    """Address under which the official zips lie."""
    image_url: str = "http://images.cocodataset.org"
    """Address of the pictures, which lie at IMAGE_URL/SUBSET/COCO_SUBSET_%012d.jpg."""
    pictures: bool = True
    """Collect the pictures; --no-pictures writes the two text files only."""
    min_answer_words: int = 3
    """Fewest words (split at white space) of a label that is kept."""
    min_agreement: int = 3
    """Fewest humans who gave the label; at most as many as answered the question."""
    max_questions: int = 0
    """Most questions to keep, taken in hash order of the question id; 0 keeps all."""
    val_fraction: float = 0.1
    """Share of the pictures for validation, between 0 and 1."""
    test_fraction: float = 0.1
    """Share of the pictures for testing, between 0 and 1."""
    workers: int = 16
    """Threads that fetch and decode pictures."""
    seed: int = 42
    """Seed of the split."""


COLUMNS = ("image_id", "question_id", "question", "answer", "image_path",
           "split", "question_type", "answer_type", "agreement")
SPLITS = ("train", "val", "test")


def main(cfg):
    check_settings(cfg)
    rows = label_rows(read_official(cfg, "questions"), read_official(cfg, "annotations"), cfg)
    rows = limit_rows(rows, cfg.max_questions)
    check_splits(rows, cfg)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(output_dir / ".lock", f"another run is writing to --output-dir {output_dir}: wait for it, or name another"):
        remove_temporaries(output_dir)
        if cfg.pictures:
            rows = keep_pictured(rows, cfg)
            check_splits(rows, cfg)
        print_splits(rows)
        write_dataset(rows, output_dir)


def check_settings(cfg):
    """Refuse what cannot work before anything is read or fetched."""
    for name, low, high in (("min_answer_words", 1, None), ("min_agreement", 1, None), ("max_questions", 0, None),
                            ("workers", 1, 256)):
        settings.check_range(cfg, name, low, high)
    for name in ("val_fraction", "test_fraction"):
        settings.check_range(cfg, name, 0, 1, low_open=True)
    if cfg.val_fraction + cfg.test_fraction >= 1:
        raise ValueError(f"--val-fraction {cfg.val_fraction} and --test-fraction {cfg.test_fraction} leave no picture "
                         "for training: their sum must be below 1")
    for name in ("base_url", "image_url"):
        check_address(f"--{name.replace('_', '-')}", getattr(cfg, name))
    for name in ("vqa_dir", "image_dir", "output_dir"):
        folder = getattr(cfg, name)
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"--{name.replace('_', '-')} {folder} is not a folder")
    if cfg.pictures and cfg.image_dir is not None and not Path(cfg.image_dir).exists():
        raise FileNotFoundError(f"--image-dir {cfg.image_dir} does not exist; without the flag pictures are fetched")


def read_official(cfg, kind):
    """{question_id: entry} of the official file of `kind`, "questions" or "annotations", fetched if it is absent."""
    path, name = find_official(cfg.vqa_dir, cfg.subset, kind, cfg.base_url)
    print(f"reading {path}", flush=True)
    content = read_json(path, name, answer_text)
    if not isinstance(content, dict) or not isinstance(content.get(kind), list):
        raise ValueError(f"{path} has no list '{kind}' at its top level: replace it by the official file")
    entries = {}
    for position, entry in enumerate(content[kind]):
        question_id = field(entry, "question_id", int, f"{path}, entry {position}")
        if question_id in entries:
            raise ValueError(f"{path}: question id {question_id} stands twice; replace it by the official file")
        entries[question_id] = entry
    return entries


def answer_text(entry):
    """An answer's text in place of its JSON object, which takes 1 GB more over the whole training set."""
    return entry["answer"] if "answer" in entry and "question_id" not in entry else entry


def field(entry, name, kind, where, default=None):
    """entry[name], a text or a number >= 0 as `kind` says; else ValueError that tells `where` it was."""
    value = entry.get(name, default) if isinstance(entry, dict) else None
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"{where}: {name} is {value!r:.60}, not {'a text' if kind is str else 'a number'}; "
                         "check the files in --vqa-dir")
    if kind is str:
        check_text(value, where)
    return value


def check_text(text, where):
    """Raise ValueError for what no CSV can hold: a NUL, or half of a character."""
    if "\0" in text or not is_text(text):
        raise ValueError(f"{where}: {text!a:.60} holds a NUL or half of a character; check the files in --vqa-dir")


def label_rows(questions, annotations, cfg):
    """The rows whose label is long and agreed enough, in order of question id; prints what was dropped and why."""
    rows, num_short, num_disputed = [], 0, 0
    for question_id in sorted(questions.keys() & annotations.keys()):
        annotation = annotations[question_id]
        answers = human_answers(annotation, question_id)
        label, agreement = majority_answer(answers, annotation.get("multiple_choice_answer"))
        if len(label.split()) < cfg.min_answer_words:
            num_short += 1
        elif agreement < min(cfg.min_agreement, len(answers)):
            num_disputed += 1
        else:
            row = make_row(questions[question_id], annotation, cfg)
            rows.append(row | {"answer": label, "agreement": agreement, "answers": answers})
    print(f"read {len(questions)} questions, {len(annotations)} annotations")
    dropped = {"question without an annotation": len(questions.keys() - annotations.keys()),
               "annotation without a question": len(annotations.keys() - questions.keys()),
               f"label of fewer than {cfg.min_answer_words} words (--min-answer-words)": num_short,
               f"label given by fewer than {cfg.min_agreement} humans (--min-agreement)": num_disputed}
    for reason, count in dropped.items():
        print(f"dropped {count}: {reason}")
    if not rows:
        raise ValueError("nothing is kept: " + "; ".join(f"{count} {reason}" for reason, count in dropped.items()))
    return rows


def human_answers(annotation, question_id):
    """The humans' answers as they wrote them, in annotation order: at least one."""
    answers = annotation.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError(f"question {question_id}: its answers are not a list of texts; check the files in --vqa-dir")
    for answer in answers:
        check_text(answer, f"question {question_id}")
    return answers


def majority_answer(answers, multiple_choice_answer):
    """The most frequent answer and how many gave it; a tie goes to VQA's own choice, else to the alphabet."""
    counts = Counter(answers)
    agreement = max(counts.values())
    tied = sorted(answer for answer, count in counts.items() if count == agreement)
    return (multiple_choice_answer if multiple_choice_answer in tied else tied[0]), agreement


def make_row(question, annotation, cfg):
    """The row of one question, but for what the humans answered."""
    where = f"question {question['question_id']}"
    image_id = field(question, "image_id", int, where)
    if field(annotation, "image_id", int, where) != image_id:
        raise ValueError(f"{where} has another image_id than its annotation: the files in --vqa-dir do not match")
    return {"image_id": image_id, "question_id": question["question_id"],
            "question": field(question, "question", str, where),
            "image_path": f"images/COCO_{cfg.subset}_{image_id:012d}.jpg",
            "split": choose_split(image_id, cfg.seed, cfg.val_fraction, cfg.test_fraction),
            "question_type": field(annotation, "question_type", str, where, default=""),
            "answer_type": field(annotation, "answer_type", str, where, default="")}


def choose_split(image_id, seed, val_fraction, test_fraction):
    """"test", "val" or "train", by this picture and the seed alone: rows that come or go move no other picture."""
    digest = hashlib.sha256(f"split {seed} {image_id}".encode()).hexdigest()
    position = int(digest[:13], 16) / 16**13  # uniform in [0, 1): 52 bits, which a float holds exactly
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def limit_rows(rows, max_questions):
    """At most `max_questions` rows (0: all), the first in hash order of the question id; in order of the id again."""
    if max_questions == 0:
        return rows
    hashed = sorted(rows, key=lambda row: hashlib.sha256(f"question {row['question_id']}".encode()).digest())
    print(f"dropped {max(0, len(rows) - max_questions)}: beyond the first {max_questions} (--max-questions)")
    return sorted(hashed[:max_questions], key=lambda row: row["question_id"])


def check_splits(rows, cfg):
    """Raise ValueError with the counts when a split has no rows."""
    sizes = Counter(row["split"] for row in rows)
    if any(sizes[split] == 0 for split in SPLITS):
        found = ", ".join(f"{split} {sizes[split]}" for split in SPLITS)
        raise ValueError(f"a split has no rows ({found}): keep more questions, or change --val-fraction "
                         f"{cfg.val_fraction}, --test-fraction {cfg.test_fraction} or --seed {cfg.seed}")


def keep_pictured(rows, cfg):
    """Collect the pictures into images/ and return the rows whose picture is there and whole."""
    names = sorted({Path(row["image_path"]).name for row in rows})
    lost = collect_pictures(names, Path(cfg.output_dir), cfg.subset, cfg.image_dir, cfg.image_url, cfg.workers)
    kept = [row for row in rows if Path(row["image_path"]).name not in lost]
    print(f"dropped {len(rows) - len(kept)}: picture missing or unreadable")
    return kept


def print_splits(rows):
    print(f"kept {len(rows)}")
    for split in SPLITS:
        images = [row["image_id"] for row in rows if row["split"] == split]
        print(f"{split}: {len(set(images))} images, {len(images)} rows")


def write_dataset(rows, output_dir):
    """Write qa_pairs.json, then metadata.csv: an interrupted run leaves no CSV that looks whole."""
    with atomic_write(output_dir / "metadata.csv") as temporary:
        with open(temporary, "w", encoding="utf-8", newline="") as stream:
            stream.write(",".join(COLUMNS) + "\n")
            # every text is quoted: csv leaves a lone carriage return bare, which readers take for the end of the row
            writer = csv.DictWriter(stream, COLUMNS, "", "ignore", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
            writer.writerows(rows)
        write_json(output_dir / "qa_pairs.json", [{name: row[name] for name in (*COLUMNS, "answers")} for row in rows])
    print(f"wrote {output_dir / 'qa_pairs.json'} and {output_dir / 'metadata.csv'}")


if __name__ == "__main__":
    settings.run(main, Config)
