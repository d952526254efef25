"""Metrics against hand-computed values and published rules; intervals against scipy."""
import json
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import scipy.stats

from evaluation import bootstrap, metrics

DATA = Path(__file__).parents[1].parent / "shared" / "data"
ANSWERS = ["black and white", "Black and  brown", "on the table", "don't know", "10:30", "a man's left hand", "yes",
           "white with black spots and a tail", "it's 2 o'clock", "T-shirt, jeans", "", "<unk>", "chairs chairs"]
AGREED = ["no"] * 10


def published(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the published cases are not here: {name}")
    return json.loads(path.read_text(encoding="utf-8"))


# BLEU, chrF, exact match

@pytest.mark.parametrize("prediction", ANSWERS)
def test_bleu_and_chrf_are_those_of_sacrebleu(prediction):
    for first in range(len(ANSWERS)):
        for references in ([ANSWERS[first]], ANSWERS[first:] + ANSWERS[first:first + 1]):  # one; several, one of them twice
            for order in (1, 2, 4):
                scorer = sacrebleu.BLEU(lowercase=True, effective_order=True, max_ngram_order=order)
                expected = scorer.sentence_score(prediction, references).score
                assert metrics.sentence_bleu(prediction, references, order) == pytest.approx(expected, abs=1e-9)
            expected = sacrebleu.CHRF(lowercase=True).sentence_score(prediction, references).score
            assert metrics.chrf(prediction, references) == pytest.approx(expected, abs=1e-9)


def test_bleu_and_chrf_by_hand():
    """BLEU: 2 of 3 words, 1 of 2 pairs, 0 of 1 triple (smoothed to 1/2) match: the cube root of 1/6.
    chrF: one of two characters and no pair match: mean precision and recall are 1/4."""
    pair = ("black and white", ["black and brown"])
    assert metrics.sentence_bleu(*pair) == pytest.approx(100 * (1 / 6) ** (1 / 3))
    assert metrics.sentence_bleu(*pair, max_order=2) == pytest.approx(100 * (1 / 3) ** 0.5)
    assert metrics.sentence_bleu(*pair, max_order=1) == pytest.approx(100 * 2 / 3)
    assert metrics.sentence_bleu("black", "black and white") == pytest.approx(100 * np.exp(1 - 3))  # brevity penalty
    # the shorter of two equally near lengths
    assert metrics.sentence_bleu("the dog", ["dog", "a big dog"], max_order=1) == pytest.approx(50)
    assert metrics.chrf("ab", "ac") == pytest.approx(25.0)


@pytest.mark.parametrize("answer", ["yes", "black and white", "A man's left hand in the air"])
def test_a_perfect_answer_scores_exactly_100_in_any_case(answer):
    assert set(metrics.score_row(answer.upper(), answer, []).values()) == {100.0}


@pytest.mark.parametrize("score, message", [(metrics.sentence_bleu, "at least one reference"),
                                            (metrics.chrf, "at least one reference"),
                                            (metrics.vqa_accuracy, "at least one annotation")])
def test_a_score_without_a_reference_is_an_error(score, message):
    with pytest.raises(ValueError, match=message):
        score("yes", [])


def test_a_reference_decoded_from_a_vocabulary_would_make_unknown_words_perfect():
    """The published implementation did this. sacrebleu splits `<unk>` into three tokens, which then match."""
    assert metrics.sentence_bleu("a <unk>", ["a <unk>"]) == 100.0
    assert metrics.sentence_bleu("a <unk>", ["a giraffe"]) < 20
    # an answer tokenized as "do n't" loses most of the score, so answers are decoded to the original spelling
    assert metrics.sentence_bleu("do n't know", ["don't know"]) == pytest.approx(27.5, abs=0.05)


def test_the_signature_names_what_the_headline_depends_on():
    metrics.sentence_bleu("c", ["a", "b"])  # the signature of sacrebleu remembers the last number of references
    assert metrics.signature().split("|") == ["nrefs:1", "case:lc", "eff:yes", "tok:13a", "smooth:exp",
                                              f"version:{sacrebleu.__version__}"]


@pytest.mark.parametrize("prediction, answer, expected", [
    ("Black  and\twhite ", "black and white", 100.0), ("black & white", "black and white", 0.0), ("2", "two", 0.0),
    ("the table", "table", 0.0), ("", " ", 100.0)])
def test_exact_match(prediction, answer, expected):
    assert metrics.exact_match(prediction, answer) == expected


# official VQA accuracy

@pytest.mark.parametrize("text, expected", [
    ("The Cat", "cat"), ("a man and an apple", "man and apple"),         # articles and case
    ("Two", "2"), ("ten", "10"), ("none", "0"), ("eleven", "eleven"),    # number words to ten
    ("dont know", "don't know"), ("Cant", "can't"), ("oclock", "o'clock"), ("couldntve", "couldntve"),
    ("couldnt've", "couldn't've"), ("lets", "lets"), ("shes", "shes"),   # the official table lacks these two
    ("somebody'd", "somebodyd"),                                         # and has this one the wrong way round
    ("t-shirt", "t shirt"), ("left/right", "left right"),                # a mark between letters becomes a space
    ("black - white", "black white"), ("what?", "what"), ("red, blue", "red blue"),
    ("yes/no, maybe", "yes no maybe"),   # the slash has no space beside it
    ("a-b -c", "ab c"),                  # one hyphen beside a space: every hyphen is deleted
    ("1,000-2,000", "10002000"),         # a comma between digits: every mark is deleted
    ("1, 000", "1 000"), ("10:30", "10:30"), ("it's", "it's"), ("50%", "50%"),  # unlisted marks stay
    ("u.s.a.", "usa"), ("2.5", "2.5"), ("no.", "no"), (".5", ".5"), ("3.", "3"), ("a.5", "a.5"),
    ("the-one", "1"), ("the", ""), ("?", ""),
    ("." * 40 + "x", "." * 8 + "x")])    # at most 32 periods are deleted
def test_normalised_answers(text, expected):
    assert metrics.normalise_answer(text) == expected


def test_an_answer_that_all_annotators_gave_is_compared_without_normalisation():
    assert metrics.vqa_accuracy("NO", AGREED) == 0.0
    assert metrics.vqa_accuracy("no", AGREED) == 100.0
    assert metrics.vqa_accuracy("\tno\n", ["no "] * 10) == 100.0  # white space at the ends never counts
    assert metrics.vqa_accuracy("The NO.", AGREED[:9] + ["yes"]) == 100.0


@pytest.mark.parametrize("annotations, expected", [
    # ten, m of them match: m x min(1, (m-1)/3) + (10-m) x min(1, m/3), over 10
    *((["cat"] * m + list("abcdefghij")[m:], expected)
      for m, expected in ((0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100))),
    (["cat"], 100), (["The Cat!"], 100), (["dog"], 0),                          # one: normalised equality
    (["cat", "dog"], 100), (["dog", "bird"], 0), (["CAT", "CAT"], 0),           # two: any match, if they disagree
    (["cat", "dog", "bird"], 50), (["cat", "the cat", "dog"], 100),             # three: half for each match
    (["cat", "dog", "bird", "cow"], 25), (["cat", "cat", "dog", "cow"], 50),    # four: (3 x 1/3) / 4; all 2/3, 1/3
    (["cat"] * 4, 100), (["cat"] * 3 + ["dog"], 75),
    (["cat"] + [str(n) for n in range(8)], 100 * 8 / 27), (["cat"] * 4 + [str(n) for n in range(5)], 100)])
def test_vqa_accuracy_by_the_number_of_annotators(annotations, expected):
    assert metrics.vqa_accuracy("cat", annotations) == pytest.approx(expected)


def test_accuracy_agrees_with_the_official_evaluator():
    cases = published("vqa_accuracy_cases.json")
    assert len(cases) == 250
    for case in cases:
        assert metrics.vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["accuracy"], abs=1e-6)


def test_normalisation_tables_are_the_published_tables():
    tables = published("vqa_answer_normalisation.json")
    repairs = {word: repaired for word, repaired in tables["contractions"].items() if word != repaired}
    assert repairs == metrics.VQA_CONTRACTIONS  # two published entries map a word to itself
    assert tables["number_words_and_none"] == metrics.VQA_NUMBERS
    assert list(metrics.VQA_ARTICLES) == tables["articles"]
    assert list(metrics.VQA_MARKS) == tables["punctuation"]


def test_score_rows_uses_the_label_if_there_are_no_annotations():
    scores = metrics.score_rows(["a cat", "a cat"], ["cat", "cat"], [[], ["cat", "a cat", "a dog"]])
    assert list(scores) == [metric.name for metric in metrics.METRICS]
    assert all(values.shape == (2,) and values.dtype == np.float64 for values in scores.values())
    assert scores["multi_reference_bleu"][0] == scores["mean_sentence_bleu"][0] < 100
    assert scores["multi_reference_bleu"][1] == 100.0
    assert scores["exact_match"].tolist() == [0.0, 0.0]
    assert scores["vqa_accuracy"].tolist() == [100.0, 100.0]
    with pytest.raises(ValueError):
        metrics.score_rows(["a"], ["a", "b"], [[]])


# bootstrap

def test_interval_of_groups_agrees_with_scipy():
    """scipy draws the pairs (sum of scores, number of rows) of the images. Images have 1 to 9 rows here."""
    generator = np.random.default_rng(8)
    images = np.repeat(np.arange(300), generator.integers(1, 10, 300))
    values = generator.uniform(0, 50, 300)[images] + generator.uniform(0, 50, len(images))
    sums, counts = np.bincount(images, values), np.bincount(images)
    expected = scipy.stats.bootstrap((sums, counts), lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis), paired=True,
                                     vectorized=True, method="percentile", n_resamples=10_000, rng=generator)
    mean, low, high = bootstrap.bootstrap_mean(values, images, draws=10_000)
    assert mean == pytest.approx(values.mean())
    width = expected.confidence_interval.high - expected.confidence_interval.low
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval), abs=0.05 * width)
    by_row = bootstrap.bootstrap_mean(values, range(len(values)))
    assert high - low > 1.5 * (by_row[2] - by_row[1]), "rows of one image are not independent"


def test_mean_is_over_rows_not_over_images():
    assert bootstrap.bootstrap_mean([100.0, 100.0, 100.0, 0.0], ["a", "a", "a", "b"]) == (75.0, 0.0, 100.0)


def test_an_interval_depends_on_the_seed_but_not_on_row_order_or_other_columns():
    generator = np.random.default_rng(2)
    values, images, order = generator.uniform(0, 100, (100, 3)), generator.integers(0, 40, 100), generator.permutation(100)
    first = bootstrap.bootstrap_mean(values[:, 0], images)
    assert bootstrap.bootstrap_mean(values[:, 0], images) == first
    assert [numbers[0] for numbers in bootstrap.bootstrap_mean(values[order], images[order])] == pytest.approx(first, abs=1e-9)
    assert bootstrap.bootstrap_mean(values[:, 0], images, seed=7)[1:] != first[1:]


def test_missing_scores_are_left_out():
    values = np.array([[10.0, np.nan, 5.0], [20.0, np.nan, np.nan], [30.0, np.nan, 7.0]])
    mean, low, high = bootstrap.bootstrap_mean(values, ["a", "b", "c"])
    assert mean[[0, 2]].tolist() == [20.0, 6.0]
    assert np.isnan([mean[1], low[1], high[1]]).all()
    assert (low[2], high[2]) == (5.0, 7.0)


def test_one_image_has_no_interval_and_no_rows_are_an_error():
    mean, low, high = bootstrap.bootstrap_mean([10.0, 30.0], ["a", "a"])
    assert mean == 20.0 and np.isnan(low) and np.isnan(high)
    with pytest.raises(ValueError, match="no rows to score"):
        bootstrap.bootstrap_mean([], [])


def test_paired_interval_is_narrow_if_the_rows_move_together():
    """Two systems whose scores differ by about 1 on every row: unpaired intervals overlap, the paired one excludes 0."""
    generator = np.random.default_rng(4)
    first = generator.uniform(0, 100, 400)
    second = first - generator.normal(1, 2, 400)
    difference, low, high = bootstrap.paired_difference(first, second, range(400))
    assert 0 < low < difference < high < 2
    assert bootstrap.bootstrap_mean(first, range(400))[1] < bootstrap.bootstrap_mean(second, range(400))[2]


# summaries

def test_summarise_gives_plain_rounded_numbers():
    table = bootstrap.summarise({"bleu_1": np.array([0.0, 100.0, 100.0]), "chrf": np.full(3, np.nan)}, ["a", "b", "c"])
    assert table == {"bleu_1": {"value": 66.67, "ci95": [0.0, 100.0], "n": 3},
                     "chrf": {"value": None, "ci95": [None, None], "n": 0}}
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_types_are_listed_by_size_and_small_ones_hidden():
    scores = {"bleu_1": np.arange(46.0)}
    types = ["count"] * 20 + ["colour"] * 25 + [""]
    table, hidden = bootstrap.by_type(scores, types, range(46))
    assert list(table) == ["colour", "count"] and hidden == {"unknown": 1}
    assert table["count"]["n"] == 20 and table["count"]["bleu_1"]["value"] == 9.5
    in_pairs, _ = bootstrap.by_type(scores, types, np.arange(46) // 2)
    assert in_pairs["count"]["bleu_1"] == bootstrap.summarise({"bleu_1": np.arange(20.0)}, np.arange(20) // 2)["bleu_1"]


# verdict

FLOOR = np.tile([10.0, 30.0], 50)


@pytest.mark.parametrize("values, annotator, expected", [
    (FLOOR + 30, FLOOR + 40, "beats the strongest floor (strong) by 30.0 [30.0, 30.0] mean sentence BLEU and reaches 75 % of "
                             "the way from it to one annotator"),
    (FLOOR, FLOOR + 40, "does not beat the strongest floor (strong): +0.0 [+0.0, +0.0] mean sentence BLEU, an interval that "
                        "includes zero"),
    (FLOOR - 5, FLOOR + 40, "is below the strongest floor (strong): -5.0 [-5.0, -5.0] mean sentence BLEU"),
    (FLOOR + 30, None, "; there is no annotator ceiling, since no question has a second annotation"),
    (FLOOR + 30, np.full(100, np.nan), "; there is no annotator ceiling, since no question has a second annotation"),
    (FLOOR + 30, np.where(np.arange(100) < 50, FLOOR + 60, np.nan),
     " and reaches 50 % of the way from it to one annotator (on the 50 of 100 questions with a second annotation)"),
    (FLOOR + 30, FLOOR - 1, "; one annotator does not score above that floor")])
def test_verdict_names_the_strongest_floor_and_the_way_to_one_annotator(values, annotator, expected):
    line = bootstrap.verdict(values, {"weak": np.zeros(100), "strong": FLOOR}, range(100), annotator)
    assert line == expected if expected[0].isalpha() else line.endswith(expected)


def test_verdict_is_paired_by_image_and_one_image_gives_none():
    """A gain on the twelve rows of one image is one observation, not twelve."""
    gain = np.repeat([60.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0], 12)
    floors = {"strong": np.zeros(96)}
    assert "includes zero" in bootstrap.verdict(gain, floors, np.repeat(np.arange(8), 12))
    assert bootstrap.verdict(gain, floors, range(96)).startswith("beats")
    assert bootstrap.verdict(gain, floors, ["same"] * 96) == (
        "stands +5.8 mean sentence BLEU from the strongest floor (strong), but one image gives no interval")


# calibration

def test_calibration_error_by_hand():
    """Two of four rows at 0.9 are right, one of one at 0.1 is: (4 x 0.4 + 1 x 0.9) / 5. Empty bins are left out."""
    error, table = bootstrap.expected_calibration_error([0.9, 0.9, 0.9, 0.9, 0.1], [True, True, False, False, True])
    assert error == pytest.approx(0.5)
    assert table.to_dict("records") == [
        pytest.approx({"low": 0.0, "high": 0.1, "n": 1, "confidence": 0.1, "accuracy": 1.0}),
        pytest.approx({"low": 0.8, "high": 0.9, "n": 4, "confidence": 0.9, "accuracy": 0.5})]


def test_calibration_error_agrees_with_the_definition_at_the_edges_of_the_bins():
    generator = np.random.default_rng(9)
    confidence = np.concatenate([generator.uniform(0, 1, 500), np.linspace(0, 1, 11)])
    correct = generator.uniform(0, 1, len(confidence)) < confidence
    bins = np.clip(np.ceil(confidence * 10), 1, 10)  # (low, high], the first one with 0
    expected = sum((bins == n).mean() * abs(confidence[bins == n].mean() - correct[bins == n].mean()) for n in set(bins))
    error, table = bootstrap.expected_calibration_error(confidence, correct)
    assert error == pytest.approx(expected, abs=0.01) and table["n"].sum() == len(confidence)


@pytest.mark.parametrize("confidence", [[1.2], [-0.1], []])
def test_calibration_refuses_what_is_no_probability(confidence):
    with pytest.raises(ValueError):
        bootstrap.expected_calibration_error(confidence, [1] * len(confidence))
