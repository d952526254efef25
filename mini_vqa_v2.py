"""Build the mini VQA v2 data set: questions whose most frequent answer is a phrase that several annotators gave.

Reads the official VQA v2 files from --vqa-dir and the COCO images from --image-dir; downloads what is missing.
Writes images/, qa_pairs.json, held_out_annotators.json and, last, metadata.csv into --output-dir; also manifest.csv (size
and sha256 of each image) and, if images are missing, missing.csv. The same command continues a run that was stopped.
Prints how many rows were read, kept, and dropped for each reason, and the images and rows per split.
"""
import csv
import dataclasses
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from common import settings
from common.files import SPLITS, atomic_write, file_lock, is_text, remove_temporaries, write_json
from download.http import check_address
from download.images import collect_images
from download.official import find_official, read_json


@dataclass
class Config:
    vqa_dir: str = "vqa_v2"
    """official text files (.json, .json.gz or the published .zip); missing ones are downloaded into this folder"""
    image_dir: str | None = None
    """folder of COCO images, in it or in its subfolder SUBSET; none = the needed images are downloaded"""
    output_dir: str = "mini_vqa_v2"
    """folder for images/, metadata.csv, qa_pairs.json and held_out_annotators.json"""
    subset: Literal["train2014", "val2014"] = "train2014"
    """part of VQA v2 and COCO to use"""
    base_url: str = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
    """address of the folder with the official zips"""
    image_url: str = "http://images.cocodataset.org"
    """address of the images: IMAGE_URL/SUBSET/COCO_SUBSET_%012d.jpg"""
    pictures: bool = True
    """copy or download the images; with --no-pictures only the text files are written"""
    min_answer_words: int = 3
    """fewest words of a label that is kept, separated by white space"""
    min_agreement: int = 3
    """fewest annotators who gave the label; if the question has fewer answers than this, all must be equal"""
    max_questions: int = 0
    """most questions to keep, chosen by a hash of the question id; 0 = all"""
    val_fraction: float = 0.1
    """share of the images for validation, 0 to 1"""
    test_fraction: float = 0.1
    """share of the images for testing, 0 to 1"""
    split: Literal["train", "val", "test"] | None = None
    """put all images into this split; none = a hash of image id and seed decides, by the two fractions"""
    workers: int = 16
    """threads that download and decode images"""
    seed: int = 42
    """of the split"""


COLUMNS = ("image_id", "question_id", "question", "answer", "image_path", "split", "question_type", "answer_type", "agreement")


def main(cfg):
    check_settings(cfg)
    if cfg.split is not None:
        cfg = dataclasses.replace(cfg, val_fraction=float(cfg.split == "val"), test_fraction=float(cfg.split == "test"))
    rows, held_out = read_rows(cfg)
    check_splits(rows, cfg)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(output_dir / ".lock", f"another run is writing to --output-dir {output_dir}: wait for it, or name another"):
        remove_temporaries(output_dir)
        if cfg.pictures:
            rows = keep_rows_with_image(rows, held_out, cfg)
            check_splits(rows, cfg)
        print(f"kept {len(rows)}")
        for split in SPLITS:
            images = [row["image_id"] for row in rows if row["split"] == split]
            print(f"{split}: {len(set(images))} images, {len(images)} rows")
        write_dataset(rows, held_out, output_dir)


def check_settings(cfg):
    """Raise ValueError or FileNotFoundError for settings that cannot work, before anything is read or downloaded."""
    settings.check_ranges(cfg, min_answer_words=settings.COUNT, min_agreement=settings.COUNT, max_questions=(0, 10 ** 9),
                          workers=(1, 256), val_fraction=(0, 1), test_fraction=(0, 1))
    if cfg.split is None and cfg.val_fraction + cfg.test_fraction > 1:
        raise ValueError(f"--val-fraction {cfg.val_fraction} and --test-fraction {cfg.test_fraction}: their sum is above 1; "
                         "set one of them lower or to 0, or put all images into one split with --split")
    check_address("--base-url", cfg.base_url)
    check_address("--image-url", cfg.image_url)
    for flag, folder in (("--vqa-dir", cfg.vqa_dir), ("--image-dir", cfg.image_dir), ("--output-dir", cfg.output_dir)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{flag} {folder} is not a folder")
    if cfg.pictures and cfg.image_dir is not None and not Path(cfg.image_dir).exists():
        raise FileNotFoundError(f"--image-dir {cfg.image_dir} does not exist; without the flag the images are downloaded")


def read_rows(cfg):
    """(rows of metadata.csv, entries of held_out_annotators.json), at most --max-questions of each."""
    questions, annotations = read_official(cfg, "questions"), read_official(cfg, "annotations")
    rows, held_out = label_rows(questions, annotations, cfg), held_out_rows(questions, annotations, cfg)
    if cfg.max_questions > 0:
        dropped = max(0, len(rows) - cfg.max_questions)
        print(f"dropped {dropped}: beyond the first {cfg.max_questions} (--max-questions)")
        rows, held_out = limit_rows(rows, cfg.max_questions), limit_rows(held_out, cfg.max_questions)
    return rows, held_out


def read_official(cfg, kind):
    """{question_id: entry} of the official file of `kind`, "questions" or "annotations"."""
    path, name = find_official(cfg.vqa_dir, cfg.subset, kind, cfg.base_url)
    print(f"reading {path}", flush=True)
    # keep only the answer text of each object; this saves 1 GB
    content = read_json(path, name, lambda item: item["answer"] if "answer" in item and "question_id" not in item else item)
    if not isinstance(content, dict) or not isinstance(content.get(kind), list):
        raise ValueError(f"{path} has no list '{kind}' at its top level: replace it by the official file")
    entries = {}
    for position, entry in enumerate(content[kind]):
        question_id = field(entry, "question_id", int, f"{path}, entry {position}")
        if question_id in entries:
            raise ValueError(f"{path}: question id {question_id} occurs twice; replace it by the official file")
        entries[question_id] = entry
    return entries


def field(entry, name, kind, where, default=None):
    """entry[name], of type `kind` (int >= 0, or str that a UTF-8 CSV can hold). Raises ValueError that begins with `where`."""
    value = entry.get(name, default) if isinstance(entry, dict) else None
    if type(value) is not kind or (kind is int and value < 0):
        raise ValueError(f"{where}: {name} is {value!r:.60}, not {'a text' if kind is str else 'a number'}; "
                         "check the files in --vqa-dir")
    if kind is str and ("\0" in value or not is_text(value)):
        raise ValueError(f"{where}: {value!a:.60} holds a NUL or an unpaired surrogate; check the files in --vqa-dir")
    return value


def label_rows(questions, annotations, cfg):
    """The rows whose label is long enough and was given often enough, by question id. Prints the number dropped per reason."""
    too_short = f"label of fewer than {cfg.min_answer_words} words (--min-answer-words)"
    disputed = f"label given by fewer than {cfg.min_agreement} annotators (--min-agreement)"
    dropped = {"question without an annotation": len(questions.keys() - annotations.keys()),
               "annotation without a question": len(annotations.keys() - questions.keys()), too_short: 0, disputed: 0}
    rows = []
    for question_id in sorted(questions.keys() & annotations.keys()):
        annotation, where = annotations[question_id], f"question {question_id}"
        answers = annotation.get("answers")
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"{where} has no list of answers; check the files in --vqa-dir")
        answers = [field({"answer": answer}, "answer", str, where) for answer in answers]
        label, agreement = majority_answer(answers, annotation.get("multiple_choice_answer"))
        if not long_enough(label, cfg):
            dropped[too_short] += 1
        elif not agreed_enough(agreement, len(answers), cfg):
            dropped[disputed] += 1
        else:
            row = make_row(questions[question_id], annotation, where, cfg)
            rows.append(row | {"answer": label, "agreement": agreement, "answers": answers})
    print(f"read {len(questions)} questions, {len(annotations)} annotations")
    for reason, count in dropped.items():
        print(f"dropped {count}: {reason}")
    if not rows:
        raise ValueError("nothing is kept: " + "; ".join(f"{count} {reason}" for reason, count in dropped.items()))
    return rows


def long_enough(label, cfg):
    return len(label.split()) >= cfg.min_answer_words


def agreed_enough(agreement, num_answers, cfg):
    return agreement >= min(cfg.min_agreement, num_answers)


def majority_answer(answers, multiple_choice_answer):
    """(most frequent answer, how many gave it). A tie goes to VQA's choice if tied, else to the alphabetically first."""
    counts = Counter(answers)
    agreement = max(counts.values())
    tied = sorted(answer for answer, count in counts.items() if count == agreement)
    return (multiple_choice_answer if multiple_choice_answer in tied else tied[0]), agreement


def held_out_rows(questions, annotations, cfg):
    """The questions that at least one set of all annotators but one would keep, by question id, with `held_out_labels`.

    A score of one annotator from these labels is fair: the annotator's own vote chose neither the label nor the row.
    Call it after `label_rows`, which checks the answers.
    """
    rows = []
    for question_id in sorted(questions.keys() & annotations.keys()):
        answers = annotations[question_id]["answers"]
        labels = held_out_labels(answers, cfg)
        if any(label is not None for label in labels):
            row = make_row(questions[question_id], annotations[question_id], f"question {question_id}", cfg)
            rows.append({"question_id": question_id, "image_id": row["image_id"], "split": row["split"],
                         "answers": answers, "labels": labels})
    return rows


def held_out_labels(answers, cfg):
    """For each annotator the label that the others choose by the same rules; None if the others would not keep the row.

    A tie of the others goes to the alphabetically first answer. VQA's choice does not count: the annotator who is left
    out took part in it. One annotation alone has no others.
    """
    if len(answers) < 2 or not any(long_enough(text, cfg) for text in answers):
        return [None] * len(answers)
    labels = {}
    for text in dict.fromkeys(answers):  # annotators with equal answers leave equal others
        others = list(answers)
        others.remove(text)
        label, agreement = majority_answer(others, None)
        labels[text] = label if long_enough(label, cfg) and agreed_enough(agreement, len(others), cfg) else None
    return [labels[text] for text in answers]


def make_row(question, annotation, where, cfg):
    """The columns of one question that do not depend on the answers. Raises ValueError that begins with `where`."""
    image_id = field(question, "image_id", int, where)
    if field(annotation, "image_id", int, where) != image_id:
        raise ValueError(f"{where} has another image_id than its annotation: the files in --vqa-dir do not match")
    return {"image_id": image_id, "question_id": question["question_id"], "question": field(question, "question", str, where),
            "image_path": f"images/COCO_{cfg.subset}_{image_id:012d}.jpg",
            "split": choose_split(image_id, cfg.seed, cfg.val_fraction, cfg.test_fraction),
            "question_type": field(annotation, "question_type", str, where, default=""),
            "answer_type": field(annotation, "answer_type", str, where, default="")}


def choose_split(image_id, seed, val_fraction, test_fraction):
    """"test", "val" or "train", by a hash of image id and seed: adding rows does not move any image."""
    digest = hashlib.sha256(f"split {seed} {image_id}".encode()).hexdigest()
    position = int(digest[:13], 16) / 16**13  # uniform in [0, 1); a float holds its 52 bits exactly
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def limit_rows(rows, max_questions):
    """At most `max_questions` rows, chosen by a hash of the question id and ordered by it."""
    hashed = sorted(rows, key=lambda row: hashlib.sha256(f"question {row['question_id']}".encode()).digest())
    return sorted(hashed[:max_questions], key=lambda row: row["question_id"])


def check_splits(rows, cfg):
    """Raise ValueError with the number of rows per split if a split has none, although it has a share of the images."""
    sizes = Counter(row["split"] for row in rows)
    wanted = {"train": cfg.val_fraction + cfg.test_fraction < 1, "val": cfg.val_fraction > 0, "test": cfg.test_fraction > 0}
    if any(wanted[split] and sizes[split] == 0 for split in SPLITS):
        found = ", ".join(f"{split} {sizes[split]}" for split in SPLITS)
        raise ValueError(f"a split has no rows ({found}): keep more questions, or change --val-fraction "
                         f"{cfg.val_fraction}, --test-fraction {cfg.test_fraction} or --seed {cfg.seed}")


def keep_rows_with_image(rows, held_out, cfg):
    """Collect the images and return the rows whose image is there and can be decoded.

    A copy of an image (equal bytes) gets its split, in `rows` and `held_out`: no test image is trained on.
    """
    image_of = {Path(row["image_path"]).name: row for row in rows}
    missing, copies = collect_images(sorted(image_of), Path(cfg.output_dir), cfg.subset, cfg.image_dir, cfg.image_url,
                                     cfg.workers)
    split_of_copy = {image_of[name]["image_id"]: image_of[first]["split"] for name, first in copies.items()}
    for row in [*rows, *held_out]:
        row["split"] = split_of_copy.get(row["image_id"], row["split"])
    kept = [row for row in rows if Path(row["image_path"]).name not in missing]
    print(f"dropped {len(rows) - len(kept)}: image missing or unreadable")
    if copies:
        print(f"images that are copies of another one and get its split: {len(copies)} ({', '.join(list(copies)[:5])})")
    return kept


def write_dataset(rows, held_out, output_dir):
    """Write the two JSON files, then metadata.csv: an interrupted run leaves no new metadata.csv."""
    with atomic_write(output_dir / "metadata.csv") as temporary, open(temporary, "w", encoding="utf-8", newline="") as stream:
        stream.write(",".join(COLUMNS) + "\n")
        # all texts are quoted: csv would leave a single carriage return unquoted, which readers take for a line end
        writer = csv.DictWriter(stream, COLUMNS, "", "ignore", quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
        writer.writerows(rows)
        write_json(output_dir / "qa_pairs.json", [{name: row[name] for name in (*COLUMNS, "answers")} for row in rows])
        write_json(output_dir / "held_out_annotators.json", held_out)
    print(f"wrote metadata.csv, qa_pairs.json and held_out_annotators.json into {output_dir}")


if __name__ == "__main__":
    settings.run(main, Config)
