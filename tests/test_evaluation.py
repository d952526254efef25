"""What stands beside a score, and how two results are compared."""
import csv

import pytest

from evaluation.report import evaluate_predictions, join_results, print_comparison, print_table

COLUMNS = ("question_id", "image_id", "question", "answer", "prediction", "sentence_bleu", "exact_match", "vqa_accuracy",
           "confidence")


def rows_of(count=40):
    return [{"question_id": str(n), "image_id": f"p{n // 2}", "image_path": f"p{n // 2}.jpg", "question": f"what is it {n % 3}",
             "answer": f"a red thing {n % 4}", "answers": [f"a red thing {n % 4}"] * 8 + ["a thing", "red"],
             "question_type": f"what {n % 2}", "answer_type": "other"} for n in range(count)]


def test_a_perfect_model_stands_at_the_top_of_every_score(capsys):
    rows = rows_of()
    labels = [row["answer"] for row in rows]
    scores, metrics = evaluate_predictions(rows, rows, labels, {"wrong_picture": labels[::-1]}, labels)
    assert all(entry["value"] == 100 for entry in metrics["scores"].values())
    assert {"most_frequent", "most_frequent_per_question_type", "nearest_question", "wrong_picture"} == set(metrics["floors"])
    human = metrics["ceilings"]["human"]["mean_sentence_bleu"]["value"]
    assert 75 < human < 100 and metrics["humans_per_question"] == [10, 10] and metrics["num_images"] == 20
    assert metrics["verdict"].startswith("beats the strongest floor")
    assert len(scores["exact_match"]) == len(rows)
    print_table(metrics)
    printed = capsys.readouterr().out
    assert "40 questions on 20 pictures, 10 human answers each" in printed and "what 0 100.0 (n=20)" in printed


def test_one_answer_per_question_has_no_human_ceiling_and_the_table_says_so(capsys):
    rows = [row | {"answers": [row["answer"]]} for row in rows_of()]
    labels = [row["answer"] for row in rows]
    _, metrics = evaluate_predictions(rows, rows, labels, {}, labels)
    assert metrics["ceilings"]["human"]["mean_sentence_bleu"]["value"] is None
    print_table(metrics)
    printed = capsys.readouterr().out
    assert "one human: unknown" in printed and "1 human answer each" in printed


def write_results(path, predictions, scores, **changes):
    with open(path, "w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        for number, (prediction, score) in enumerate(zip(predictions, scores, strict=True)):
            writer.writerow({"question_id": number, "image_id": number // 2, "question": "what?", "answer": "None",
                             "prediction": prediction, "sentence_bleu": score, "exact_match": score, "vqa_accuracy": score,
                             "confidence": 0.5, **changes})
    return path


def test_a_comparison_is_paired_and_names_the_rows_that_changed(tmp_path, capsys):
    a = write_results(tmp_path / "a.csv", ["x", "y", "n/a", "w"], [0, 50, 20, 100])
    b = write_results(tmp_path / "b.csv", ["x", "better", "worse", "w"], [0, 100, 0, 100])
    print_comparison(a, b)
    printed = capsys.readouterr().out
    assert "42.50 ->    50.00   +7.50 [" in printed
    assert "2 answers changed, 1 for the better and 1 for the worse" in printed
    improved, worsened = printed.index("most improved"), printed.index("most worsened")
    assert improved < printed.index("B: better") < worsened
    assert "A: n/a  B: worse" in printed[worsened:]


@pytest.mark.parametrize("change, message", [
    (lambda path: path.write_text("question_id,prediction\n1,x\n"), "is not a results CSV"),
    (lambda path: write_results(path, ["x"], [1]), "answer different questions"),
    (lambda path: write_results(path, list("abcd"), [1] * 4, answer="other"), "different labels"),
    (lambda path: write_results(path, list("abcd"), [1] * 4, sentence_bleu=""), "without scores"),
    (lambda path: path.unlink(), "no such file")])
def test_results_that_cannot_be_compared_are_refused(change, message, tmp_path):
    a = write_results(tmp_path / "a.csv", list("abcd"), [1, 2, 3, 4])
    b = write_results(tmp_path / "b.csv", list("abcd"), [1, 2, 3, 4])
    change(b)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        join_results(a, b)
