"""Floors and one annotator, by hand and on real answers if they are here."""
import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mini_vqa_v2
from evaluation import baselines, bootstrap, metrics
from mini_vqa_v2 import Config, held_out_labels, majority_answer
from vocab import SPECIALS, Vocab

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "data" / "vqa_v2_text"
BLACK, BROWN = "black and white", "black and brown"
BROWN_FOR_BLACK = 100 * (1 / 6) ** (1 / 3)  # sentence BLEU of one for the other, see test_metrics.py


def made_up_rows(num_images=40):
    """The same three questions with the same answers on each image, so that nearest_question is always right."""
    asked = [("what color is the cat", "what color", BLACK), ("what is on the table", "what is", "a red cup"),
             ("what color is the big dog", "what color", BROWN)]
    return [{"image_id": str(image), "question": question, "question_type": kind, "answer": answer}
            for image in range(num_images) for question, kind, answer in asked]


# floors

def test_most_frequent_answer_breaks_ties_alphabetically():
    assert baselines.most_frequent_answer(["b c d", "a b c", "b c d", "a b c", "z"]) == "a b c"


def test_most_frequent_per_type_falls_back_for_an_unseen_type():
    predictions = baselines.most_frequent_per_type(["x", "x", "x", "red", "blue"], ["is", "is", "is", "color", "color"],
                                                   ["color", "how", "is"])
    assert predictions == ["blue", "x", "x"]


def test_nearest_question_weights_rare_words_more(monkeypatch):
    """By plain counts "is the giraffe" is nearer to "what is the time" (cosine 0.58 against 0.41). With TF-IDF the
    giraffe decides (0.36 against 0.55)."""
    train = ["what is the man doing", "what is the dog doing", "a giraffe", "what is the man holding",
             "what is the time"]
    answers = ["cooking some food", "chasing a ball", "in the zoo", "a tennis racket", "half past ten"]
    asked = ["Is the GIRAFFE?", "man holding?", "what is the TIME"]
    monkeypatch.setattr(baselines, "NEIGHBOURS", 1)
    assert baselines.nearest_question(train, answers, asked) == ["in the zoo", "a tennis racket", "half past ten"]


@pytest.mark.parametrize("train, answers, asked, expected", [
    (["is it a cat", "what is it"], ["cat", "dog"], ["it is WHAT", "a cat"], ["dog", "cat"]),       # the order is ignored
    (["what is it", "what is this"], ["b", "a"], ["qui est là", "", "this"], ["a", "a", "a"]),       # no common word
    (["??", ""], ["b", "c"], ["what", "?"], ["b", "b"]),                                             # no word at all
    (["他在哪里", "这是什么"], ["a", "b"], ["那是什么", "书"], ["b", "a"])])                             # words are characters
def test_nearest_question_without_common_words_is_the_most_frequent_answer(train, answers, asked, expected):
    assert baselines.nearest_question(train, answers, asked) == expected


def test_all_rows_with_the_same_question_vote():
    """The first of the tied rows used to answer, whatever the others said."""
    train = ["what is it"] * 30 + ["what is this"] * 40
    answers = ["a red cup"] + [BLACK] * 29 + ["a blue dog"] * 40
    assert baselines.nearest_question(train, answers, ["what is it", "what is this"]) == [BLACK, "a blue dog"]
    assert baselines.nearest_question(train[::-1], answers[::-1], ["what is it"]) == [BLACK]
    few = ["what is it"] * 9 + ["what is this"] * 40  # the tenth neighbour asks another question, and so do 39 others
    assert baselines.nearest_question(few, [BLACK] * 9 + ["a blue dog"] * 40, ["what is it"]) == ["a blue dog"]


def test_similarities_in_small_batches_give_the_same_answers(monkeypatch):
    train = [f"what is {number % 7} on {number % 11}" for number in range(200)]
    answers = [f"the thing {number % 7} {number % 11}" for number in range(200)]
    asked = sorted(set(train))
    expected = baselines.nearest_question(train, answers, asked)
    monkeypatch.setattr(baselines, "SIMILARITY_MIB", 0)  # one question at a time
    assert baselines.nearest_question(train, answers, asked) == expected and len(set(expected)) > 10


@pytest.mark.parametrize("votes, expected", [
    ({"a red cup": 3, BLACK: 2, BROWN: 1.9}, BLACK),           # 2 + 1.9 * 0.55 is more than 3
    ({"a red cup": 3.2, BLACK: 2, BROWN: 1.9}, "a red cup"),
    ({BROWN: 2, BLACK: 2 + 1e-12}, BROWN), ({BLACK: 2, BROWN: 2}, BROWN)])  # the alphabet breaks a tie, no rounding error
def test_best_answer_has_the_highest_expected_bleu(votes, expected):
    assert baselines.best_answer(votes) == expected


def test_blind_floors_learn_from_the_training_rows_only():
    train = [{"question": "what color", "question_type": "what color", "answer": "red"},
             {"question": "how many", "question_type": "how", "answer": "two"},
             {"question": "how many dogs", "question_type": "how", "answer": "two"}]
    rows = [{"question": "what color is it", "question_type": "what color", "answer": "never seen"},
            {"question": "how old", "answer": "never seen"}]  # a user's own row has no type
    assert baselines.blind_floors(train, rows) == {
        "most_frequent": ["two", "two"], "most_frequent_per_question_type": ["red", "two"],
        "nearest_question": ["red", "two"]}


def test_no_row_is_answered_from_its_own_image():
    """Each image has its own answer, twice: a floor that saw the other row of the image would repeat it."""
    rows = [{"image_id": str(image), "question": f"what is thing {image}", "question_type": "what",
             "answer": f"thing number {image}"} for image in range(60) for _ in range(2)]
    floors = baselines.cross_validated_floors(rows)
    assert len(floors) == 3
    for predictions in floors.values():
        assert all(prediction and prediction != row["answer"] for prediction, row in zip(predictions, rows, strict=True))


def test_cross_validated_floors_are_the_blind_floors_of_the_other_folds():
    rows = made_up_rows()
    floors = baselines.cross_validated_floors(rows, folds=3)
    first = [number for number, row in enumerate(rows) if baselines.fold_of(row["image_id"], 3) == 0]
    assert 20 < len(first) < 60
    train = [row for row in rows if baselines.fold_of(row["image_id"], 3) != 0]
    expected = baselines.blind_floors(train, [rows[number] for number in first])
    assert {name: [predictions[number] for number in first] for name, predictions in floors.items()} == expected
    assert floors["nearest_question"] == [row["answer"] for row in rows]  # each question occurs in every fold
    by_path = [{"image_path": row["image_id"], **row, "image_id": ""} for row in rows]  # a user's own CSV
    assert baselines.cross_validated_floors(by_path, folds=3) == floors


def test_one_image_cannot_be_cross_validated():
    with pytest.raises(ValueError, match="fill 1 of 5 folds"):
        baselines.cross_validated_floors(made_up_rows(1))


# one annotator

@pytest.mark.parametrize("label, annotations, metric, expected", [
    # Of the two who gave the label one is set aside. The other one scores 100, the third annotator wrote brown.
    (BLACK, [BLACK, BROWN, BLACK], "mean_sentence_bleu", (100 + BROWN_FOR_BLACK) / 2),
    (BLACK, [BLACK, BROWN, BLACK], "multi_reference_bleu", (100 + BROWN_FOR_BLACK) / 2),
    (BLACK, [BLACK, BROWN, BLACK], "exact_match", 50.0),
    (BLACK, [BLACK, BROWN, BLACK], "vqa_accuracy", 50.0),  # against two others a match with either is enough
    (BLACK, [BLACK, BLACK, "a red cup"], "multi_reference_bleu", 50.0),  # who is set aside remains a reference
    (BLACK, [BLACK, BROWN], "mean_sentence_bleu", BROWN_FOR_BLACK),  # only the second annotator is scored
    ("Black and white", [BLACK, BROWN], "exact_match", 0.0),  # the label is found in any case
    ("a red cup", [BLACK, BROWN], "vqa_accuracy", 0.0),  # nobody gave the label, so nobody is set aside
    ("a red cup", [BLACK, BLACK], "multi_reference_bleu", 100.0),
    ("3", list("0123456789"), "exact_match", 0.0),  # would be 10 if the one who gave the label was scored too
    ("3", ["3"] * 10, "exact_match", 100.0)])
def test_annotator_scores_by_hand(label, annotations, metric, expected):
    assert baselines.annotator_scores(label, annotations)[metric] == pytest.approx(expected)


def test_annotator_scores_are_the_mean_over_the_remaining_annotators():
    """Scoring equal answers once gives the same as a loop over all annotators."""
    answers = [BLACK, BROWN, BLACK, "the cat", BROWN, "black", BLACK, "the cat", "a dog", "cat"]
    annotators = [metrics.score_row(answers[number], BLACK, answers[:number] + answers[number + 1:])
                  for number in range(1, 10)]
    for name, score in baselines.annotator_scores(BLACK, answers).items():
        assert score == pytest.approx(np.mean([scores[name] for scores in annotators]))


def test_one_annotation_gives_no_score_of_one_annotator():
    rows = [{"image_id": image, "answer": BLACK, "answers": answers}
            for image, answers in ((1, [BLACK]), (2, []), (3, [BLACK, BLACK]))]
    scores, groups, optimistic = baselines.one_annotator(rows, [])
    assert groups == ["1", "2", "3"] and optimistic
    for values in scores.values():
        assert np.isnan(values).tolist() == [True, True, False] and values[2] == 100.0
    assert bootstrap.summarise(scores, groups)["exact_match"]["n"] == 1
    nobody = bootstrap.summarise(baselines.one_annotator(rows[:1], [])[0], ["1"])
    assert nobody["mean_sentence_bleu"] == {"value": None, "ci95": [None, None], "n": 0}


def test_one_annotator_held_out_by_hand():
    """Every annotator with a label is scored, against the label of the others and against the others' answers."""
    held_out = [{"question_id": 1, "image_id": 7, "split": "test", "answers": [BLACK, BROWN, BLACK, "cat"],
                 "labels": [None, BLACK, None, BLACK]},
                {"question_id": 2, "image_id": 8, "split": "test", "answers": [BROWN, BROWN], "labels": [BROWN, BROWN]}]
    scores, groups, optimistic = baselines.one_annotator([], held_out)
    assert groups == ["7", "7", "8", "8"] and not optimistic
    assert scores["mean_sentence_bleu"] == pytest.approx([BROWN_FOR_BLACK, 0, 100, 100])
    assert scores["exact_match"].tolist() == [0, 0, 100, 100]
    assert scores["vqa_accuracy"].tolist() == [0, 0, 100, 100]  # against the others only: no one matches oneself


def test_only_the_held_out_score_is_unbiased():
    """Ten annotators draw from twenty phrases. Two annotators agree in 5 % of the cases, but the label is an answer that
    several of the ten gave."""
    draw = np.random.default_rng(0).integers(20, size=(1000, 10))
    drawn = [[f"phrase number {number}" for number in numbers] for numbers in draw]
    cfg = Config(min_agreement=1)
    rows = [{"image_id": image, "answer": majority_answer(answers, None)[0], "answers": answers}
            for image, answers in enumerate(drawn)]
    held_out = [{"image_id": image, "answers": answers, "labels": held_out_labels(answers, cfg)}
                for image, answers in enumerate(drawn)]
    optimistic, fair = (baselines.one_annotator(rows, entries)[0]["exact_match"] for entries in ([], held_out))
    assert len(fair) == 10_000 and fair.mean() == pytest.approx(5, abs=0.7)
    assert optimistic.mean() > 10


# real answers

def real_rows(min_agreement):
    """Rows of the real questions with labels of three or more words; the label rule is written a second time here."""
    if not REAL.is_dir():
        pytest.skip("the real VQA v2 questions and answers are not here")
    read = {name: json.loads(gzip.decompress(next(REAL.glob(f"*{name}.json.gz")).read_bytes()))[name]
            for name in ("questions", "annotations")}
    question_of = {row["question_id"]: row["question"] for row in read["questions"]}
    rows = []
    for row in read["annotations"]:
        answers = [annotation["answer"] for annotation in row["answers"]]
        votes = Counter(answers).most_common()
        tied = sorted(answer for answer, count in votes if count == votes[0][1])
        label = row["multiple_choice_answer"] if row["multiple_choice_answer"] in tied else tied[0]
        if len(label.split()) >= 3 and votes[0][1] >= min_agreement:
            rows.append({"image_id": row["image_id"], "question": question_of[row["question_id"]], "answer": label,
                         "answers": answers, "question_type": row["question_type"]})
    return rows


@pytest.mark.parametrize("min_agreement, num_rows, floors, gain", [
    (1, 765, {"most_frequent": 20.7, "most_frequent_per_question_type": 20.1, "nearest_question": 24.0}, 2.5),
    (3, 503, {"most_frequent": 27.3, "most_frequent_per_question_type": 27.3, "nearest_question": 31.1}, 2.0)])
def test_real_questions_vote_better_than_the_most_frequent_answer(min_agreement, num_rows, floors, gain):
    """The single nearest question had 18.2 and 24.2: below the most frequent answer."""
    rows = real_rows(min_agreement)
    assert len(rows) == num_rows
    predictions = baselines.cross_validated_floors(rows)
    assert set(predictions["most_frequent"]) == {BLACK}
    scores = {name: np.array([metrics.sentence_bleu(text, row["answer"]) for text, row in zip(texts, rows, strict=True)])
              for name, texts in predictions.items()}
    assert {name: values.mean() for name, values in scores.items()} == pytest.approx(floors, abs=0.1)
    _, low, _ = bootstrap.paired_difference(scores["nearest_question"], scores["most_frequent_per_question_type"],
                                            [row["image_id"] for row in rows])
    assert low == pytest.approx(gain, abs=0.1)


@pytest.mark.parametrize("min_agreement, num_pairs, fair, optimistic", [
    (3, 4685, (56.5, 41.9), (59.2, 45.7)), (1, 7199, (43.9, 29.8), (45.7, 32.4))])
def test_real_annotators_score_less_when_held_out(min_agreement, num_pairs, fair, optimistic, capsys):
    rows = real_rows(min_agreement)
    _, held_out = mini_vqa_v2.read_rows(mini_vqa_v2.choose_parts(Config(vqa_dir=REAL, min_agreement=min_agreement)))
    for entries, expected in ((held_out, fair), ([], optimistic)):
        scores, groups, _ = baselines.one_annotator(rows, entries)
        assert len(groups) == (num_pairs if entries else len(rows))
        assert [scores[name].mean() for name in ("mean_sentence_bleu", "exact_match")] == pytest.approx(expected, abs=0.05)


def test_scores_charts_and_gallery_need_no_torch():
    program = "import sys, evaluation.report, evaluation.charts, evaluation.gallery; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_wrong_images_shows_every_row_the_image_of_another_row():
    image_index = torch.tensor([7, 7, 2, 5, 2, 9])
    shown = baselines.wrong_images(SimpleNamespace(image_index=image_index), seed=0)
    assert (shown != image_index).all() and set(shown.tolist()) == {2, 5, 7, 9}
    assert shown[0] == shown[1] and shown[2] == shown[4], "rows of one image get the same wrong image"
    assert baselines.wrong_images(SimpleNamespace(image_index=image_index[:2]), seed=0) is None


def test_labels_lose_unknown_words_and_what_exceeds_the_answer_length():
    vocab = Vocab([*SPECIALS, "a", "red", "ball"])
    assert baselines.vocabulary_limited_labels(["a shiny red ball", "a ball"], vocab, 4) == ["a red", "a ball"]
