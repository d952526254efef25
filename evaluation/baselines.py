"""Floors and ceilings that need no model: what the training answers alone reach, and what one human reaches.

Works on rows as dictionaries with the names of qa_pairs.json: `question`, `answer`, `image_path` or `image_id`,
and where known `question_type` and `answers` (all human answers). No torch here.
"""
import hashlib
from collections import Counter, defaultdict

import numpy as np
from tqdm import tqdm

from evaluation.metrics import NAMES, exact_match, score_row

SIMILARITIES_AT_ONCE = 1 << 23  # question pairs compared per step: bounds the memory to some 100 MB
SAME_SIMILARITY = 1e-9          # cosines closer than this are a tie, so that rounding decides nothing


def most_frequent_answer(train_answers):
    """The most frequent of the answers (list of str); ties go to the alphabetically first."""
    if not train_answers:
        raise ValueError("a floor needs at least one training row")
    counts = Counter(train_answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def most_frequent_per_type(train_answers, train_types, types):
    """For each of `types`, the most frequent training answer of that type; an unseen type gets that of all rows."""
    overall = most_frequent_answer(train_answers)
    answers_of = defaultdict(list)
    for answer, kind in zip(train_answers, train_types, strict=True):
        answers_of[kind].append(answer)
    best = {kind: most_frequent_answer(answers) for kind, answers in answers_of.items()}
    return [best.get(kind, overall) for kind in types]


def nearest_question(train_questions, train_answers, questions):
    """For each question, the answer of the training question nearest in words: TF-IDF, cosine, no picture.

    Ties go to the first training row. A question that shares no word with any training question gets the most
    frequent training answer.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    overall = most_frequent_answer(train_answers)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    analyse = vectorizer.build_analyzer()
    if not any(analyse(question) for question in train_questions):  # nothing to learn: scikit-learn would refuse
        return [overall] * len(questions)
    train = vectorizer.fit_transform(train_questions).T.tocsr()  # (words, training rows), columns of length 1
    asked = vectorizer.transform(questions)                      # (rows, words), rows of length 1 or 0
    step = max(1, SIMILARITIES_AT_ONCE // len(train_questions))
    predictions = []
    for start in tqdm(range(0, len(questions), step), desc="nearest questions", unit="batch", delay=1, leave=False):
        similarity = (asked[start:start + step] @ train).toarray()  # (batch, training rows)
        best = similarity.max(1)
        nearest = (similarity >= best[:, None] - SAME_SIMILARITY).argmax(1)
        predictions += [train_answers[row] if score > 0 else overall for row, score in zip(nearest, best, strict=True)]
    return predictions


def blind_floors(train_rows, rows):
    """{FLOOR: predictions for `rows`} of the floors that see no picture, learned from `train_rows`.

    FLOOR is `most_frequent`, `most_frequent_per_question_type` or `nearest_question`.
    """
    answers = [row["answer"] for row in train_rows]
    train_questions, train_types = _questions_and_types(train_rows)
    questions, types = _questions_and_types(rows)
    return {
        "most_frequent": [most_frequent_answer(answers)] * len(rows),
        "most_frequent_per_question_type": most_frequent_per_type(answers, train_types, types),
        "nearest_question": nearest_question(train_questions, answers, questions),
    }


def _questions_and_types(rows):
    return [row["question"] for row in rows], [row.get("question_type", "") for row in rows]


def fold_of(picture, folds):
    """The fold of a picture: a hash of its name, so that no row, seed or order of rows moves it."""
    return int.from_bytes(hashlib.sha256(f"fold:{picture}".encode()).digest()[:8], "big") % folds


def cross_validated_floors(rows, folds=5):
    """{FLOOR: predictions in row order}: each row answered from the rows of pictures in the other folds.

    Needs no split, so every labelled row counts. Raises ValueError if the pictures fill fewer than two folds.
    """
    fold_of_row = [fold_of(row.get("image_id") or row["image_path"], folds) for row in rows]
    used = sorted(set(fold_of_row))
    if len(used) < 2:
        raise ValueError(f"the pictures of {len(rows)} rows fill {len(used)} of {folds} folds: floors in folds need "
                         "at least two, give more pictures")
    predictions = {}
    for fold in used:
        inside = [at for at, other in enumerate(fold_of_row) if other == fold]
        train = [row for row, other in zip(rows, fold_of_row, strict=True) if other != fold]
        for name, answers in blind_floors(train, [rows[at] for at in inside]).items():
            column = predictions.setdefault(name, [""] * len(rows))
            for at, answer in zip(inside, answers, strict=True):
                column[at] = answer
    return predictions


def human_ceiling(answer, answers):
    """{NAME: score} of one human on one question, 0 to 100; NaN where the question has fewer than two answers.

    One giver of the label `answer` is set aside, so that the vote is not scored against itself. Every other human
    is scored as if a prediction, and the mean taken: against the label, but multi-reference BLEU and VQA accuracy
    against all the humans but that one (the one set aside among them).
    """
    if len(answers) < 2:
        return dict.fromkeys(NAMES, float("nan"))
    giver = next((given for given in answers if exact_match(given, answer)), None)
    weights = Counter(answers)  # humans who wrote the same words score the same
    if giver is not None:
        weights[giver] -= 1
    totals = dict.fromkeys(NAMES, 0.0)
    for given, weight in weights.items():
        if not weight:
            continue
        others = list(answers)
        others.remove(given)
        for name, score in score_row(given, answer, others).items():
            totals[name] += weight * score
    return {name: total / weights.total() for name, total in totals.items()}


def human_ceiling_rows(answers, human_answers):
    """{NAME: (n,) float64}: `human_ceiling` of n rows, NaN where a question has fewer than two human answers."""
    pairs = tqdm(zip(answers, human_answers, strict=True), total=len(answers), desc="human ceiling", unit="row",
                 delay=1, leave=False)
    rows = [human_ceiling(answer, humans) for answer, humans in pairs]
    return {name: np.array([row[name] for row in rows], dtype=np.float64) for name in NAMES}
