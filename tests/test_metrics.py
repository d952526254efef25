"""Metrics against hand-computed values and published rules; intervals against scipy."""
import json
import re
import sys
import unicodedata
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
    ("the table", "table", 0.0), ("", " ", 100.0), ("CAFE\u0301", "caf\u00e9", 100.0)])
def test_exact_match(prediction, answer, expected):
    assert metrics.exact_match(prediction, answer) == expected


@pytest.mark.parametrize("metric", metrics.METRICS, ids=lambda metric: metric.name)
def test_accents_may_be_composed_or_not(metric):
    """A label typed on another system had its accents as characters of their own, and a right answer scored 0."""
    answer = "một quả bưởi màu xanh"
    apart = unicodedata.normalize("NFD", answer)
    assert [metric.score(one, other if metric.against == "label" else [other])
            for one, other in ((answer, apart), (apart, answer))] == [100.0, 100.0]


def test_bleu_has_other_tokenizers_which_the_signature_shows(monkeypatch):
    pair = ("红色的书", "红色的笔")
    assert metrics.sentence_bleu(*pair) == 0.0  # for 13a an answer without spaces is one word
    try:
        for name in ("zh", "char"):
            metrics.choose_bleu_tokenizer(name)
            expected = sacrebleu.sentence_bleu(pair[0], [pair[1]], tokenize=name).score
            assert metrics.sentence_bleu(*pair) == pytest.approx(expected)
            assert metrics.sentence_bleu(*pair) > 50 and f"tok:{name}" in metrics.signature()
        monkeypatch.setitem(sys.modules, "MeCab", None)  # an import of it fails
        with pytest.raises(ValueError, match=r"--bleu-tokenize ja-mecab needs .*pip install 'sacrebleu\[ja\]'"):
            metrics.choose_bleu_tokenizer("ja-mecab")
    finally:
        metrics.choose_bleu_tokenizer("13a")
    assert metrics.sentence_bleu(*pair) == 0.0


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


def test_the_share_of_the_way_has_an_interval_of_draws_in_which_all_three_means_vary():
    """The share was printed without an interval. Here the reference varies most, and it lives on other rows."""
    generator = np.random.default_rng(6)
    shares, covered = [], 0
    for _ in range(200):
        image = generator.normal(0, 10, 60)  # moves model and floor together
        floor, values = (mean + image + generator.normal(0, 5, 60) for mean in (30, 60))
        reference, groups = generator.normal(80, 15, 120), np.arange(120) // 2
        share, low, high = bootstrap.share_of_way(values, floor, reference, range(60), groups)
        assert share == pytest.approx(100 * (values.mean() - floor.mean()) / (reference.mean() - floor.mean()))
        shares.append(share)
        covered += low <= 60 <= high
    assert 0.91 <= covered / 200 <= 0.99


def test_the_share_on_the_same_rows_may_miss_references_and_needs_a_reference_above_the_floor():
    values, floor = FLOOR + 30, FLOOR
    reference = np.where(np.arange(100) % 3 == 0, np.nan, 80.0)
    same_rows = bootstrap.share_of_way(values, floor, reference, range(100))
    known = ~np.isnan(reference)
    assert same_rows == pytest.approx(bootstrap.share_of_way(values, floor, reference[known], range(100),
                                                             np.arange(100)[known]))
    for unclear in (FLOOR - 1, FLOOR + np.tile([-60, 61], 50), np.full(100, np.nan)):
        assert np.isnan(bootstrap.share_of_way(values, floor, unclear, range(100))).all()


# several seeds

def seeds_and_images(generator, num_seeds, seed_sd, image_sd, both_sd, num_images=60):
    """(num_seeds, num_images) differences with mean 0. image_sd and both_sd are those of the mean over the images."""
    scale = num_images ** 0.5
    return (generator.normal(0, seed_sd, (num_seeds, 1)) + scale * generator.normal(0, image_sd, (1, num_images))
            + scale * generator.normal(0, both_sd, (num_seeds, num_images)))


def test_one_seed_gives_the_interval_by_image_and_the_draws_are_fixed():
    generator = np.random.default_rng(3)
    a, b, images = generator.uniform(0, 100, (3, 50)), generator.uniform(0, 100, (3, 50)), np.arange(50) // 2
    assert bootstrap.difference_over_seeds(a[:1], b[:1], images) == pytest.approx(
        bootstrap.paired_difference(a[0], b[0], images))
    first = bootstrap.difference_over_seeds(a, b, images)
    assert first[0] == pytest.approx((a - b).mean()) and bootstrap.difference_over_seeds(a, b, images) == first


def test_the_interval_covers_the_spread_of_seeds():
    """A difference over averaged seeds was resampled by image only: it excluded zero for what another seed turns round."""
    gains = np.array([[4.0], [-3.0], [4.0], [-2.0]]) + np.zeros((4, 50))
    assert bootstrap.paired_difference(gains.mean(0), np.zeros(50), range(50))[1] > 0
    _, low, high = bootstrap.difference_over_seeds(gains, np.zeros((4, 50)), range(50))
    assert low < 0 < high


def test_the_width_over_seeds_is_that_of_a_mean_of_independent_seeds():
    """All images are equal, so the only variance is S^2 / s: drawing s of s seeds would give (s - 1) / s of it."""
    generator, num_seeds = np.random.default_rng(5), 12
    widths = []
    for _ in range(150):
        differences = seeds_and_images(generator, num_seeds, 1, 0, 0, 5)
        _, low, high = bootstrap.difference_over_seeds(differences, np.zeros_like(differences), range(5), draws=1000)
        widths.append((high - low) ** 2)
    assert np.mean(widths) ** 0.5 == pytest.approx(2 * 1.96 / num_seeds ** 0.5, rel=0.04)


@pytest.mark.parametrize("seed_sd, image_sd, both_sd", [(0.4, 0.3, 0.5), (0.3, 0.5, 0.2)])
def test_the_interval_over_seeds_and_images_covers_95_percent(seed_sd, image_sd, both_sd):
    generator, covered = np.random.default_rng(7), 0
    for _ in range(400):
        differences = seeds_and_images(generator, 5, seed_sd, image_sd, both_sd)
        _, low, high = bootstrap.difference_over_seeds(differences, np.zeros_like(differences), range(60), draws=500)
        covered += low <= 0 <= high
    assert 0.92 <= covered / 400 <= 0.98


@pytest.mark.parametrize("images, expected", [
    (30, "95 % interval by image"), (29, "95 % interval by image, too narrow: only 29 images"),
    (1, "95 % interval by image, too narrow: only 1 image")])
def test_an_interval_of_few_images_is_marked(images, expected):
    """With 10 images the percentile interval covers 87 to 91 % in simulation, with 5 images 80 %."""
    assert bootstrap.interval_name(images) == expected


# summaries

def test_summarise_gives_plain_rounded_numbers():
    table = bootstrap.summarise({"bleu_1": np.array([0.0, 100.0, 100.0]), "chrf": np.full(3, np.nan)}, ["a", "b", "c"])
    assert table == {"bleu_1": {"value": 66.6667, "ci95": [0.0, 100.0], "n": 3},
                     "chrf": {"value": None, "ci95": [None, None], "n": 0}}
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    # 85 of 197 are 43.147 %: with two decimals, 43.15, they were shown as 43.1 and as 43.2
    share = bootstrap.summarise({"exact_match": np.repeat([100.0, 0.0], [85, 112])}, range(197))["exact_match"]["value"]
    assert f"{share:.1f}" == str(np.round(share, 1)) == "43.1"


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
    (FLOOR + 30, FLOOR + 40, "beats the strongest floor (strong) by 30.0 [30.0, 30.0] mean sentence BLEU; from that "
                             "floor it reaches 75 % [75, 75] of the way to one annotator"),
    (FLOOR, FLOOR + 40, "does not beat the strongest floor (strong): +0.0 [+0.0, +0.0] mean sentence BLEU, an interval that "
                        "includes zero"),
    (FLOOR - 5, FLOOR + 40, "is below the strongest floor (strong): -5.0 [-5.0, -5.0] mean sentence BLEU"),
    (FLOOR + 30, np.full(100, np.nan), "; one annotator is unknown, since no question has a second annotation"),
    (FLOOR + 30, np.where(np.arange(100) < 50, FLOOR + 60, np.nan),
     "; from that floor it reaches 50 % [50, 50] of the way to one annotator (on the 50 of 100 questions with a second "
     "annotation)"),
    (FLOOR + 30, FLOOR - 1, "; one annotator is not clearly above that floor"),
    (FLOOR + 30, np.where(np.arange(100) == 0, FLOOR + 40, np.nan),
     "; from that floor it reaches 75 % of the way to one annotator (on the 1 of 100 questions with a second annotation)")])
def test_verdict_names_the_strongest_floor_and_the_way_to_one_annotator(values, annotator, expected):
    line = bootstrap.verdict(values, {"weak": np.zeros(100), "strong": FLOOR}, range(100), [("one annotator", annotator, None)])
    assert line == expected if expected[0].isalpha() else line.endswith(expected)


def test_verdict_is_paired_by_image_and_one_image_gives_none():
    """A gain on the twelve rows of one image is one observation, not twelve."""
    gain = np.repeat([60.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0], 12)
    floors = {"strong": np.zeros(96)}
    assert "includes zero" in bootstrap.verdict(gain, floors, np.repeat(np.arange(8), 12))
    assert bootstrap.verdict(gain, floors, range(96)).startswith("beats")
    assert bootstrap.verdict(gain, floors, ["same"] * 96) == (
        "stands +5.8 mean sentence BLEU from the strongest floor (strong), but one image gives no interval")


def test_the_verdict_takes_one_annotator_from_other_rows_and_the_oracle_from_the_same():
    """Held-out annotators are scored on other questions, which are grouped by image too."""
    images = [f"p{n}" for n in range(100)]
    references = [("the oracle", FLOOR + 75, None), ("one annotator", np.full(7, 80.0), images[:7])]
    line = bootstrap.verdict(FLOOR + 30, {"strong": FLOOR}, images, references)
    assert re.search(r"; from that floor it reaches 40 % \[40, 40\] of the way to the oracle and 50 % \[4\d, 5\d\] of the way "
                     "to one annotator$", line)


# calibration

def test_brier_score_by_hand():
    assert bootstrap.brier_score([0.9, 0.9, 0.5], [True, False, True]) == pytest.approx((0.01 + 0.81 + 0.25) / 3)


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
