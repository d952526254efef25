"""From the rows of a CSV to batches: rows, dataset, batches, and `build_datasets`, which assembles them.

metadata.csv defines the rows, qa_pairs.json adds the answers of all annotators. A CSV of your own needs only the columns
image_path, question, and answer or answers. A batch is an index selection from stored states.
"""
import contextlib
import csv
import hashlib
import io
import json
import posixpath
import re
from collections import Counter
from pathlib import Path, PurePosixPath

import torch

from common.files import SPLITS, is_text, refuse_device
from common.labels import majority_answer
from features.pixels import MAX_UNREADABLE, decode_images
from features.store import build_store, to_device_soon
from vocab import PAD

SPLIT_SHARES = (0.8, 0.1, 0.1)  # of a CSV that has no split column
SPLIT_KEY = "generative-vqa-split"  # one constant key, so that train.py and test.py always agree
SEPARATORS = ",;\t"
KNOWN_COLUMNS = ("image_path", "question", "answer", "answers", "split", "question_id", "image_id", "question_type",
                 "answer_type")
GROUPED_DIGITS = re.compile(r"\d{1,3}([,\u00a0\u202f]\d{3})+")  # 18,394: a spreadsheet's way to write the id 18394


def read_rows(data_dir, need_answers=True, allow_outside=False, use_split=True):
    """All rows of `data_dir` (a folder with metadata.csv, or a CSV file) as a DataFrame of strings.

    Columns: question_id, image_id, image_path, question, answer, split, question_type, answer_type, and `answers`:
    the list of all annotators' answers, from the CSV's own column or from qa_pairs.json ([answer] without both, [] unless
    `need_answers`). Rows without a question or a needed answer are dropped and counted.
    `allow_outside`: an image_path may leave the folder of the CSV.
    Without `use_split` all rows are in the split "test". Raises FileNotFoundError or ValueError with one line.
    """
    csv_path = csv_file(data_dir)
    refuse_device(csv_path)
    if not csv_path.is_file():
        raise FileNotFoundError(f"{csv_path} not found: build the data set with `python mini_vqa_v2.py`, or name your own "
                                "folder or CSV with --data-dir")
    rows = read_csv(csv_path, need_answers, use_split)
    has_ids = "question_id" in rows
    if not has_ids:
        rows["question_id"] = [str(number) for number in range(len(rows))]
    check_image_paths(rows, csv_path, allow_outside)
    needed = ("question", "answer") if need_answers else ("question",)
    empty = (rows[list(needed)].apply(lambda column: column.str.strip()) == "").any(axis=1)
    if empty.any():
        print(f"{csv_path}: {empty.sum()} rows without {' or '.join(needed)} are left out")
        rows = rows[~empty].reset_index(drop=True)
    if rows.empty:
        raise ValueError(f"{csv_path} has no row with {' and '.join(needed)}"
                         + "; `test.py --data-csv` answers questions that have no answers" * need_answers)
    if not need_answers:
        rows["answer"], rows["answers"] = "", [[] for _ in range(len(rows))]
    elif "answers" not in rows:
        rows["answers"] = annotators_answers(rows, csv_path.with_name("qa_pairs.json"), has_ids)
    elif csv_path.with_name("qa_pairs.json").is_file():
        print(f"{csv_path.with_name('qa_pairs.json')} is not used: the CSV has the column answers")
    return rows


def is_csv(data_dir):
    return Path(data_dir).suffix.lower() in (".csv", ".tsv")


def csv_file(data_dir):
    """The CSV that `data_dir` names, or the metadata.csv in that folder."""
    return Path(data_dir) if is_csv(data_dir) else Path(data_dir) / "metadata.csv"


def data_folder(data_dir):
    """The folder that image_path is relative to: `data_dir`, or the folder of the CSV that it names."""
    return Path(data_dir).parent if is_csv(data_dir) else Path(data_dir)


def data_paths(data_dir):
    """The files of `data_dir` that no output may replace, besides the images, which may lie elsewhere."""
    csv_path = csv_file(data_dir)
    return [csv_path, *(csv_path.with_name(name) for name in ("qa_pairs.json", "held_out_annotators.json"))]


def read_csv(csv_path, need_answers=True, use_split=True):
    """The CSV as text cells ('n/a' and 'None' are answers), with the optional columns filled in.

    Cells are separated by commas, semicolons or tabs: spreadsheets write semicolons in some countries.
    Raises ValueError if the file is no such CSV; the message names the line.
    """
    import pandas as pd
    header, records, lines = parse_csv(csv_path)
    needed = ("image_path", "question", "answer") if need_answers and "answers" not in header else ("image_path", "question")
    missing = [column for column in needed if column not in header]
    if missing:
        raise ValueError(f"{csv_path} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
                         f"it has {', '.join(header):.200}")
    rows = pd.DataFrame(records, columns=header, dtype=str).drop(columns="", errors="ignore")  # columns without a name
    for column in rows.columns.intersection(["question_id", "image_id"]):
        for line, cell in zip(lines, rows[column], strict=True):
            if GROUPED_DIGITS.fullmatch(cell):
                raise ValueError(f"{csv_path}, line {line}: the {column} {cell!r:.60} is a number that a spreadsheet has "
                                 "grouped; format the column as text or as a number without separators, and save again")
    if need_answers and "answers" in rows:
        read_answers(rows, csv_path, lines)
    if "image_id" not in rows:
        rows["image_id"] = [posixpath.normpath(path) for path in rows["image_path"]]
    if not use_split:
        rows["split"] = "test"
    if "split" not in rows:
        rows["split"] = [split_of(path) for path in rows["image_path"]]
    for column in ("question_type", "answer_type"):
        if column not in rows:
            rows[column] = ""
    unknown = rows.loc[~rows["split"].isin(SPLITS), "split"]
    if len(unknown):
        raise ValueError(f"{csv_path}: the split {unknown.iloc[0]!r:.60} is none of {', '.join(SPLITS)} ({len(unknown)} rows)")
    if "question_id" in rows and len(twice := rows.loc[rows["question_id"].duplicated(), "question_id"]):
        raise ValueError(f"{csv_path}: question_id {twice.iloc[0]!r:.60} occurs twice ({len(twice)} such rows)")
    return rows


def read_answers(rows, csv_path, lines):
    """Turn the JSON cells of the column answers into lists of str; fill in the column answer where it is missing or empty.

    The label is the most frequent answer, of several the alphabetically first. A row with only a label has [label]. `lines`:
    the line of each row, for the message of the ValueError for a cell that is no list of texts.
    """
    labels = rows["answer"] if "answer" in rows else [""] * len(rows)
    filled = []
    for line, cell, label in zip(lines, rows["answers"], labels, strict=True):
        try:
            answers = json.loads(cell) if cell.strip() else []
            if not isinstance(answers, list) or not all(
                    isinstance(text, str) and is_text(text) and "\0" not in text for text in answers):
                raise ValueError
        except (ValueError, RecursionError):
            raise ValueError(f"{csv_path}, line {line}: the cell of the column answers {cell!r:.60} is no JSON list of texts, "
                             'such as ["a cat", "cat"]; in a CSV its quotes are doubled: "[""a cat"", ""cat""]"') from None
        answers = [text for text in answers if text.strip()] or [label]
        filled.append((label if label.strip() else majority_answer(answers)[0], answers))
    rows["answer"], rows["answers"] = [label for label, _ in filled], [answers for _, answers in filled]


def parse_csv(csv_path):
    """The header of a UTF-8 CSV, its records (lists of str, as long as the header) and the line where each begins.

    The header shows the separator. Rows without any text are left out and counted: spreadsheets write `,,,` for an empty row.
    """
    try:
        text = csv_path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise ValueError("it contains a NUL character")
    except ValueError as error:  # also of bytes that are no UTF-8
        raise ValueError(f"{csv_path} is not a UTF-8 CSV file ({error}): save it as CSV in UTF-8") from error
    records, lines, line, blank = [], [], 1, 0
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=find_separator(text), strict=True)
    try:
        for record in reader:
            if not any(map(str.strip, record)):
                blank += bool(record)  # an empty line gives [] and is no row at all
            elif records and len(record) != len(records[0]):
                raise ValueError(f"{csv_path}, line {line}: {len(record)} cells, the header has {len(records[0])}; quote a "
                                 "cell that contains a separator or a quote")
            else:
                records.append(record)
                lines.append(line)
            line = reader.line_num + 1  # where the next record begins
    except csv.Error as error:
        raise ValueError(f"{csv_path}, line {line}: {error}; a cell with quotes or line breaks must be quoted, and its own "
                         f"quotes doubled; a cell may have {csv.field_size_limit():,} characters") from error
    if not records:
        raise ValueError(f"{csv_path} is not a UTF-8 CSV file: it is empty")
    if blank:
        print(f"{csv_path}: {blank} blank rows are left out")
    header = [name.strip() for name in records[0]]
    header = [name.lower() if name.lower() in KNOWN_COLUMNS else name for name in header]
    twice = [name for name, count in Counter(header).items() if name and count > 1]
    if twice:
        raise ValueError(f"{csv_path} has the column {twice[0]!r} twice")
    return header, records[1:], lines[1:]


def find_separator(text):
    """The separator that splits the first line with text into the columns image_path and question; else a comma."""
    first_line = next((line for line in text.splitlines() if line.strip(SEPARATORS + " ")), "").replace('"', "")
    return next((mark for mark in SEPARATORS
                 if {"image_path", "question"} <= {name.strip().lower() for name in first_line.split(mark)}), ",")


def split_of(image_path):
    """The split of an image in a CSV without a split column: by a hash of its path, the same in every script.

    All spellings of a path, such as a.jpg and ./a.jpg, fall into one split.
    """
    digest = hashlib.sha256(f"{SPLIT_KEY}:{posixpath.normpath(image_path)}".encode()).digest()
    draw = int.from_bytes(digest[:8], "big") / 2 ** 64
    train, val, _ = SPLIT_SHARES
    return "train" if draw < train else "val" if draw < train + val else "test"


def check_image_paths(rows, csv_path, allow_outside):
    """Raise ValueError for an empty path, or for one that leaves the data folder unless that is allowed."""
    for path in rows["image_path"].unique():
        posix = PurePosixPath(path.replace("\\", "/"))
        if not path.strip():
            raise ValueError(f"{csv_path}: a row has no image_path")
        if not allow_outside and (posix.is_absolute() or ".." in posix.parts):
            raise ValueError(f"{csv_path}: image_path {path!r} is absolute or leaves the folder of the CSV; if it is "
                             "meant, use --allow-outside")


def annotators_answers(rows, json_path, has_ids=True):
    """The answers of all annotators for each row, from qa_pairs.json; [answer] for a row that is not in it.

    Such rows are counted. Unless the CSV `has_ids`, the JSON is not used: row numbers may be ids of other questions.
    Raises ValueError if JSON and CSV disagree or share no row: then one of them is from another run.
    """
    if not json_path.is_file():
        return [[answer] for answer in rows["answer"]]
    if not has_ids:
        print(f"{json_path} is not used: the CSV has no column question_id")
        return [[answer] for answer in rows["answer"]]
    pairs = read_pairs(json_path)
    missing = rows.loc[~rows["question_id"].isin(list(pairs)), "question_id"]
    if len(missing) == len(rows):
        raise ValueError(f"{json_path} has none of the {len(rows)} rows of the CSV: no question_id is in both files (the CSV "
                         f"has {missing.iloc[0]!r:.60}); give the CSV the column question_id, or remove the JSON")
    if len(missing):
        print(f"{json_path} lacks {len(missing)} of {len(rows)} rows, for example question {missing.iloc[0]!r:.60}: the "
              "answer of the CSV is their only one")
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
    """{question_id: entry} of qa_pairs.json. Raises ValueError if it is not what mini_vqa_v2.py writes."""
    with refuse_damage(json_path):
        entries = json.loads(json_path.read_text(encoding="utf-8"))
        pairs = {str(entry["question_id"]): entry for entry in entries}
        for entry in entries:
            if not isinstance(entry.get("answers", []), list) or not all(isinstance(a, str) for a in entry.get("answers", [])):
                raise ValueError(f"the answers of question {entry['question_id']} are not a list of texts")
        if len(pairs) < len(entries):
            twice = Counter(str(entry["question_id"]) for entry in entries).most_common(1)[0][0]
            raise ValueError(f"it has the question_id {twice} twice")
    return pairs


@contextlib.contextmanager
def refuse_damage(json_path):
    """Turn any error that a damaged `json_path` causes into a ValueError of one line."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{json_path} is not what mini_vqa_v2.py writes ({type(error).__name__}: {error!s:.100}); build it "
                         "again or remove it") from error


def read_held_out(data_dir, rows, split=None):
    """The entries of held_out_annotators.json, of one split or of all; [] for a CSV of your own, or without the file.

    `rows`: the DataFrame of `read_rows`.
    An entry is a dict with question_id, image_id, split, answers (all annotations) and labels: for each annotator the
    label that the others choose, or None. Raises ValueError if it is not what mini_vqa_v2.py writes, or if it is of another
    build: then an entry has other answers, or another split if that is asked for, than the same question in `rows`.
    """
    json_path = data_folder(data_dir) / "held_out_annotators.json"
    own_csv = is_csv(data_dir) and Path(data_dir).name != "metadata.csv"
    if own_csv or not json_path.is_file():
        return []
    with refuse_damage(json_path):
        entries = json.loads(json_path.read_text(encoding="utf-8"))
        known = dict(zip(rows["question_id"], zip(rows["answers"], rows["split"], strict=True), strict=True))
        for entry in entries:
            check_held_out(**entry)
            answers, own_split = known.get(str(entry["question_id"]), (entry["answers"], entry["split"]))
            if answers != entry["answers"] or (split is not None and own_split != entry["split"]):
                raise ValueError(f"question {entry['question_id']} has other answers or another split than in metadata.csv")
    return [entry for entry in entries if split in (None, entry["split"])]


def check_held_out(question_id, image_id, split, answers, labels):
    """Raise ValueError if this is no entry of held_out_annotators.json."""
    if not isinstance(image_id, int | str) or split not in SPLITS:
        raise ValueError(f"question {question_id} has the image_id {image_id!r:.20} and the split {split!r:.20}")
    known = [label for label in labels if label is not None]
    if not (isinstance(labels, list) and known and len(labels) == len(answers) >= 2
            and all(isinstance(text, str) for text in answers + known)):
        raise ValueError(f"question {question_id} lacks the answers of two or more annotators, or a label for each")


def rows_of_split(rows, split):
    """The rows of one split, in order. Raises ValueError if there are none."""
    chosen = rows[rows["split"] == split].reset_index(drop=True)
    if chosen.empty:
        counts = ", ".join(f"{name} {count}" for name, count in rows["split"].value_counts().sort_index().items())
        raise ValueError(f"no rows in the split {split!r} (rows: {counts}); set the column 'split' by hand, "
                         "or build the data with other shares (mini_vqa_v2.py --val-fraction, --test-fraction)")
    return chosen


def report_answers(rows, vocab, answer_max_len):
    """Print how many answers of `rows` are truncated, and how many of their words are not in the vocabulary."""
    tokens = [vocab.tokenize(answer) for answer in rows["answer"]]
    truncated, longest = sum(len(words) > answer_max_len - 1 for words in tokens), max(map(len, tokens))
    remedy = f" (the longest has {longest}: see train.py --answer-max-len)" if truncated else ""
    unknown = sum(word not in vocab.ids for words in tokens for word in words)
    total, rare = sum(map(len, tokens)), ": see train.py --min-word-freq" if unknown else ""
    print(f"answers ({rows['split'].iloc[0]}): {len(tokens)} rows, {truncated} truncated to {answer_max_len - 1} words"
          f"{remedy}, {unknown} of {total} words unknown ({unknown / total:.1%}{rare})")


def answer_choices(rows):
    """For each row the annotators' answers (list of str) that have at least as many words as the shortest label.

    A row without such an answer keeps its label. Repeated answers stay, so that a frequent answer is drawn often.
    """
    fewest = min(len(label.split()) for label in rows["answer"])
    long_enough = ([text for text in answers if len(text.split()) >= fewest] for answers in rows["answers"])
    return [texts or [label] for texts, label in zip(long_enough, rows["answer"], strict=True)]


def training_answers(rows, answer_sampling):
    """All answers (list of str) that training may show. The vocabulary is built from them."""
    return [text for texts in answer_choices(rows) for text in texts] if answer_sampling == "humans" else list(rows["answer"])


def require_annotators(rows):
    """Raise ValueError if `answer_choices` leaves nothing to choose: every row has only its label."""
    if all(set(texts) == {label} for texts, label in zip(answer_choices(rows), rows["answer"], strict=True)):
        raise ValueError(f"--answer-sampling humans: none of the {len(rows)} training rows has another answer than its "
                         "label; put the annotators' answers into the CSV's column answers or into qa_pairs.json, or use "
                         "train.py --answer-sampling majority")


class VQADataset:
    """Rows of one split as tensors. A batch is an index selection, with no work per row.

    `image_index` and `question_index` (N,) are the index of each row's image and question in the store. Each distinct
    answer is encoded once: `answer_ids` (answers, A + 1) are <start>, the words, <end>, then <pad>; `answer_index` (N,)
    is the index of each row's label among them.
    """

    def __init__(self, rows, vocab, answer_max_len, store, answer_sampling="majority"):
        """`store`: the FeatureStore with the states of all images and questions of `rows`. `answer_sampling`:
        "humans" lets `draw_answers` draw from the annotators' answers, "majority" always gives the labels."""
        self.rows, self.vocab, self.store = rows, vocab, store
        self.image_index = torch.tensor([store.row_of_image[path] for path in rows["image_path"]])
        self.question_index = torch.tensor([store.row_of_question[question] for question in rows["question"]])
        choices = answer_choices(rows) if answer_sampling == "humans" else [[label] for label in rows["answer"]]
        texts = sorted(set(rows["answer"]).union(*choices))
        number = {text: index for index, text in enumerate(texts)}
        self.answer_index = torch.tensor([number[text] for text in rows["answer"]])
        self.choices = torch.tensor([number[text] for row in choices for text in row])   # all rows' choices, one after another
        self.num_choices = torch.tensor([len(row) for row in choices])                   # (N,)
        encoded = [torch.tensor(vocab.encode(text, answer_max_len)) for text in texts]
        self.answer_lengths = torch.tensor([len(ids) for ids in encoded])
        self.answer_ids = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=PAD).to(store.device)

    def __len__(self):
        return len(self.rows)

    def epoch_order(self, generator, by_image):
        """A random order of the rows (N,). `by_image`: the images are shuffled and an image's rows stay together,
        so that trainable image blocks run once for all its questions."""
        if not by_image:
            return torch.randperm(len(self), generator=generator)
        place = torch.randperm(int(self.image_index.max()) + 1, generator=generator)
        return (place[self.image_index] + torch.rand(len(self), generator=generator, dtype=torch.float64)).argsort()

    def draw_answers(self, generator):
        """The index (N,) of the answer that one epoch teaches for each row, drawn from the row's choices."""
        first = self.num_choices.cumsum(0) - self.num_choices
        draw = torch.rand(len(self), generator=generator, dtype=torch.float64)
        return self.choices[first + (draw * self.num_choices).long()]

    def batch(self, index, image_index=None, answer_index=None):
        """The rows `index` (B,) as a dict of tensors on the store's device, lengths trimmed to the longest of them.

        The batch contains each distinct image and question once; `image_row` and `question_row` (B,) are the index
        of each row's image and question. `image_index` (N,) gives the rows other images, `answer_index` (N,) other answers.
        """
        store = self.store
        images = (self.image_index if image_index is None else image_index)[index]
        answers = (self.answer_index if answer_index is None else answer_index)[index]
        images, image_row = images.unique(return_inverse=True)
        questions, question_row = self.question_index[index].unique(return_inverse=True)
        lengths = store.question_lengths[questions]
        question_length, answer_length = int(lengths.max()), int(self.answer_lengths[answers].max())
        states = store.select(store.question_states, questions)
        mask = torch.arange(question_length) < lengths.unsqueeze(1)      # (distinct questions, Q)
        # small tensors from the host, copied without synchronising the device
        image_row, question_row, mask, answers = (
            to_device_soon(tensor, store.device) for tensor in (image_row, question_row, mask, answers))
        return {"image_states": store.select(store.image_states, images), "image_row": image_row,
                "question_states": states[:, :question_length] if states.dim() == 3 else states,
                "question_row": question_row, "attention_mask": mask,
                "answer_ids": self.answer_ids[answers, :answer_length]}

    def data_hash(self):
        """Hash of the rows: questions, image names, labels and all annotators' answers."""
        columns = ["question_id", "image_path", "question", "answer", "answers"]
        return hashlib.sha256(self.rows[columns].to_csv(index=False).encode()).hexdigest()[:16]


def build_datasets(model, encoders, vocab, rows, folder, cfg, precision, splits, answer_sampling="majority",
                   max_unreadable=MAX_UNREADABLE):
    """{split: VQADataset}: rows -> decoded images -> stored states at the model's freeze boundary -> datasets.

    The model is moved to the device. `folder`: what image_path is relative to. All `rows` are decoded and encoded, so
    that a later script finds them in `cfg.cache_dir`. Rows whose image is unreadable are dropped and counted; more than
    the share `max_unreadable` of the images is an error.
    `answer_sampling` is for "train" only. Raises ValueError if it is "humans" and no training row has more than its label.
    """
    for split in splits:
        rows_of_split(rows, split)  # an empty split is found before minutes of encoding
    if answer_sampling == "humans":
        require_annotators(rows_of_split(rows, "train"))
    model.place(precision)
    pixels = decode_images(folder, rows["image_path"], encoders.image, cfg.cache_dir, cfg.workers, max_unreadable)
    rows = pixels.readable(rows)
    store = build_store(model, encoders, pixels, rows["question"], cfg.cache_dir, precision)
    return {split: VQADataset(rows_of_split(rows, split), vocab, model.config.answer_max_len, store,
                              answer_sampling if split == "train" else "majority") for split in splits}
