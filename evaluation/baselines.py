"""Floors and ceilings: the scores between which a model's score is read.

A floor is the score of answers that need no understanding of the image. A model that does not beat its floors has
learned nothing from the images. A ceiling is a score that a perfect model could hardly exceed: what one annotator
scores against the others, or what the vocabulary and the answer length can spell at best.

Rows are dicts with the names of qa_pairs.json: `question`, `answer` (the label), `image_path` or `image_id`, and if
known `question_type` and `answers` (all annotations). Nothing here needs torch, except the wrong images.
"""
import hashlib
import re
from collections import Counter, defaultdict
from statistics import multimode

import numpy as np
import pandas as pd
from tqdm import tqdm

from evaluation.metrics import METRICS, as_columns, exact_match, score_row
from vocab import UNK

# displayed names that differ from the key
LABELS = {"human": "one annotator", "vocabulary": "vocabulary and length", "wrong_picture": "wrong image"}
SIMILARITY_MIB = 128  # memory for the similarities of question pairs


def display_name(name):
    """The name of a floor or ceiling in tables, charts and gallery; `name` is its key in the metrics file."""
    return LABELS.get(name, name.replace("_", " "))


def most_frequent_answer(train_answers):
    """The most frequent of the answers. Of several it is the alphabetically first."""
    return min(multimode(train_answers))


def most_frequent_per_type(train_answers, train_types, types):
    """For each of `types` the most frequent training answer of that type; for an unseen type that of all rows."""
    best = pd.Series(train_answers).groupby(train_types).agg(most_frequent_answer)
    return pd.Series(types).map(best).fillna(most_frequent_answer(train_answers)).tolist()


def nearest_question(train_questions, train_answers, questions):
    """For each question the answer of the most similar training question, by cosine of TF-IDF vectors of words.

    Of equally similar training rows the first one counts. A question that shares no word with any training question
    gets the most frequent training answer.
    """
    from sklearn import config_context
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.metrics import pairwise_distances_argmin
    overall = most_frequent_answer(train_answers)
    if not re.search(r"\w", " ".join(train_questions)):  # scikit-learn refuses an empty vocabulary
        return [overall] * len(questions)
    vectorizer = TfidfVectorizer(token_pattern=r"\w+")
    train, asked = vectorizer.fit_transform(train_questions), vectorizer.transform(questions)  # (rows, words)
    with config_context(working_memory=SIMILARITY_MIB):
        nearest = pairwise_distances_argmin(asked, train, metric="cosine")
    return [train_answers[row] if known else overall for row, known in zip(nearest, asked.getnnz(1) > 0, strict=True)]


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
    return int(hashlib.sha256(f"fold:{image}".encode()).hexdigest()[:16], 16) % folds


def cross_validated_floors(rows, folds=5):
    """{FLOOR: predictions in row order}: each row is answered from the rows whose images are in the other folds.

    No split is needed, so all rows count. Raises ValueError if the images fill fewer than two folds.
    """
    fold_of_row = np.array([fold_of(row.get("image_id") or row["image_path"], folds) for row in rows])
    used = np.unique(fold_of_row)
    if len(used) < 2:
        raise ValueError(f"the images of {len(rows)} rows fill {len(used)} of {folds} folds: floors in folds need at "
                         "least two, give more images")
    rows = np.array(rows, dtype=object)
    predictions = defaultdict(lambda: np.empty(len(rows), dtype=object))
    for fold in used:
        inside = fold_of_row == fold
        for name, answers in blind_floors(rows[~inside], rows[inside]).items():
            predictions[name][inside] = answers
    return {name: answers.tolist() for name, answers in predictions.items()}


def wrong_images(dataset, seed):
    """(N,) image index that shows every row a wrong image; None if there is only one image.

    The distinct images are put in a random circle, and each row gets the image that follows its own.
    """
    import torch
    images, number = dataset.image_index.unique(return_inverse=True)  # number (N,): which of the distinct images
    if len(images) < 2:
        return None
    circle = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    following = torch.empty_like(images)
    following[circle] = images[circle.roll(-1)]
    return following[number]


def vocabulary_limited_labels(labels, vocab, answer_max_len):
    """The labels as the model could write them at best: known words only, truncated to the answer length."""
    return [vocab.decode(index for index in vocab.encode(label, answer_max_len) if index != UNK) for label in labels]


def annotator_scores(label, annotations):
    """{NAME: score} of one annotator on one question, 0 to 100. NaN if there are fewer than two annotations.

    1. Set aside one annotator who gave the label. Otherwise the label would be scored against itself.
    2. Score the answer of every other annotator as if it were a prediction: against the label, and for the metrics
       against annotations, against the annotations of all other annotators, also the one set aside.
    3. Take the mean over the annotators of step 2.
    """
    if len(annotations) < 2:
        return {metric.name: float("nan") for metric in METRICS}
    everyone = Counter(annotations)  # equal answers score the same, so each is scored once
    scored = everyone - Counter([text for text in annotations if exact_match(text, label)][:1])
    scores = [(count, score_row(text, label, list((everyone - Counter([text])).elements()))) for text, count in scored.items()]
    return {metric.name: sum(count * row[metric.name] for count, row in scores) / scored.total() for metric in METRICS}


def annotator_ceiling(labels, annotations):
    """{NAME: (n,) float64}: `annotator_scores` of n rows; annotations: n lists of str."""
    rows = list(zip(labels, annotations, strict=True))
    return as_columns([annotator_scores(*row) for row in tqdm(rows, "annotator ceiling", unit=" rows", delay=1, leave=False)])
