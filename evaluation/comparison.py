"""Two results, or several seeds on both sides, compared by question: B - A with intervals."""
from pathlib import Path

import numpy as np
import pandas as pd

from common.files import refuse_device
from common.settings import printable
from evaluation.bootstrap import difference_over_seeds, interval_name
from evaluation.metrics import SCORE_COLUMNS

COMPARED = (*SCORE_COLUMNS, "confidence")  # columns of a results CSV
SAME = ("question", "answer", "image_id")  # columns that two results share if they answer the same questions
ROUNDING = 0.001  # equal scores may differ by this: a results CSV has four decimals
CHANGED_ROWS = 5  # shown at either end of a comparison


def print_comparison(paths_a, paths_b):
    """Print how the scores of B differ from those of A, paired by question; and of one pair the rows that changed most.

    paths_a, paths_b: as many results CSVs on both sides; the i-th of each side are a pair, for example of one seed.
    """
    tables = join_all(paths_a, paths_b)
    groups, number = tables[0]["image_id_a"], len(tables)
    interval = interval_name(groups.nunique(), "over seeds and images" if number > 1 else "by image")
    print(f"\n{len(groups)} questions on {groups.nunique()} images, {number} result{'s' * (number > 1)} on each side, "
          f"B - A [{interval}]; above zero B is better")
    for side, paths in (("A", paths_a), ("B", paths_b)):
        print(printable(f"  {side} = {', '.join(map(str, paths))}"))
    for name in COMPARED:
        a, b = (np.array([table[f"{name}_{side}"] for table in tables]) for side in "ab")  # (pairs, questions)
        difference, low, high = difference_over_seeds(b, a, groups)
        each = f"   each pair: {', '.join(f'{pair:+.2f}' for pair in (b - a).mean(1))}" if number > 1 else ""
        print(f"  {name:<14} {a.mean():8.2f} -> {b.mean():8.2f}   {difference:+.2f} [{low:+.2f}, {high:+.2f}]{each}")
    if number == 1:
        print_changed_rows(tables[0])


def print_changed_rows(table):
    """Print the answers of a pair (from `join_results`) that improved and worsened most."""
    table = table.assign(change=table["sentence_bleu_b"] - table["sentence_bleu_a"])
    changed = table[table["prediction_a"] != table["prediction_b"]].sort_values("change", kind="stable")
    better, worse = (changed["change"] > 0).sum(), (changed["change"] < 0).sum()
    print(f"  {len(changed)} answers changed, {better} for the better and {worse} for the worse in sentence BLEU")
    for title, rows in (("most improved", changed[::-1]), ("most worsened", changed)):
        print(f"\n{title}")
        for row in rows[:CHANGED_ROWS].itertuples():
            print(printable(f"  {row.change:+6.1f}  {row.question_a}  label: {row.answer_a}  A: {row.prediction_a}  "
                            f"B: {row.prediction_b}"))


def join_all(paths_a, paths_b):
    """[DataFrame of `join_results`] of each pair, all with the same questions in the same order.

    Raises ValueError if the sides differ in number, if a side names a file twice, or if two results answer different
    questions.
    """
    if len(paths_a) != len(paths_b):
        raise ValueError(f"--compare has {len(paths_a)} results and --against {len(paths_b)}: the first of one side is "
                         "compared with the first of the other, and so on, so give as many on both sides")
    for paths in (paths_a, paths_b):
        if len({Path(path).resolve() for path in paths}) < len(paths):
            raise ValueError(f"--compare: {', '.join(map(str, paths))} names a file twice; the results of one side are of "
                             "different seeds")
    tables = [join_results(*pair) for pair in zip(paths_a, paths_b, strict=True)]
    for path, table in zip(paths_a, tables, strict=True):
        check_same_questions(paths_a[0], tables[0], path, table, "_a")
    order = tables[0]["question_id"]
    return [table.set_index("question_id").loc[order].reset_index() for table in tables]


def join_results(path_a, path_b):
    """Two results CSVs side by side, joined on question_id; all other columns end in _a or _b.

    Raises ValueError if they answer different questions.
    """
    a, b = (read_results(path) for path in (path_a, path_b))
    check_same_questions(path_a, a, path_b, b)
    return a.merge(b, on="question_id", suffixes=("_a", "_b"))


def check_same_questions(path_a, a, path_b, b, suffix=""):
    """Raise ValueError unless both tables hold the same questions, once each, with the same texts, labels and images.

    Also raises it if an equal prediction has another sentence BLEU: then the two were scored in different ways.
    """
    ids = set(a["question_id"])
    if not len(a) == len(b) == len(ids) or ids != set(b["question_id"]) or not ids:
        raise ValueError(f"--compare: {path_a} ({len(a)} rows) and {path_b} ({len(b)} rows) answer different questions; "
                         "compare runs of test.py on the same data and split")
    a, b = (table.sort_values("question_id") for table in (a, b))
    for name in SAME:
        differ = a[f"{name}{suffix}"].to_numpy() != b[f"{name}{suffix}"].to_numpy()
        if differ.any():
            raise ValueError(f"--compare: {path_a} and {path_b} differ in the {name} of question "
                             f"{a['question_id'].to_numpy()[differ][0]!r:.60}; compare runs of test.py on the same data")
    (text_a, score_a), (text_b, score_b) = ([table[f"{name}{suffix}"].to_numpy() for name in ("prediction", "sentence_bleu")]
                                            for table in (a, b))
    differ = (text_a == text_b) & (abs(score_a - score_b) > ROUNDING)
    if differ.any():
        raise ValueError(f"--compare: {path_a} and {path_b} score the prediction of question "
                         f"{a['question_id'].to_numpy()[differ][0]!r:.60} differently, though it is the same; score both again "
                         "with the same --bleu-tokenize and this version of test.py")


def read_results(path):
    """A results CSV of test.py: scores as numbers, the rest as text. Raises ValueError if `path` is none."""
    try:
        refuse_device(path)
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare: {path} is not a results CSV of test.py: {error}") from error
    missing = {"question_id", "image_id", "question", "answer", "prediction", *COMPARED} - set(table.columns)
    if missing:
        raise ValueError(f"--compare: {path} is not a results CSV of test.py: it lacks {', '.join(sorted(missing))}")
    if (table[list(COMPARED)] == "").any(axis=None):
        raise ValueError(f"--compare: {path} holds answers without scores")
    for name in COMPARED:
        highest, numbers = 1 if name == "confidence" else 100, pd.to_numeric(table[name], errors="coerce")
        wrong = table.loc[~numbers.between(0, highest), name]
        if len(wrong):
            raise ValueError(f"--compare: {path} is not a results CSV of test.py: {name} {wrong.iloc[0]!r:.60} is no number "
                             f"from 0 to {highest} ({len(wrong)} such rows)")
        table[name] = numbers
    return table
