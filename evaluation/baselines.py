"""Floors and ceilings: the scores between which a model's score is read.

A floor is the score of answers that need no understanding of the image. A model that does not beat its floors has
learned nothing from the images. A ceiling is a score that a perfect model could hardly exceed: what one annotator
scores against the others, or what the vocabulary and the answer length can spell at best.

This file has the floors that need no model and the annotator's ceiling. Rows are dicts with the names of
qa_pairs.json: `question`, `answer` (the label), `image_path` or `image_id`, and if known `question_type` and `answers`
(all annotations). No torch here.
"""
import hashlib
from collections import Counter, defaultdict

from tqdm import tqdm

from evaluation.metrics import METRICS, as_columns, exact_match, score_row

LABELS = {"human": "one annotator", "vocabulary": "vocabulary and length"}  # shown names that differ from the key
SIMILARITIES_AT_ONCE = 1 << 23  # question pairs compared per step: keeps the memory below about 100 MB
SAME_SIMILARITY = 1e-9          # cosines closer than this are a tie, so that rounding decides nothing


def shown_name(name):
    """The name of a floor or ceiling in tables, charts and gallery; `name` is its key in the metrics file."""
    return LABELS.get(name, name.replace("_", " "))


def most_frequent_answer(train_answers):
    """The most frequent of the answers (list of str). Of several it is the alphabetically first."""
    if not train_answers:
        raise ValueError("a floor needs at least one training row")
    counts = Counter(train_answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))


def most_frequent_per_type(train_answers, train_types, types):
    """For each of `types` the most frequent training answer of that type; for an unseen type that of all rows."""
    overall = most_frequent_answer(train_answers)
    answers_of = defaultdict(list)
    for answer, kind in zip(train_answers, train_types, strict=True):
        answers_of[kind].append(answer)
    best = {kind: most_frequent_answer(answers) for kind, answers in answers_of.items()}
    return [best.get(kind, overall) for kind in types]


def nearest_question(train_questions, train_answers, questions):
    """For each question the answer of the most similar training question, by cosine of TF-IDF vectors of words.

    Of equally similar training rows the first one counts. A question that shares no word with any training question
    gets the most frequent training answer.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    overall = most_frequent_answer(train_answers)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    analyse = vectorizer.build_analyzer()
    if not any(analyse(question) for question in train_questions):  # scikit-learn refuses an empty vocabulary
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
    """{FLOOR: predictions for `rows`} of the floors that see no image and learn from the texts of `train_rows`."""
    answers = [row["answer"] for row in train_rows]
    train_questions, questions = ([row["question"] for row in part] for part in (train_rows, rows))
    train_types, types = ([row.get("question_type", "") for row in part] for part in (train_rows, rows))
    return {
        "most_frequent": [most_frequent_answer(answers)] * len(rows),
        "most_frequent_per_question_type": most_frequent_per_type(answers, train_types, types),
        "nearest_question": nearest_question(train_questions, answers, questions),
    }


def fold_of(image, folds):
    """The fold of an image: a hash of its name, so it depends on no seed and on no other row."""
    return int.from_bytes(hashlib.sha256(f"fold:{image}".encode()).digest()[:8], "big") % folds


def cross_validated_floors(rows, folds=5):
    """{FLOOR: predictions in row order}: each row is answered from the rows whose images are in the other folds.

    No split is needed, so all rows count. Raises ValueError if the images fill fewer than two folds.
    """
    fold_of_row = [fold_of(row.get("image_id") or row["image_path"], folds) for row in rows]
    used = sorted(set(fold_of_row))
    if len(used) < 2:
        raise ValueError(f"the images of {len(rows)} rows fill {len(used)} of {folds} folds: floors in folds need at "
                         "least two, give more images")
    predictions = defaultdict(lambda: [""] * len(rows))
    for fold in used:
        inside = [number for number, other in enumerate(fold_of_row) if other == fold]
        train = [row for row, other in zip(rows, fold_of_row, strict=True) if other != fold]
        for name, answers in blind_floors(train, [rows[number] for number in inside]).items():
            for number, answer in zip(inside, answers, strict=True):
                predictions[name][number] = answer
    return dict(predictions)


def annotator_scores(answer, annotations):
    """{NAME: score} of one annotator on one question, 0 to 100. NaN if there are fewer than two annotations.

    1. Set aside one annotator who gave the label `answer`. Otherwise the label would be scored against itself.
    2. Score the answer of every other annotator as if it were a prediction: against the label, and for the metrics
       against annotations, against the annotations of all other annotators, also the one set aside.
    3. Take the mean over the annotators of step 2.
    """
    if len(annotations) < 2:
        return {metric.name: float("nan") for metric in METRICS}
    counts = Counter(annotations)  # equal answers score the same, so each is scored once
    set_aside = next((text for text in annotations if exact_match(text, answer)), None)
    if set_aside is not None:
        counts[set_aside] -= 1
    totals = {metric.name: 0.0 for metric in METRICS}
    for text, count in (+counts).items():  # + drops counts of zero
        others = list(annotations)
        others.remove(text)
        for name, score in score_row(text, answer, others).items():
            totals[name] += count * score
    return {name: total / counts.total() for name, total in totals.items()}


def annotator_ceiling(answers, annotations):
    """{NAME: (n,) float64}: `annotator_scores` of n rows; answers: n labels, annotations: n lists of str."""
    pairs = tqdm(zip(answers, annotations, strict=True), total=len(answers), desc="annotator ceiling", unit="row",
                 delay=1, leave=False)
    return as_columns([annotator_scores(*pair) for pair in pairs])
