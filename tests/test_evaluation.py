"""The metrics file, the printed table and the comparison of two results; a metric added the way the README tells."""
import csv
import json
import re

import pytest
from PIL import Image

from evaluation import metrics
from evaluation.baselines import blind_floors
from evaluation.gallery import write_gallery
from evaluation.generation import Answer
from evaluation.report import evaluate, join_results, print_comparison, print_table, score_bars
from evaluation.results import result_rows, write_csv


def rows_of(count=40):
    return [{"question_id": str(n), "image_id": f"p{n // 2}", "image_path": f"p{n // 2}.jpg", "question": f"what is it {n % 3}",
             "answer": f"a red thing {n % 4}", "answers": [f"a red thing {n % 4}"] * 8 + ["a thing", "red"],
             "question_type": f"what {n % 2}", "answer_type": "other"} for n in range(count)]


def test_a_perfect_model_scores_100_everywhere(capsys):
    rows = rows_of()
    labels = [row["answer"] for row in rows]
    scores, content = evaluate(rows, blind_floors(rows, rows) | {"wrong_picture": labels[::-1]}, labels, labels)
    assert all(entry["value"] == 100 for entry in content["scores"].values())
    assert list(content["floors"]) == ["most_frequent", "most_frequent_per_question_type", "nearest_question", "wrong_picture"]
    annotator = content["ceilings"]["human"]["mean_sentence_bleu"]["value"]
    assert 75 < annotator < 100 and content["humans_per_question"] == [10, 10] and content["num_images"] == 20
    assert content["verdict"].startswith("beats the strongest floor")
    assert len(scores["exact_match"]) == len(rows)
    print_table(content)
    printed = capsys.readouterr().out
    assert "40 questions on 20 images, 10 annotations each" in printed and "what 0 100.0 (n=20)" in printed
    assert "floor: wrong image" in printed and "picture" not in printed


def test_one_annotation_per_question_gives_no_annotator_ceiling_and_the_table_says_so(capsys):
    rows = [row | {"answers": [row["answer"]]} for row in rows_of()]
    labels = [row["answer"] for row in rows]
    _, content = evaluate(rows, blind_floors(rows, rows), labels, labels)
    assert content["ceilings"]["human"]["mean_sentence_bleu"]["value"] is None
    print_table(content)
    printed = capsys.readouterr().out
    assert "one annotator: unknown" in printed and "1 annotation each" in printed
    assert score_bars(content)[0]["ends"][1] == "no annotator ceiling"


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
    scores, content = evaluate(rows, blind_floors(rows, rows), predictions, predictions)
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
    scored, unscored = (result_rows(rows, answers, tmp_path, given) for given in (scores, None))
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
    b = results_csv(tmp_path / "b.csv", ["x", "better", "worse", "w"], [0, 100, 0, 100])
    print_comparison(a, b)
    printed = capsys.readouterr().out
    assert "42.50 ->    50.00   +7.50 [" in printed
    assert "2 answers changed, 1 for the better and 1 for the worse" in printed
    improved, worsened = printed.index("most improved"), printed.index("most worsened")
    assert improved < printed.index("B: better") < worsened
    assert "A: n/a  B: worse" in printed[worsened:]


@pytest.mark.parametrize("change, message", [
    (lambda path: path.write_text("question_id,prediction\n1,x\n"), "is not a results CSV"),
    (lambda path: results_csv(path, ["x"], [1]), "answer different questions"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, answer="other"), "different labels"),
    (lambda path: results_csv(path, list("abcd"), [1] * 4, sentence_bleu=None), "without scores"),
    (lambda path: path.unlink(), "No such file")])
def test_results_that_cannot_be_compared_are_refused(change, message, tmp_path):
    a = results_csv(tmp_path / "a.csv", list("abcd"), [1, 2, 3, 4])
    b = results_csv(tmp_path / "b.csv", list("abcd"), [1, 2, 3, 4])
    change(b)
    with pytest.raises(ValueError, match=message):
        join_results(a, b)
