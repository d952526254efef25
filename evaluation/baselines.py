"""Floors and ceilings: the scores between which a model's score is read.

A floor is the score of answers that need no understanding of the image. A model that does not beat its floors has
learned nothing from the images. A ceiling is a score that no model can exceed, or hardly: the label spelled with known
words only, or the answers of an oracle. One annotator is what a person scores against the others; a good model can
exceed it.

Rows are dicts with the names of qa_pairs.json: `question`, `answer` (the label), `image_path` or `image_id`, and if
known `question_type` and `answers` (all annotations). Nothing here needs torch, except the wrong images.
"""
import hashlib
import json
from collections import Counter, defaultdict
from pathlib import Path
from statistics import multimode

import numpy as np
from tqdm import tqdm

from common.files import refuse_device
from evaluation.metrics import METRICS, as_columns, exact_match, score_row, sentence_bleu
from vocab import UNK, WORD, normalise

# displayed names that differ from the key
LABELS = {"human": "one annotator", "vocabulary": "vocabulary and length", "wrong_picture": "wrong image"}
NEIGHBOURS = 10       # training rows that vote on a question, and all that are as similar as the last of them
CANDIDATES = 20       # heaviest answers among which the vote chooses; on the demo all of them score the same within 0.02 BLEU
SIMILARITY_MIB = 128  # memory for the similarities of question pairs
PAIR_BYTES = 20       # of one similarity: sparse (8 and an index of 4), then dense (8)


def display_name(name):
    """The name of a floor or ceiling in tables, charts and gallery; `name` is its key in the metrics file."""
    return LABELS.get(name, name.replace("_", " "))


def progress(items, name):
    return tqdm(items, name, delay=1, leave=False)


def most_frequent_answer(train_answers):
    """The most frequent of the answers. Of several it is the alphabetically first."""
    return min(multimode(train_answers))


def most_frequent_per_type(train_answers, train_types, types):
    """For each of `types` the most frequent training answer of that type; for an unseen type that of all rows."""
    import pandas as pd
    best = pd.Series(train_answers).groupby(train_types).agg(most_frequent_answer)
    return pd.Series(types).map(best).fillna(most_frequent_answer(train_answers)).tolist()


def nearest_question(train_questions, train_answers, questions):
    """For each question the answer that the NEIGHBOURS most similar training rows support best (list of str).

    The votes come from `neighbour_votes`, the answer from `best_answer`. A question that shares no word with any training
    question gets the most frequent training answer.
    """
    asked = list(dict.fromkeys(questions))
    overall = most_frequent_answer(train_answers)
    pairs = zip(progress(asked, "nearest question"), neighbour_votes(train_questions, train_answers, asked), strict=True)
    answer_of = {question: best_answer(votes) if votes else overall for question, votes in pairs}
    return [answer_of[question] for question in questions]


def neighbour_votes(train_questions, train_answers, questions):
    """Yield for each question the votes {answer: weight} of the training rows with the most similar questions.

    Similarity is the cosine of TF-IDF vectors of words. The NEIGHBOURS nearest rows vote, and every row that is as similar
    as the last of them, so that rows with the same question text vote together. A vote weighs its similarity. Rows that
    share no word with the question do not vote.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.utils import gen_batches
    if not any(map(WORD.search, train_questions)):  # scikit-learn refuses an empty vocabulary
        yield from ({} for _ in questions)
        return
    vectorizer = TfidfVectorizer(preprocessor=normalise, tokenizer=WORD.findall, token_pattern=None)
    train, asked = vectorizer.fit_transform(train_questions), vectorizer.transform(questions)  # (rows, words), unit length
    last = max(0, len(train_questions) - NEIGHBOURS)
    for batch in gen_batches(len(questions), max(1, SIMILARITY_MIB * 2**20 // (PAIR_BYTES * len(train_questions)))):
        for similarity in (asked[batch] @ train.T).toarray():  # (training rows,)
            votes = Counter()
            for row in np.flatnonzero((similarity > 0) & (similarity >= np.partition(similarity, last)[last])):
                votes[train_answers[row]] += similarity[row]
            yield votes


def best_answer(votes):
    """The answer of `votes`, {answer: weight}, with the highest expected sentence BLEU if a voter's answer is the label.

    That is the mean of its sentence BLEU against each voter's answer, by weight: minimum Bayes risk (Kumar and Byrne
    2004). Only the CANDIDATES heaviest answers are tried. Of equals the heaviest wins, then the alphabetically first.
    """
    heaviest = sorted(votes, key=lambda answer: (-round(votes[answer], 9), answer))[:CANDIDATES]
    total = sum(votes.values())
    expected = {candidate: sum(weight * sentence_bleu(candidate, answer) for answer, weight in votes.items()) / total
                for candidate in heaviest}
    return max(heaviest, key=lambda candidate: round(expected[candidate], 6))


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


def oracle_ceiling(question_ids, path):
    """{"oracle": texts} from the JSON file of --true-answers; {} without one."""
    if path is None:
        return {}
    try:
        refuse_device(path)
        true_answers = json.loads(Path(path).read_text(encoding="utf-8"))
        texts = [true_answers[question_id] for question_id in question_ids]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise TypeError(f"{wrong[0]!r:.60} is no text")
        return {"oracle": texts}
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"--true-answers {path} is no JSON file with an answer for every tested question "
                         f"({type(error).__name__}: {error!s:.100})") from error


def one_annotator(rows, held_out):
    """What one annotator scores: (scores {NAME: (m,) float64}, m image ids, whether the scores are optimistic).

    With `held_out` (entries of `preprocess.read_held_out`) there is one score per question and annotator with a label: the
    annotator's answer against the label that the others chose, and against the others' answers. Without it,
    `annotator_scores` of each of `rows`; NaN for a row with fewer than two annotations. On real answers these are 2 to 3
    BLEU too high, because each annotator's vote took part in the choice of the label and of the rows.
    """
    scores, groups = [], []
    if not held_out:
        scores = [annotator_scores(row["answer"], row["answers"]) for row in progress(rows, "one annotator")]
        return as_columns(scores), [str(row["image_id"]) for row in rows], True
    for entry in progress(held_out, "one annotator"):
        everyone = Counter(entry["answers"])
        # equal answers score the same, so each is scored once
        for (text, label), count in Counter(zip(entry["answers"], entry["labels"], strict=True)).items():
            if label is not None:
                others = list((everyone - Counter([text])).elements())
                scores += count * [score_row(text, label, others)]
                groups += count * [str(entry["image_id"])]
    return as_columns(scores), groups, False


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
