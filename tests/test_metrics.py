"""Scores against hand-computed values and published rules; intervals against closed forms."""
import json
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sacrebleu

from evaluation import bootstrap as intervals
from evaluation import metrics

DATA = Path(__file__).parents[1].parent / "shared" / "data"
ANSWERS = ["black and white", "Black and  brown", "on the table", "don't know", "10:30", "a man's left hand", "yes",
           "white with black spots and a tail", "it's 2 o'clock", "T-shirt, jeans", "", "<unk>", "chairs chairs"]
AGREED = ["no"] * 10


def real_data(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"the published cases are not here: {name}")
    return json.loads(path.read_text(encoding="utf-8"))


# BLEU, chrF, exact match

@pytest.mark.parametrize("prediction", ANSWERS)
def test_bleu_and_chrf_are_sacrebleus(prediction):
    for reference in ANSWERS:
        expected = sacrebleu.sentence_bleu(prediction, [reference], lowercase=True).score
        assert metrics.sentence_bleu(prediction, [reference]) == pytest.approx(expected, abs=1e-9)
        for order, bleu in ((1, metrics.bleu_1), (2, metrics.bleu_2)):
            scorer = sacrebleu.BLEU(lowercase=True, effective_order=True, max_ngram_order=order)
            expected = scorer.sentence_score(prediction, [reference]).score
            assert bleu(prediction, [reference]) == pytest.approx(expected, abs=1e-9)
        expected = sacrebleu.CHRF(lowercase=True).sentence_score(prediction, [reference]).score
        assert metrics.chrf(prediction, reference) == pytest.approx(expected, abs=1e-9)
    for first in range(len(ANSWERS)):
        references = ANSWERS[first:] + ANSWERS[first:first + 1]  # several, one of them twice
        expected = sacrebleu.sentence_bleu(prediction, references, lowercase=True).score
        assert metrics.sentence_bleu(prediction, references) == pytest.approx(expected, abs=1e-9)
        expected = sacrebleu.CHRF(lowercase=True).sentence_score(prediction, references).score
        assert metrics.chrf(prediction, references) == pytest.approx(expected, abs=1e-9)


def test_bleu_by_hand():
    """2 of 3 words, 1 of 2 pairs, 0 of 1 triple (smoothed to 1/2): the cube root of 1/6."""
    pair = ("black and white", ["black and brown"])
    assert metrics.sentence_bleu(*pair) == pytest.approx(100 * (1 / 6) ** (1 / 3))
    assert metrics.bleu_2(*pair) == pytest.approx(100 * (1 / 3) ** 0.5)
    assert metrics.bleu_1(*pair) == pytest.approx(100 * 2 / 3)
    assert metrics.sentence_bleu("black", "black and white") == pytest.approx(100 * np.exp(1 - 3))  # brevity penalty


def test_chrf_by_hand():
    """One of two characters, no pair: mean precision and recall 1/4, so the F score is 25."""
    assert metrics.chrf("ab", "ac") == pytest.approx(25.0)


def test_perfect_answers_score_exactly_100_and_case_does_not_count():
    for answer in ("yes", "black and white", "A man's left hand in the air"):
        for score in (metrics.sentence_bleu, metrics.bleu_1, metrics.bleu_2):
            assert score(answer.upper(), [answer]) == 100.0
        assert metrics.chrf(answer.upper(), answer) == 100.0


def test_multi_reference_bleu_takes_ngrams_from_any_reference():
    assert metrics.sentence_bleu("black and white", ["black and brown", "brown and white"]) > metrics.sentence_bleu(
        "black and white", ["black and brown"])
    assert metrics.sentence_bleu("black and white", ["brown", "black and white"]) == 100.0


def test_of_two_references_equally_near_in_length_the_shorter_counts():
    """Length 2 between 1 and 3: no brevity penalty, as in sacrebleu."""
    assert metrics.bleu_1("the dog", ["dog", "a big dog"]) == pytest.approx(50)


@pytest.mark.parametrize("score", [metrics.sentence_bleu, metrics.bleu_1, metrics.chrf])
def test_a_score_without_a_reference_is_an_error(score):
    with pytest.raises(ValueError, match="at least one reference"):
        score("yes", [])


def test_a_reference_through_the_vocabulary_would_score_an_unknown_word_as_perfect():
    """The published implementation decoded its references from ids: `<unk>`, three tokens, then matched `<unk>`."""
    assert metrics.BLEU_METRIC.tokenizer("<unk>").split() == ["<", "unk", ">"]
    assert metrics.sentence_bleu("a <unk>", ["a <unk>"]) == 100.0  # the trap
    assert metrics.sentence_bleu("a <unk>", ["a giraffe"]) < 20    # against what the human wrote


def test_split_contractions_do_not_match_the_original():
    """A tokenizer that leaves "do n't" loses most of the score, so answers must decode to what humans write."""
    assert metrics.sentence_bleu("do n't know", ["don't know"]) == pytest.approx(27.5, abs=0.05)


def test_corpus_bleu_is_no_headline_for_three_word_answers():
    """sacrebleu's corpus BLEU has no effective order: without a 4-gram, a perfect corpus scores 0."""
    answers = ["black and white", "on the table", "man and woman"]
    assert sacrebleu.corpus_bleu(answers, [answers]).score == 0.0
    scores = metrics.score_rows(answers, answers, [[]] * 3)
    assert scores["mean_sentence_bleu"].tolist() == [100.0] * 3


def test_signature_names_what_the_headline_depends_on():
    metrics.BLEU_METRIC.sentence_score("a", ["a", "b"])  # leaves its number of references in the signature
    parts = metrics.signature().split("|")
    assert parts[:5] == ["nrefs:1", "case:lc", "eff:yes", "tok:13a", "smooth:exp"]
    assert parts[5] == f"version:{sacrebleu.__version__}"


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
    ("couldnt've", "couldn't've"), ("lets", "lets"), ("shes", "shes"),   # the table has neither of these two
    ("somebody'd", "somebodyd"),                                         # and this one the wrong way round
    ("t-shirt", "t shirt"), ("left/right", "left right"),                # a mark between letters becomes a space
    ("black - white", "black white"), ("what?", "what"), ("red, blue", "red blue"),
    ("yes/no, maybe", "yes no maybe"),   # each mark by its own places: the slash has no space beside it
    ("a-b -c", "ab c"),                  # one hyphen beside a space: every hyphen is deleted
    ("1,000-2,000", "10002000"),         # a comma between digits: every mark is deleted
    ("1, 000", "1 000"), ("10:30", "10:30"), ("it's", "it's"), ("50%", "50%"),  # unlisted marks stay
    ("u.s.a.", "usa"), ("2.5", "2.5"), ("no.", "no"), (".5", ".5"), ("3.", "3"), ("a.5", "a.5"),
    ("-".join(["the", "one"]), "1"),     # marks first, then articles and digits
    ("the", ""), ("?", "")])
def test_normalised_answers(text, expected):
    assert metrics.normalise_answer(text) == expected


def test_at_most_32_periods_are_deleted():
    """re.UNICODE is 32 and the evaluator passes it where `sub` takes the count."""
    assert metrics.normalise_answer("." * 40 + "x") == "." * 8 + "x"


def test_a_unanimous_answer_is_compared_as_written():
    """"NO" against ten times "no" is 0: without disagreement the evaluator normalises nothing."""
    assert metrics.vqa_accuracy("NO", AGREED) == 0.0
    assert metrics.vqa_accuracy("no", AGREED) == 100.0
    assert metrics.vqa_accuracy("\tno\n", ["no "] * 10) == 100.0  # ends and line breaks always go
    assert metrics.vqa_accuracy("The NO.", AGREED[:9] + ["yes"]) == 100.0


@pytest.mark.parametrize("num_matches, expected", [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_leave_one_out_with_ten_humans(num_matches, expected):
    """With m givers: m x min(1, (m-1)/3) + (10-m) x min(1, m/3), over 10."""
    answers = ["cat"] * num_matches + [f"dog {number}" for number in range(10 - num_matches)]
    assert metrics.vqa_accuracy("cat", answers) == pytest.approx(expected)


@pytest.mark.parametrize("answers, expected", [
    (["cat"], 100), (["The Cat!"], 100), (["dog"], 0),                          # one human: normalised equality
    (["cat", "dog"], 100), (["dog", "bird"], 0), (["CAT", "CAT"], 0),           # two: any match, if they disagree
    (["cat", "dog", "bird"], 50), (["cat", "the cat", "dog"], 100),             # three: half a match each
    (["cat", "dog", "bird", "cow"], 25), (["cat", "cat", "dog", "cow"], 50),    # four: (3 x 1/3) / 4; all 2/3, 1/3
    (["cat"] * 4, 100), (["cat"] * 3 + ["dog"], 75),
    (["cat"] + [str(n) for n in range(8)], 100 * 8 / 27), (["cat"] * 4 + [str(n) for n in range(5)], 100)])
def test_accuracy_with_fewer_humans(answers, expected):
    assert metrics.vqa_accuracy("cat", answers) == pytest.approx(expected)


def test_accuracy_without_answers_is_an_error():
    with pytest.raises(ValueError, match="at least one human answer"):
        metrics.vqa_accuracy("cat", [])


def test_the_published_cases_agree_with_the_official_evaluator():
    cases = real_data("vqa_accuracy_cases.json")
    assert len(cases) == 250
    for case in cases:
        assert metrics.vqa_accuracy(case["prediction"], case["answers"]) == pytest.approx(case["accuracy"], abs=1e-6)


def test_our_tables_are_the_published_tables():
    tables = real_data("vqa_answer_normalisation.json")
    repairs = {word: repaired for word, repaired in tables["contractions"].items() if word != repaired}
    assert repairs == metrics.VQA_CONTRACTIONS  # the two entries that map a word to itself do nothing
    assert tables["number_words_and_none"] == metrics.VQA_NUMBERS
    assert list(metrics.VQA_ARTICLES) == tables["articles"]
    assert list(metrics.VQA_MARKS) == tables["punctuation"]


# rows

def test_score_rows_uses_the_label_where_humans_are_unknown():
    scores = metrics.score_rows(["a cat", "a cat"], ["cat", "cat"], [[], ["cat", "a cat", "a dog"]])
    assert list(scores) == list(metrics.NAMES)
    assert all(values.shape == (2,) and values.dtype == np.float64 for values in scores.values())
    assert scores["multi_reference_bleu"][0] == scores["mean_sentence_bleu"][0] < 100
    assert scores["multi_reference_bleu"][1] == 100.0
    assert scores["exact_match"].tolist() == [0.0, 0.0]
    assert scores["vqa_accuracy"].tolist() == [100.0, 100.0]  # normalised, once for one human, once for disagreement
    with pytest.raises(ValueError, match="1 predictions, 2 answers and 0 lists"):
        metrics.score_rows(["a"], ["a", "b"], [])


# intervals

def test_bootstrap_agrees_with_the_closed_form():
    """Mean of 0 or 100 over 2,000 pictures: standard error 100 sqrt(p (1 - p) / n), interval +-1.96 of them."""
    values = np.repeat([100.0, 0.0], [600, 1400])
    mean, low, high = intervals.bootstrap_mean(values, range(2000))
    half_width = 1.96 * 100 * (0.3 * 0.7 / 2000) ** 0.5
    assert mean == pytest.approx(30)
    assert (30 - low, high - 30) == (pytest.approx(half_width, rel=0.1), pytest.approx(half_width, rel=0.1))


def test_rows_of_one_picture_are_drawn_together():
    """Four equal rows on each picture are no more than one: by row, the interval would be half as wide."""
    values = np.repeat(np.random.default_rng(0).uniform(0, 100, 200), 4)
    pictures = np.repeat(np.arange(200), 4)
    _, low, high = intervals.bootstrap_mean(values, pictures)
    _, row_low, row_high = intervals.bootstrap_mean(values, range(800))
    assert (high - low) / (row_high - row_low) == pytest.approx(2, rel=0.15)


def test_mean_is_over_rows_not_over_pictures():
    mean, low, high = intervals.bootstrap_mean([100.0, 100.0, 100.0, 0.0], ["a", "a", "a", "b"])
    assert (mean, low, high) == (75.0, 0.0, 100.0)


def test_interval_of_uneven_pictures_agrees_with_the_closed_form():
    """Ratio of sums over pictures of 1 to 9 rows: standard error sqrt(sum (s - mean x c)^2) / rows, for the sum s
    and the number c of each picture's rows. Averaging the pictures' means would give another interval."""
    generator = np.random.default_rng(8)
    pictures = np.repeat(np.arange(600), generator.choice([1, 9], 600))
    values = generator.uniform(0, 50, 600)[pictures] + np.where(np.bincount(pictures)[pictures] == 9, 50, 0)
    mean, low, high = intervals.bootstrap_mean(values, pictures)
    assert mean == pytest.approx(values.mean())
    residuals = np.bincount(pictures, values - mean)
    assert high - low == pytest.approx(2 * 1.96 * (residuals**2).sum() ** 0.5 / len(values), rel=0.08)
    assert (high + low) / 2 == pytest.approx(mean, abs=1)


def test_columns_share_their_draws_and_equal_single_columns():
    values = np.random.default_rng(1).uniform(0, 100, (300, 3))
    pictures = np.arange(300) // 2
    together = intervals.bootstrap_mean(values, pictures)
    for column in range(3):
        alone = intervals.bootstrap_mean(values[:, column], pictures)
        assert alone == pytest.approx([numbers[column] for numbers in together], abs=1e-9)


def test_bootstrap_is_deterministic_and_does_not_depend_on_row_order():
    generator = np.random.default_rng(2)
    values, pictures = generator.uniform(0, 100, 100), generator.integers(0, 40, 100)
    first = intervals.bootstrap_mean(values, pictures)
    order = generator.permutation(100)
    assert intervals.bootstrap_mean(values, pictures) == first
    assert intervals.bootstrap_mean(values[order], pictures[order]) == pytest.approx(first, abs=1e-9)
    assert intervals.bootstrap_mean(values, pictures, seed=7)[1:] != first[1:]


def test_steps_of_the_bootstrap_do_not_change_its_law(monkeypatch):
    values = np.random.default_rng(3).uniform(0, 100, 500)
    whole = intervals.bootstrap_mean(values, range(500))
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 700)  # one draw a step
    assert intervals.bootstrap_mean(values, range(500)) == pytest.approx(whole, abs=0.3)


def test_missing_scores_are_left_out():
    values = np.array([[10.0, np.nan, 5.0], [20.0, np.nan, np.nan], [30.0, np.nan, 7.0]])
    mean, low, high = intervals.bootstrap_mean(values, ["a", "b", "c"])
    assert mean[[0, 2]].tolist() == [20.0, 6.0]
    assert np.isnan([mean[1], low[1], high[1]]).all()
    assert (low[2], high[2]) == (5.0, 7.0)


def test_one_picture_has_no_interval_and_no_rows_are_an_error():
    mean, low, high = intervals.bootstrap_mean([10.0, 30.0], ["a", "a"])
    assert mean == 20.0 and np.isnan(low) and np.isnan(high)
    with pytest.raises(ValueError, match="no rows to score"):
        intervals.bootstrap_mean([], [])


def test_paired_interval_is_narrow_where_rows_move_together():
    """Two systems whose scores differ by about 1 on every row: unpaired intervals overlap, the paired one does not."""
    generator = np.random.default_rng(4)
    first = generator.uniform(0, 100, 400)
    second = first - generator.normal(1, 2, 400)
    difference, low, high = intervals.paired_difference(first, second, range(400))
    assert 0 < low < difference < high < 2
    assert intervals.bootstrap_mean(first, range(400))[1] < intervals.bootstrap_mean(second, range(400))[2]


def test_ten_thousand_rows_take_little_time_and_memory():
    """2,000 draws of 8,000 pictures at once would be 128 MB of indices alone, and as much again for the counts."""
    generator = np.random.default_rng(5)
    values, pictures = generator.uniform(0, 100, (10_000, 7)), generator.integers(0, 8000, 10_000)
    started = time.process_time()
    intervals.bootstrap_mean(values, pictures)
    assert time.process_time() - started < 6  # about 0.5 s
    tracemalloc.start()
    intervals.bootstrap_mean(values, pictures, draws=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 120e6


# summaries

def test_summarise_gives_plain_rounded_numbers():
    table = intervals.summarise({"bleu_1": np.array([0.0, 100.0, 100.0]), "chrf": np.full(3, np.nan)}, ["a", "b", "c"])
    assert table == {"bleu_1": {"value": 66.67, "ci95": [0.0, 100.0], "n": 3},
                     "chrf": {"value": None, "ci95": [None, None], "n": 0}}
    assert json.loads(json.dumps(table, allow_nan=False)) == table


def test_types_are_listed_by_size_and_small_ones_hidden():
    scores = {"bleu_1": np.arange(46.0)}
    types = ["count"] * 20 + ["colour"] * 25 + [""]
    table, hidden = intervals.by_type(scores, types, range(46))
    assert list(table) == ["colour", "count"] and hidden == {"unknown": 1}
    assert table["count"]["n"] == 20 and table["count"]["bleu_1"]["value"] == 9.5
    assert intervals.by_type(scores, types, range(46), minimum=21)[1] == {"count": 20, "unknown": 1}
    in_pairs, _ = intervals.by_type(scores, types, np.arange(46) // 2)
    first = {name: values[:20] for name, values in scores.items()}
    assert in_pairs["count"]["bleu_1"] == intervals.summarise(first, np.arange(20) // 2)["bleu_1"]


# verdict

PICTURES = range(100)
FLOOR = np.tile([10.0, 30.0], 50)
WEAK = np.zeros(100)


def test_verdict_names_the_strongest_floor_and_the_way_to_one_human():
    line = intervals.verdict(FLOOR + 30, {"weak": WEAK, "strong": FLOOR}, PICTURES, human=FLOOR + 40)
    assert line == ("beats the strongest floor (strong) by 30.0 [30.0, 30.0] mean sentence BLEU and reaches 75 % of "
                    "the way from it to one human")


def test_verdict_says_when_the_interval_includes_zero_or_lies_below():
    noise = np.random.default_rng(6).normal(0.5, 20, 100)
    line = intervals.verdict(FLOOR + noise, {"strong": FLOOR}, PICTURES, human=FLOOR + 40)
    assert line.startswith("does not beat the strongest floor (strong): ") and line.endswith("includes zero")
    assert "human" not in line
    assert intervals.verdict(FLOOR, {"same": FLOOR}, PICTURES, unit="chrF") == (
        "does not beat the strongest floor (same): +0.0 [+0.0, +0.0] chrF, an interval that includes zero")
    assert intervals.verdict(FLOOR - 5, {"strong": FLOOR}, PICTURES, unit="chrF") == (
        "is below the strongest floor (strong): -5.0 [-5.0, -5.0] chrF")


def test_verdict_without_humans_or_with_some():
    alone = intervals.verdict(FLOOR + 30, {"strong": FLOOR}, PICTURES, human=np.full(100, np.nan))
    assert alone.endswith("; there is no human ceiling, since no question has a second answer")
    assert alone == intervals.verdict(FLOOR + 30, {"strong": FLOOR}, PICTURES)
    human = np.where(np.arange(100) < 50, FLOOR + 60, np.nan)
    some = intervals.verdict(FLOOR + 30, {"strong": FLOOR}, PICTURES, human=human)
    assert some.endswith(" and reaches 50 % of the way from it to one human (on the 50 of 100 questions with a second "
                         "answer)")
    lower = intervals.verdict(FLOOR + 30, {"strong": FLOOR}, PICTURES, human=FLOOR - 1)
    assert lower.endswith("; one human does not score above that floor")


def test_verdict_of_one_picture_claims_nothing():
    line = intervals.verdict(FLOOR + 30, {"strong": FLOOR}, ["same"] * 100, human=FLOOR + 40)
    assert line.startswith("stands +30.0 mean sentence BLEU from the strongest floor (strong), but one picture gives")


def test_verdict_is_paired_by_picture():
    """A gain on the twelve rows of one picture is one piece of evidence, not twelve."""
    gain = np.repeat([60.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0, -2.0], 12)
    floors = {"strong": np.zeros(96)}
    assert "includes zero" in intervals.verdict(gain, floors, np.repeat(np.arange(8), 12))
    assert intervals.verdict(gain, floors, range(96)).startswith("beats")


# calibration

def test_calibration_error_by_hand():
    """Two of four rows at 0.9 are right, one of one at 0.1 is: (4 x 0.4 + 1 x 0.9) / 5."""
    error, table = intervals.expected_calibration_error([0.9, 0.9, 0.9, 0.9, 0.1], [True, True, False, False, True])
    assert error == pytest.approx(0.5)
    assert len(table) == 10 and [row["n"] for row in table] == [1, 0, 0, 0, 0, 0, 0, 0, 4, 0]
    assert table[8] == {"low": pytest.approx(0.8), "high": pytest.approx(0.9), "n": 4,
                        "confidence": pytest.approx(0.9), "accuracy": pytest.approx(0.5)}
    assert table[5]["confidence"] is None and table[5]["accuracy"] is None


def test_calibrated_confidence_has_no_error():
    confidence = np.repeat([0.25, 0.75], 100)
    correct = np.concatenate([np.arange(100) < 25, np.arange(100) < 75])
    assert intervals.expected_calibration_error(confidence, correct)[0] == pytest.approx(0, abs=1e-12)
    assert intervals.expected_calibration_error([0.0, 1.0], [0, 1], bins=2)[1][0]["n"] == 1


@pytest.mark.parametrize("confidence", [[1.2], [-0.1], [float("nan")], []])
def test_calibration_refuses_what_is_no_probability(confidence):
    with pytest.raises(ValueError, match="0 to 1"):
        intervals.expected_calibration_error(confidence, [1] * len(confidence))
