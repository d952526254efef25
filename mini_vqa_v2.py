"""Build the mini VQA v2 data set: questions whose most frequent answer is a phrase that several annotators gave.

Reads the official VQA v2 files from --vqa-dir and the COCO images from --image-dir; downloads what is missing.
Writes images/, qa_pairs.json, held_out_annotators.json and, last, metadata.csv into --output-dir; also manifest.csv (size
and sha256 of each image) and, if images are missing, missing.csv. The same command continues a run that was stopped.
Prints how many rows were read, kept, and dropped for each reason, and the images and rows per split. Also:
    python mini_vqa_v2.py --protocol official                                   train2014 trains, val2014 tests
    python mini_vqa_v2.py --subset test2015 --output-dir vqa_test2015           questions without answers
    python mini_vqa_v2.py --questions Q.json --annotations A.json --image-pattern "train2017/{image_id:012d}.jpg"
"""
import csv
import dataclasses
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from tqdm import tqdm

from common import settings
from common.files import SPLITS, atomic_write, file_lock, remove_temporaries, require_separate, write_json
from common.labels import held_out_labels, is_agreed, is_long, majority_answer
from download.http import check_address
from download.images import collect_images
from download.official import NO_VQA_LAYOUT, UNLABELLED, check_own_files, field, read_entries, read_official


@dataclass
class Config:
    vqa_dir: str = "vqa_v2"
    """official text files (.json, .json.gz or the published .zip); missing ones are downloaded into this folder"""
    image_dir: str | None = None
    """folder of COCO images, in it or in its subfolder SUBSET; none = the needed images are downloaded"""
    output_dir: str = "mini_vqa_v2"
    """folder for images/, metadata.csv, qa_pairs.json and held_out_annotators.json"""
    subset: Literal["train2014", "val2014", "test2015", "test-dev2015"] = "train2014"
    """part of VQA v2 and COCO to use; the test subsets have no answers: all their questions are kept, for test.py"""
    protocol: Literal["own", "official"] = "own"
    """own = all splits from SUBSET; official = train2014 trains, VAL_FRACTION of its images validates, val2014 tests"""
    questions: str | None = None
    """questions of another data set in VQA's layout (.json, .json.gz), such as OK-VQA, instead of VQA v2's"""
    annotations: str | None = None
    """the annotations of `questions`"""
    image_pattern: str | None = None
    """with `questions`: path of an image below IMAGE_DIR or IMAGE_URL, such as val2017/{image_id:012d}.jpg"""
    base_url: str = "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa"
    """address of the folder with the official zips"""
    image_url: str = "http://images.cocodataset.org"
    """address of the images: IMAGE_URL/SUBSET/COCO_SUBSET_{image_id:012d}.jpg, or IMAGE_URL/IMAGE_PATTERN"""
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
OUTPUT_FILES = ("metadata.csv", "qa_pairs.json", "held_out_annotators.json", "manifest.csv", "missing.csv")


def main(cfg):
    check_settings(cfg)
    parts = choose_parts(cfg)
    rows, held_out = read_rows(parts)
    check_splits(rows, parts)
    output_dir = Path(cfg.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(output_dir / ".lock", f"another run is writing to --output-dir {output_dir}: wait for it, or name another"):
        remove_temporaries(output_dir)
        if cfg.pictures:
            rows, held_out = keep_rows_with_image(rows, held_out, cfg)
            check_splits(rows, parts)
        print(f"kept {len(rows)}")
        for split in SPLITS:
            images = [row["image_id"] for row in rows if row["split"] == split]
            print(f"{split}: {len(set(images))} images, {len(images)} rows")
        write_dataset(rows, held_out, output_dir)


def check_settings(cfg):
    """Raise ValueError or FileNotFoundError for settings that cannot work, before anything is read or downloaded."""
    settings.check_ranges(cfg, min_answer_words=settings.COUNT, min_agreement=settings.COUNT, max_questions=(0, 10 ** 9),
                          workers=(1, 256), val_fraction=(0, 1), test_fraction=(0, 1))
    if cfg.protocol == "official":
        refuse_changed(cfg, "--protocol official", "subset", "questions", "split", "test_fraction")
    elif cfg.split is None and cfg.val_fraction + cfg.test_fraction > 1:
        raise ValueError(f"--val-fraction {cfg.val_fraction} and --test-fraction {cfg.test_fraction}: their sum is above 1; "
                         "set one of them lower or to 0, or put all images into one split with --split")
    if cfg.subset in UNLABELLED and cfg.split in ("train", "val"):
        raise ValueError(f"--split {cfg.split}: {cfg.subset} has no answers, so all its questions are in the split test")
    own = {"--questions": cfg.questions, "--annotations": cfg.annotations, "--image-pattern": cfg.image_pattern}
    if any(value is not None for value in own.values()):
        check_own_files(own)
        refuse_changed(cfg, "--questions", "subset")
    check_address("--base-url", cfg.base_url)
    check_address("--image-url", cfg.image_url)
    for flag, folder in (("--vqa-dir", cfg.vqa_dir), ("--image-dir", cfg.image_dir), ("--output-dir", cfg.output_dir)):
        if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
            raise ValueError(f"{flag} {folder} is not a folder")
    for name in OUTPUT_FILES:
        inputs = {"--questions": [cfg.questions], "--annotations": [cfg.annotations]}
        require_separate({"--output-dir": Path(cfg.output_dir) / name}, {}, inputs)
    if cfg.pictures and cfg.image_dir is not None and not Path(cfg.image_dir).exists():
        raise FileNotFoundError(f"--image-dir {cfg.image_dir} does not exist; without the flag the images are downloaded")


def refuse_changed(cfg, flag, *names):
    """Raise ValueError if one of the settings `names`, which do not fit to `flag`, is not the default."""
    for name in names:
        if getattr(cfg, name) != getattr(Config, name):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(cfg, name)} cannot be used with {flag}: leave it out")


def choose_parts(cfg):
    """One Config for each subset of the data set, with the pattern of its images and its own shares of the splits."""
    parts = [cfg]
    if cfg.protocol == "official":
        parts = [dataclasses.replace(cfg, test_fraction=0.0), dataclasses.replace(cfg, subset="val2014", split="test")]
    elif cfg.subset in UNLABELLED:
        parts = [dataclasses.replace(cfg, split="test")]
    for number, part in enumerate(parts):
        folder = part.subset.replace("-dev", "")  # test-dev2015 is a part of test2015
        changes = {"image_pattern": part.image_pattern or f"{folder}/COCO_{folder}_{{image_id:012d}}.jpg"}
        if part.split is not None:
            changes |= {"val_fraction": float(part.split == "val"), "test_fraction": float(part.split == "test")}
        parts[number] = dataclasses.replace(part, **changes)
    return parts


def read_rows(parts):
    """(rows of metadata.csv, entries of held_out_annotators.json) of all parts, at most --max-questions of each."""
    rows, held_out, max_questions = [], [], parts[0].max_questions
    for part in parts:
        if part.questions is None:
            questions, annotations = read_official(part.vqa_dir, part.subset, part.base_url)
        else:
            questions = read_entries(Path(part.questions), None, "questions")
            annotations = read_entries(Path(part.annotations), None, "annotations")
        if annotations is None:
            labelled = unlabelled_rows(questions, part)
        else:
            labelled = label_rows(questions, annotations, part)
            held_out += held_out_rows(questions, annotations, part)
        for name in ("question_id", "image_id"):
            if twice := {row[name] for row in rows} & {row[name] for row in labelled}:
                raise ValueError(f"the {name} {min(twice)} is in {parts[0].subset} and in {part.subset}; {NO_VQA_LAYOUT}")
        rows += labelled
    if max_questions > 0:
        dropped = max(0, len(rows) - max_questions)
        print(f"dropped {dropped}: beyond the first {max_questions} (--max-questions)")
        rows, held_out = limit_rows(rows, max_questions), limit_rows(held_out, max_questions)
    return rows, held_out


def unlabelled_rows(questions, part):
    """A row without an answer for each question, by question id."""
    print(f"read {len(questions)} questions without annotations: all of them are kept, without an answer")
    return [make_row(questions[question_id], questions[question_id], f"question {question_id}", part)
            | {"answer": "", "agreement": "", "answers": []} for question_id in sorted(questions)]


def label_rows(questions, annotations, cfg):
    """The rows whose label is long enough and was given often enough, by question id. Prints the number dropped per reason."""
    too_short = f"label of fewer than {cfg.min_answer_words} words (--min-answer-words)"
    disputed = f"label given by fewer than {cfg.min_agreement} annotators (--min-agreement)"
    dropped = {"question without an annotation": len(questions.keys() - annotations.keys()),
               "annotation without a question": len(annotations.keys() - questions.keys()), too_short: 0, disputed: 0}
    rows = []
    for question_id in tqdm(sorted(questions.keys() & annotations.keys()), "labels", delay=1, leave=False):
        annotation, where = annotations[question_id], f"question {question_id}"
        answers = annotation.get("answers")
        if not isinstance(answers, list) or not answers:
            raise ValueError(f"{where} has no list of answers; {NO_VQA_LAYOUT}")
        answers = [field({"answer": answer}, "answer", str, where) for answer in answers]
        label, agreement = majority_answer(answers, annotation.get("multiple_choice_answer"))
        if not is_long(label, cfg):
            dropped[too_short] += 1
        elif not is_agreed(agreement, len(answers), cfg):
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


def held_out_rows(questions, annotations, cfg):
    """The questions that at least one set of all annotators but one would keep, by question id, with `held_out_labels`.

    A score of one annotator from these labels is fair: the annotator's own vote chose neither the label nor the row.
    Call it after `label_rows`, which checks the answers.
    """
    rows = []
    for question_id in tqdm(sorted(questions.keys() & annotations.keys()), "held-out annotators", delay=1, leave=False):
        answers = annotations[question_id]["answers"]
        labels = held_out_labels(answers, cfg)
        if any(label is not None for label in labels):
            row = make_row(questions[question_id], annotations[question_id], f"question {question_id}", cfg)
            rows.append({"question_id": question_id, "image_id": row["image_id"], "split": row["split"],
                         "answers": answers, "labels": labels})
    return rows


def make_row(question, annotation, where, cfg):
    """The columns of one question that do not depend on the answers. Raises ValueError that begins with `where`."""
    image_id = question["image_id"]
    if annotation["image_id"] != image_id:
        raise ValueError(f"{where} has another image_id than its annotation: the two files do not belong together")
    image = PurePosixPath(cfg.image_pattern.format(image_id=image_id))
    return {"image_id": image_id, "question_id": question["question_id"], "question": field(question, "question", str, where),
            "image_path": f"images/{image.name}", "image_source": image.as_posix(),
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


def check_splits(rows, parts):
    """Raise ValueError with the number of rows per split if a split has none, although it has a share of the images."""
    sizes, first = Counter(row["split"] for row in rows), parts[0]
    wanted = {"train": any(part.val_fraction + part.test_fraction < 1 for part in parts),
              "val": any(part.val_fraction > 0 for part in parts), "test": any(part.test_fraction > 0 for part in parts)}
    if any(wanted[split] and sizes[split] == 0 for split in SPLITS):
        found = ", ".join(f"{split} {sizes[split]}" for split in SPLITS)
        test_share = f", --test-fraction {first.test_fraction}" if first.protocol == "own" else ""  # official: refused
        raise ValueError(f"a split has no rows ({found}): keep more questions, or change --val-fraction "
                         f"{first.val_fraction}{test_share} or --seed {first.seed}")


def keep_rows_with_image(rows, held_out, cfg):
    """Collect the images. Returns (rows, held_out) without the rows whose image is missing or cannot be decoded.

    An evaluation server wants an answer to every question: official test questions stay, also without their image.
    """
    source_of = {Path(row["image_path"]).name: row["image_source"] for row in rows}
    missing, copies = collect_images(source_of, Path(cfg.output_dir), cfg.image_dir, cfg.image_url, cfg.workers,
                                     cfg.image_pattern)
    is_official = cfg.protocol == "official" or cfg.subset in UNLABELLED
    without = [row for row in rows if Path(row["image_path"]).name in missing]
    dropped = {row["question_id"] for row in without if not (is_official and row["split"] == "test")}
    print(f"dropped {len(dropped)}: image missing or unreadable")
    if len(without) > len(dropped):
        print(f"kept without an image: {len(without) - len(dropped)} test questions, for test.py --results-json")
    rows = [row for row in rows if row["question_id"] not in dropped]
    return unite_copies(rows, held_out, copies, is_official) if copies else (rows, held_out)


def unite_copies(rows, held_out, copies, test_stays):
    """(rows, held_out) with all copies of an image (equal bytes) in one split, that of the first: no test image is trained on.

    `copies`: {file name: first name with the same bytes}. `test_stays`: test rows keep their split; training and validation
    rows that show a copy of a test image are dropped.
    """
    print(f"images that are copies of another one and get its split: {len(copies)} ({', '.join(list(copies)[:5])})")
    row_of = {Path(row["image_path"]).name: row for row in rows}
    first_of = {row_of[name]["image_id"]: row_of[first]["image_id"] for name, first in copies.items()}
    split_of = {row["image_id"]: row["split"] for row in rows}
    tested = {first_of.get(key, key) for key, split in split_of.items() if test_stays and split == "test"}

    def new_split(row):
        first = first_of.get(row["image_id"], row["image_id"])
        if first in tested:
            return "test" if row["split"] == "test" else None
        return split_of.get(first, row["split"])

    united = [[row | {"split": split} for row in group if (split := new_split(row))] for group in (rows, held_out)]
    if len(united[0]) < len(rows):
        print(f"dropped {len(rows) - len(united[0])}: training image that is a copy of a test image")
    return united


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
