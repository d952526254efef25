"""Rows of questions and answers, from metadata.csv (which decides) and qa_pairs.json (which adds all human answers).

A CSV of your own needs only the columns image_path, question, answer.
"""
import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path, PurePosixPath

import pandas as pd

SPLITS = ("train", "val", "test")
SPLIT_SHARES = (0.8, 0.1, 0.1)  # of a CSV that has no split column
SPLIT_KEY = "generative-vqa-split"  # constant, so that train.py and test.py always agree
SEPARATORS = ",;\t"
OPTIONAL_COLUMNS = ("question_type", "answer_type")


def read_rows(data_dir, need_answers=True):
    """All rows of `data_dir` (a folder with metadata.csv, or a CSV file) as a DataFrame of strings.

    Columns: question_id, image_id, image_path, question, answer, split, question_type, answer_type and
    `answers` (list of all human answers; [answer] where no qa_pairs.json adds them; empty lists unless
    `need_answers`). Rows without a question or a needed answer are dropped and counted. Raises
    FileNotFoundError or ValueError with a line that says what to do.
    """
    csv_path = data_folder(data_dir) / (Path(data_dir).name if is_csv(data_dir) else "metadata.csv")
    if not csv_path.is_file():
        raise FileNotFoundError(f"{csv_path} not found: build the data set with `python mini_vqa_v2.py`, or name your own "
                                "folder or CSV with --data-dir")
    rows = read_csv(csv_path, need_answers)
    check_image_paths(rows, csv_path)
    needed = ("question", "answer") if need_answers else ("question",)
    empty = (rows[list(needed)].apply(lambda column: column.str.strip()) == "").any(axis=1)
    if empty.any():
        print(f"{csv_path}: {empty.sum()} rows without {' or '.join(needed)} are left out")
        rows = rows[~empty].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{csv_path} has no row with {' and '.join(needed)}")
    if need_answers:
        rows["answers"] = human_answers(rows, csv_path.with_name("qa_pairs.json"))
    else:
        rows["answer"], rows["answers"] = "", [[] for _ in range(len(rows))]
    return rows


def is_csv(data_dir):
    return Path(data_dir).suffix.lower() == ".csv"


def data_folder(data_dir):
    """The folder that image_path is relative to: `data_dir`, or the folder of the CSV that it names."""
    return Path(data_dir).parent if is_csv(data_dir) else Path(data_dir)


def read_csv(csv_path, need_answers=True):
    """The CSV with every cell as the text it is ('n/a' and 'None' are answers), optional columns filled in.

    Cells may hold line breaks, commas and quotes, where quoted; they are separated by commas, or by semicolons or
    tabs, as spreadsheets of some countries write them. Raises ValueError that names the line where it is no such file.
    """
    needed = ("image_path", "question", "answer") if need_answers else ("image_path", "question")
    header, *records = parse_csv(csv_path, needed)
    missing = [column for column in needed if column not in header]
    if missing:
        raise ValueError(f"{csv_path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                         f"it has {', '.join(header):.200}")
    rows = pd.DataFrame(records, columns=header, dtype=str)
    if "image_id" not in rows:
        rows["image_id"] = rows["image_path"]
    if "question_id" not in rows:
        rows["question_id"] = [str(number) for number in range(len(rows))]
    if "split" not in rows:
        rows["split"] = [split_of(path) for path in rows["image_path"]]
    for column in OPTIONAL_COLUMNS:
        if column not in rows:
            rows[column] = ""
    unknown = rows.loc[~rows["split"].isin(SPLITS), "split"]
    if len(unknown):
        raise ValueError(f"{csv_path}: the split {unknown.iloc[0]!r:.60} is none of {', '.join(SPLITS)} ({len(unknown)} rows)")
    twice = rows.loc[rows["question_id"].duplicated(), "question_id"]
    if len(twice):
        raise ValueError(f"{csv_path}: question_id {twice.iloc[0]!r:.60} occurs twice ({len(twice)} such rows)")
    return rows


def parse_csv(csv_path, needed):
    """The header and the records of a UTF-8 CSV (lists of str of equal length), with the separator that its header has."""
    try:
        text = csv_path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{csv_path} is not a UTF-8 CSV file ({error}): save it as CSV in UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{csv_path} is not a UTF-8 CSV file: it holds a NUL character; save it as CSV in UTF-8")
    first_line = text.split("\n", 1)[0].rstrip("\r")
    separator = next((mark for mark in SEPARATORS if set(needed) <= set(first_line.replace('"', "").split(mark))), ",")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    records = []
    try:
        for record in reader:
            if record and records and len(record) != len(records[0]):
                raise ValueError(f"{csv_path}, line {reader.line_num}: {len(record)} cells, the header has "
                                 f"{len(records[0])}; quote a cell that holds a separator or a quote")
            if record:
                records.append(record)
    except csv.Error as error:
        raise ValueError(f"{csv_path}, line {reader.line_num}: {error}; a cell with quotes or line breaks is to be quoted, "
                         "its own quotes doubled") from error
    if not records:
        raise ValueError(f"{csv_path} is not a UTF-8 CSV file: it is empty")
    twice = [name for name, count in Counter(records[0]).items() if count > 1]
    if twice:
        raise ValueError(f"{csv_path} has the column {twice[0]!r} twice")
    return records


def split_of(image_path):
    """The split of a picture in a CSV without a split column: a hash of its path, the same in every script."""
    digest = hashlib.sha256(f"{SPLIT_KEY}:{image_path}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2 ** 64
    train, val, _ = SPLIT_SHARES
    return "train" if draw < train else "val" if draw < train + val else "test"


def check_image_paths(rows, csv_path):
    """Raise ValueError for a path that leaves the data folder."""
    for path in rows["image_path"].unique():
        posix = PurePosixPath(path.replace("\\", "/"))
        if not path or posix.is_absolute() or ".." in posix.parts:
            raise ValueError(f"{csv_path}: image_path {path!r} does not lie inside the folder of the CSV")


def human_answers(rows, json_path):
    """All human answers of each row from qa_pairs.json; [answer] for rows it does not hold or where there is none.

    Raises ValueError where the JSON disagrees with the CSV: then one of them is from another run.
    """
    if not json_path.is_file():
        return [[answer] for answer in rows["answer"]]
    pairs = read_pairs(json_path)
    answers = []
    for row in rows[["question_id", "question", "answer", "image_path"]].to_dict("records"):
        pair = pairs.get(row["question_id"], row)
        for field, value in row.items():
            if str(pair.get(field)) != value:
                raise ValueError(f"question {row['question_id']}: {field} is {value!r:.60} in the CSV and "
                                 f"{pair.get(field)!r:.60} in {json_path}; build both again with `python mini_vqa_v2.py`, or "
                                 "remove the JSON")
        answers.append(pair.get("answers") or [row["answer"]])
    return answers


def read_pairs(json_path):
    """{question_id: entry} of qa_pairs.json. Raises ValueError where it is not what mini_vqa_v2.py writes."""
    try:
        entries = json.loads(json_path.read_text(encoding="utf-8"))
        pairs = {str(entry["question_id"]): entry for entry in entries}
        humans = [entry.get("answers", []) for entry in entries]
        sound = all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in humans)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{json_path} is not what mini_vqa_v2.py writes ({type(error).__name__}: {error!s:.100}); build it "
                         "again or remove it") from error
    if len(pairs) < len(entries):
        twice = next(name for name, count in Counter(str(entry["question_id"]) for entry in entries).items() if count > 1)
        raise ValueError(f"{json_path} has the question_id {twice} twice: build it again or remove it")
    if not sound:
        raise ValueError(f"{json_path} is not what mini_vqa_v2.py writes (answers that are no list of texts); build it again "
                         "or remove it")
    return pairs


def rows_of_split(rows, split):
    """The rows of one split, in order. Raises ValueError where there is none."""
    chosen = rows[rows["split"] == split].reset_index(drop=True)
    if chosen.empty:
        counts = ", ".join(f"{name} {count}" for name, count in rows["split"].value_counts().sort_index().items())
        raise ValueError(f"no rows in the split {split!r} (rows: {counts}); add "
                         "pictures, or set the 'split' column by hand")
    return chosen
