"""The metrics file, the printed table and the comparison of two results; a metric added the way the README tells."""
import csv
import json
import re

import numpy as np
import pytest
from PIL import Image

from evaluation import metrics
from evaluation.baselines import blind_floors
from evaluation.comparison import join_all, join_results, print_comparison
from evaluation.gallery import write_gallery
from evaluation.generation import Answer
from evaluation.report import evaluate, print_table, score_bars
from evaluation.results import result_rows, write_csv


def rows_of(count=40):
    return [{"question_id": str(n), "image_id": f"p{n // 2}", "image_path": f"p{n // 2}.jpg", "question": f"what is it {n % 3}",
             "answer": f"a red thing {n % 4}", "answers": [f"a red thing {n % 4}"] * 8 + ["a thing", "red"],
             "question_type": f"what {n % 2}", "answer_type": "other"} for n in range(count)]


def test_a_perfect_model_scores_100_everywhere(capsys):
    rows = rows_of()
    labels = [row["answer"] for row in rows]
    scores, content = evaluate(rows, blind_floors(rows, rows) | {"wrong_picture": labels[::-1]}, labels)
    assert all(entry["value"] == 100 for entry in content["scores"].values())
    assert list(content["floors"]) == ["most_frequent", "most_frequent_per_question_type", "nearest_question", "wrong_picture"]
    annotator = content["ceilings"]["human"]["mean_sentence_bleu"]["value"]
    assert 75 < annotator < 100 and content["humans_per_question"] == [10, 10] and content["num_images"] == 20
    assert content["verdict"].startswith("beats the strongest floor (most_frequent_per_question_type) by")
    assert len(scores["exact_match"]) == len(rows)
    print_table(content)
    printed = capsys.readouterr().out
    assert "40 questions on 20 images, 10 annotations each" in printed and "what 0 100.0 (n=20)" in printed
    assert "every score 0 to 100, [95 % interval by image, too narrow: only 20 images]" in printed
    assert "20 images are too few to tell models apart, 30 are the least: give more rows the split test" in printed
    print_table(content | {"num_images": 30})
    assert "too few" not in capsys.readouterr().out
    assert "floor: wrong image" in printed and "picture" not in printed


def test_one_annotation_per_question_leaves_one_annotator_unknown_and_the_table_says_so(capsys):
    rows = [row | {"answers": [row["answer"]]} for row in rows_of()]
    labels = [row["answer"] for row in rows]
    _, content = evaluate(rows, blind_floors(rows, rows), labels)
    assert content["ceilings"]["human"]["mean_sentence_bleu"]["value"] is None
    print_table(content)
    printed = capsys.readouterr().out
    assert "one annotator: unknown" in printed and "1 annotation each" in printed
    assert score_bars(content)[0]["ends"][1] == "one annotator unknown"


def test_one_annotator_is_no_ceiling_and_says_if_the_label_was_chosen_with_this_vote(capsys):
    """The label was chosen with the vote of the scored annotator, which made the score 5 points too high on VQA v2."""
    rows = rows_of()
    labels = [row["answer"] for row in rows]
    held_out = [{"question_id": row["question_id"], "image_id": row["image_id"], "split": "test", "answers": row["answers"],
                 "labels": [None] + [row["answer"]] * 9} for row in rows]
    for given, kind, line, rows_scored in (((), "optimistic", "one annotator (optimistic)", 40),
                                           (held_out, "held out", "one annotator", 360)):
        _, content = evaluate(rows, {"most_frequent": ["no"] * 40}, labels, {"vocabulary": labels}, held_out=given)
        assert content["one_annotator"] == kind
        assert content["ceilings"]["human"]["mean_sentence_bleu"]["n"] == rows_scored
        assert re.search(r"; from that floor it reaches 1\d\d % \[\d+, \d+\] of the way to one annotator$", content["verdict"])
        print_table(content)
        printed = capsys.readouterr().out
        assert re.search(rf"^{re.escape(line)}  +\d", printed, re.MULTILINE) and "ceiling: one annotator" not in printed
        assert "ceiling: vocabulary and length" in printed
        assert ("chosen with this annotator's vote" in printed) == (kind == "optimistic")


def test_answers_that_training_lacks_are_counted_and_scored_apart(capsys):
    """A model that can only repeat training answers had the same table as one that writes new answers."""
    rows = rows_of()
    labels = [row["answer"] for row in rows]
    predictions = [label if label.endswith(("0", "1")) else "A  RED thing 1" for label in labels]
    predictions[0] = "something new"
    train_answers = ["a red thing 0", "A red  thing 1", "a red thing 2"]  # not "a red thing 3"
    scores, content = evaluate(rows, blind_floors(rows, rows), predictions, train_answers=train_answers)
    assert content["novel_predictions"]["value"] == 2.5 and content["novel_predictions"]["n"] == 40
    seen, unseen = (content["by_training_label"][kind] for kind in ("seen", "unseen"))
    assert (seen["n"], unseen["n"]) == (30, 10), "no minimum number of rows"
    assert unseen["exact_match"]["value"] == 0 and seen["exact_match"]["value"] == pytest.approx(100 * 19 / 30, abs=0.01)
    print_table(content)
    printed = capsys.readouterr().out
    assert "predictions that are no training label: 2.5 % [0.0, 7.5] (n=40)" in printed
    assert "exact match 63.3 (n=30); unseen " in printed and "exact match 0.0 (n=10)" in printed
    _, content = evaluate(rows, blind_floors(rows, rows), predictions, train_answers=labels)
    assert list(content["by_training_label"]) == ["seen"], "empty parts are left out"


def test_the_calibration_compares_the_confidence_with_whole_answers(capsys):
    rows = rows_of()
    labels = [row["answer"] for row in rows]
    predictions = [label if number % 2 else "wrong" for number, label in enumerate(labels)]
    _, content = evaluate(rows, blind_floors(rows, rows), predictions, confidences=[0.8] * 40)
    assert content["calibration"] == {"expected_calibration_error": 0.3, "brier_score": 0.34}
    print_table(content)
    assert "expected calibration error 0.300, Brier score 0.340" in capsys.readouterr().out

def test_a_new_metric_is_one_function_and_one_line(monkeypatch, capsys, tmp_path):
    """It has to be in the metrics file, in its own column of the printed table, among the bars and in the gallery."""
    def first_word(prediction, label):
        return 100.0 * (prediction.split()[:1] == label.split()[:1])

    line = metrics.Metric("first_word", "first", "First word", "label", first_word)
    table = (metrics.METRICS[0], line, *metrics.METRICS[1:])  # in the middle: the columns after it must not shift
    for name in ("metrics", "baselines", "report"):
        monkeypatch.setattr(f"evaluation.{name}.METRICS", table)
    rows = rows_of()
    predictions = ["a blue thing"] * 30 + ["the red thing"] * 10
    scores, content = evaluate(rows, blind_floors(rows, rows), predictions)
    content = json.loads(json.dumps({"checkpoint": "x.pt", "split": "test", **content}))
    assert content["scores"]["first_word"]["value"] == 75.0 and content["ceilings"]["human"]["first_word"]["value"] is not None
    print_table(content)
    head, model = (line.split() for line in re.findall(r"^ +BLEU .*|^the model.*", capsys.readouterr().out, re.MULTILINE))
    assert head[:3] == ["BLEU", "first", "multi-ref"] and model[3] == "75.0"
    assert [(bar["label"], bar["value"]) for bar in score_bars(content)][1] == ("First word", 75.0)
    for row in rows:
        Image.new("RGB", (8, 6)).save(tmp_path / row["image_path"])
    answers = [Answer(text, 0.5, None) for text in predictions]
    write_gallery(result_rows(rows, answers, tmp_path, scores), content, tmp_path / "results")
    page = (tmp_path / "results/index.html").read_text(encoding="utf-8")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page).group(1))
    assert data["scores"][1]["label"] == "First word"
    assert data["table"][0][:3] == ["the model", data["scores"][0]["value"], 75.0]


def test_result_rows_hold_scores_or_none_and_leave_the_rows_of_the_data_set_alone(tmp_path):
    rows = rows_of(2)
    answers = [Answer("a red thing 0", 0.9, 0.6), Answer("x, \"y\"\r", 0.25, None)]
    scores = metrics.score_rows([answer.text for answer in answers], [row["answer"] for row in rows], [[], []])
    scored = result_rows(rows, answers, tmp_path, scores)
    unscored = result_rows(rows, answers, tmp_path)
    assert rows == rows_of(2)
    assert (scored[0]["prediction"], scored[0]["exact_match"], scored[0]["gate"]) == ("a red thing 0", 100.0, 0.6)
    assert scored[1]["image_file"] == tmp_path / "p0.jpg" and unscored[1]["sentence_bleu"] is None
    write_csv(scored, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as stream:
        written = list(csv.DictReader(stream))
    assert list(written[0]) == ["question_id", "image_id", "image_path", "question", "answer", "prediction", "sentence_bleu",
                                "exact_match", "vqa_accuracy", "confidence", "question_type", "answer_type"]
    assert written[1]["prediction"] == "x, \"y\"\r" and written[1]["confidence"] == "0.25"


# comparison

def results_csv(path, predictions, scores, **changes):
    """A results CSV of one row per prediction; `changes` replace columns."""
    rows = [{"question_id": number, "image_id": number // 2, "question": "what?", "answer": "None", "prediction": prediction,
             "sentence_bleu": score, "exact_match": score, "vqa_accuracy": score, "confidence": 0.5, **changes}
            for number, (prediction, score) in enumerate(zip(predictions, scores, strict=True))]
    write_csv(rows, path)
    return path


def test_a_comparison_is_paired_and_names_the_rows_that_changed(tmp_path, capsys):
    a = results_csv(tmp_path / "a.csv", ["x", "y", "n/a", "w"], [0, 50, 20, 100])
    b = results_csv(tmp_path / "b.csv", ["x", "better", "worse", "w"], [0.0001, 100, 0, 100])  # as rounded elsewhere
    print_comparison([a], [b])
    printed = capsys.readouterr().out
    assert "1 result on each side, B - A [95 % interval by image, too narrow: only 2 images]" in printed
    assert "42.50 ->    50.00   +7.50 [" in printed
    assert "2 answers changed, 1 for the better and 1 for the worse" in printed
    improved, worsened = printed.index("most improved"), printed.index("most worsened")
    assert improved < printed.index("B: better") < worsened
    assert "A: n/a  B: worse" in printed[worsened:]


@pytest.mark.parametrize("change, message", [
    (lambda path: path.write_text("question_id,prediction\n1,x\n"), "is not a results CSV"),
    (lambda path: results_csv(path, ["x"], [1]), "answer different questions"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, answer="other"), "differ in the answer of question '0'"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, question="other?"), "differ in the question of question '0'"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, image_id="9"), "differ in the image_id of question '0'"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, sentence_bleu=None), "without scores"),
    (lambda path: results_csv(path, list("abcd"), [1, "nan", 1, 1]), "b.csv .* sentence_bleu 'nan' is no number from 0 to 100"),
    (lambda path: results_csv(path, list("abcd"), [1, 1, "inf", 1]), "b.csv .* sentence_bleu 'inf' is no number"),
    (lambda path: results_csv(path, list("abcd"), [1, 1, 1, "x"]), "b.csv .* sentence_bleu 'x' is no number"),
    (lambda path: results_csv(path, list("abcd"), [1, 100.1, 1, -1]), r"'100.1' is no number from 0 to 100 \(2 such rows"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, confidence=50), "confidence '50' is no number from 0 to 1 "),
    (lambda path: results_csv(path, list("xbcd"), [9, 2.0001, 30, 4]),  # x is another answer, 2.0001 is rounding
     r"a.csv and .*b.csv score the prediction of question '2' differently, .*--bleu-tokenize"),
    (lambda path: path.unlink(), "No such file")])
def test_results_that_cannot_be_compared_are_refused(change, message, tmp_path):
    a = results_csv(tmp_path / "a.csv", list("abcd"), [1, 2, 3, 4])
    b = results_csv(tmp_path / "b.csv", list("abcd"), [1, 2, 3, 4])
    change(b)
    with pytest.raises(ValueError, match=message):
        join_results(a, b)


def test_a_comparison_over_seeds_pairs_the_results_and_names_every_difference(tmp_path, capsys):
    """One seed's gain was the headline, with an interval of images only: other seeds gave other gains."""
    before, gains = np.linspace(10, 60, 80), (8.0, -5.0, 9.0)
    sides = [[results_csv(tmp_path / f"{side}{seed}.csv", [f"{side}{seed}"] * 80, before + (gain if side == "b" else 0))
              for seed, gain in enumerate(gains)] for side in "ab"]
    table = (tmp_path / "b1.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b1.csv").write_text("".join([table[0], *table[:0:-1]]))  # another order of rows
    print_comparison(*sides)
    printed = capsys.readouterr().out
    assert "80 questions on 40 images, 3 results on each side, B - A [95 % interval over seeds and images]" in printed
    assert f"A = {', '.join(map(str, sides[0]))}\n" in printed
    assert re.search(r"sentence_bleu +35.00 -> +39.00   \+4.00 \[-5.00, \+9.00\]   each pair: \+8.00, -5.00, \+9.00\n", printed)
    assert "most improved" not in printed


def test_the_order_of_rows_does_not_matter_for_a_comparison_over_seeds(tmp_path):
    """The questions of the second pair were in another order than the images, which are those of the first pair."""
    scores = np.random.default_rng(0).uniform(0, 100, (2, 2, 40))
    sides = [[results_csv(tmp_path / f"{side}{seed}.csv", [f"{side}{seed}"] * 40, scores[side, seed]) for seed in range(2)]
             for side in (0, 1)]
    expected = join_all(*sides)
    for side in (0, 1):
        table = (tmp_path / f"{side}1.csv").read_text().splitlines(keepends=True)
        (tmp_path / f"{side}1.csv").write_text("".join([table[0], *table[:0:-1]]))
    for table, before in zip(join_all(*sides), expected, strict=True):
        assert table.equals(before)


@pytest.mark.parametrize("damage, message", [
    (lambda sides: sides[1].pop(), "--compare has 2 results and --against 1"),
    (lambda sides: [results_csv(side[1], ["x"] * 3, [1] * 3) for side in sides], "answer different questions"),
    (lambda sides: sides[0].__setitem__(1, sides[0][0]), "names a file twice"),
    (lambda sides: [results_csv(side[1], ["x"] * 2, [1] * 2, answer="other") for side in sides], "differ in the answer"),
    (lambda sides: [results_csv(side[1], ["x", "y"], [1, 5]) for side in sides], "a0.csv and .*a1.csv score the prediction")])
def test_seeds_that_cannot_be_compared_are_refused(damage, message, tmp_path):
    sides = [[results_csv(tmp_path / f"{side}{seed}.csv", ["x", "y"], [1, 2]) for seed in range(2)] for side in "ab"]
    damage(sides)
    with pytest.raises(ValueError, match=message):
        print_comparison(*sides)
