"""The tables of the demo: show_table.py between the strongest floor and the oracle, and the lines of ablations.py."""
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

from common.files import write_json
from demo import ablations, show_table
from evaluation.generation import Answer
from evaluation.metrics import score_rows, sentence_bleu
from evaluation.report import evaluate
from evaluation.results import result_rows, write_csv
from preprocess import read_rows


def answers_of(labels, right):
    """The first `right` labels, and for the others a wrong answer."""
    return [label if number < right else "a house" for number, label in enumerate(labels)]


@pytest.fixture
def demo(tmp_path):
    """Config of show_table.py for the test split of tiny data: stage 1 has 12 of 30 answers right, stage 2 18, the strongest
    floor 6, and the oracle 27."""
    tiny.write_data(tmp_path / "data")
    frame = read_rows(tmp_path / "data").query("split == 'test'")
    rows, labels = frame.to_dict("records"), frame["answer"].tolist()
    floors = {"most_frequent": answers_of(labels, 3), "question_only": answers_of(labels, 6), "wrong_picture": ["a house"] * 30}
    for stage, right in (("1", 12), ("2", 18)):
        predictions = answers_of(labels, right)
        scores, metrics = evaluate(rows, floors, predictions, {"oracle": answers_of(labels, 27)},
                                   train_answers=labels[:9])
        write_json(tmp_path / f"{stage}_metrics.json", metrics)
        answers = [Answer(text, 0.5, None) for text in predictions]
        write_csv(result_rows(rows, answers, tmp_path, scores), tmp_path / f"{stage}_results.csv")
    return show_table.Config(str(tmp_path / "1"), str(tmp_path / "2"), "r",
                             data_dir=str(tmp_path / "data"))


def test_the_demo_measures_the_way_from_the_strongest_floor_to_the_oracle(demo, capsys):
    """It went from the better most-frequent floor, which others beat, to one annotator, whom it called a ceiling."""
    show_table.main(demo)
    printed = capsys.readouterr().out
    assert "floor: question only" in printed and "floor: wrong image" in printed
    assert "one annotator (optimistic)" in printed and "ceiling: oracle, knows the true scene" in printed
    assert "10 images, scores 0 to 100 [95 % interval by image, too narrow: only 10 images]" in printed
    assert "stage 2: The model beats the strongest floor (question only) by" in printed
    assert "of the way to the oracle and " in printed
    assert re.search(r"With a wrong image it scores \d.*, the strongest floor without image \d.* \(question only\)", printed)
    assert "labels seen in training, n = " in printed and "labels unseen in training, n = " in printed


def test_the_demo_ends_with_three_commands_to_copy(demo, capsys):
    """The second one asked a question that the model gets wrong, and did not say so."""
    results = pd.read_csv(f"{demo.stage_2}_results.csv", dtype=str, keep_default_na=False)
    results["confidence"] = "0.5"
    things = results[(results["exact_match"].astype(float) == 100) & results["answer"].str.match("an? ")]
    best = things.iloc[-1]
    results.loc[[best.name, results.index[-1]], "confidence"] = "0.8", "0.9"  # the last one is wrong
    results.to_csv(f"{demo.stage_2}_results.csv", index=False)
    show_table.main(demo)
    printed = capsys.readouterr().out
    assert f"# ask about an image; label: {best['answer']}\n" in printed and best["question"] in printed
    browse, ask, train = [shlex.split(line) for line in printed.splitlines()[-7:] if line and line[0] != "#"]
    assert {Path(command[0]).absolute() for command in (browse, ask, train)} == {Path(sys.executable)}
    assert browse[1:3] == ["-m", "webbrowser"] and browse[3].startswith("file:///") and browse[3].endswith("/r/index.html")
    asked = dict(zip(ask[2:-1:2], ask[3:-1:2], strict=True))
    assert (ask[1], ask[-1]) == ("test.py", "--explain")
    assert set(asked) == {"--checkpoint", "--image", "--question"} and Path(asked["--image"]).is_file()
    assert asked["--question"] in set(read_rows(demo.data_dir).query("split == 'test'")["question"])
    assert train[1:] == ["train.py", "--data-dir", "folder/my.csv"]


@pytest.mark.parametrize("change, expected", [
    (lambda text: text[:99], "1_metrics.json cannot be read "), (lambda text: "[]", "1_metrics.json has no scores"),
    (lambda text: text.replace('"ci95": [', '"ci95": [null, '), "1_metrics.json has no scores, or a score in it is null")])
def test_metrics_that_are_not_those_of_the_demo_are_named(change, expected, demo):
    """Metrics of test.py without --true-answers, damaged ones and those of one image ended in a traceback."""
    file = Path(f"{demo.stage_1}_metrics.json")
    file.write_text(change(file.read_text()))
    with pytest.raises(ValueError, match=rf"^--stage-1 .*{expected}"):
        show_table.main(demo)
    file.unlink()
    with pytest.raises(ValueError, match=r"^--stage-1 .*No such file"):
        show_table.main(demo)


@pytest.mark.parametrize("table, key", [("ceilings", "oracle"), ("ceilings", "human"), ("floors", "wrong_picture"),
                                        (None, "by_training_label")])
def test_a_missing_table_is_named(table, key, demo, capsys):
    file = Path(f"{demo.stage_2}_metrics.json")
    metrics = json.loads(file.read_text())
    del (metrics[table] if table else metrics)[key]
    write_json(file, metrics)
    with pytest.raises(ValueError, match=rf"^--stage-2 .*2_metrics.json has no {f'{table}.' if table else ''}{key}, "):
        show_table.main(demo)
    assert not capsys.readouterr().out


def test_a_line_of_the_ablations_has_an_interval_over_seeds(tmp_path):
    """Averaging the seeds and resampling images made the second line bold: its gain is that of one seed in three."""
    cfg, rows = ablations.Config(output_dir=str(tmp_path)), [
        {"question_id": str(number), "image_id": str(number), "image_path": "", "question": "what?", "answer": "a red ball",
         "answers": [], "question_type": "", "answer_type": ""} for number in range(40)]
    other = ablations.Variant("other", train="--inputs image")
    for seed, right in ((42, 40), (43, 20), (44, 18)):
        for variant, count in ((ablations.STAGE_1, 20), (other, right)):
            predictions = answers_of(["a red ball"] * 40, count)
            scores = score_rows(predictions, ["a red ball"] * 40, [[]] * 40)
            folder = ablations.run_folder(variant, seed, cfg)
            folder.mkdir()
            write_csv(result_rows(rows, [Answer(text, 0.5, None) for text in predictions], tmp_path, scores),
                      folder / "results.csv")
            write_json(folder / "metrics.json", {"by_training_label": {"unseen": {"mean_sentence_bleu": {"value": count}}}})
    line = ablations.table_line(other, range(42, 45), cfg)
    gain = np.mean([20, 0, -2]) * (100 - sentence_bleu("a house", "a red ball")) / 40
    assert f" | 26.0 | {gain:+.1f} [-" in line and "**" not in line, "26: the mean over seeds on unseen labels"
    assert ablations.table_line(ablations.STAGE_1, range(42, 45), cfg).endswith("|  |")
