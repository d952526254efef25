"""Rows of validation and test whose image was trained on: found by the content of the image files, not by their names."""
import json
import shutil
from types import SimpleNamespace

import pytest
import tiny
import torch
from conftest import call_script

from common.device import Precision
from features.overlap import report_leaks
from features.trained_model import read_checkpoint
from preprocess import build_datasets, read_rows, split_of
from vocab import Vocab

NEXT_SPLIT = {"train": "test", "test": "val", "val": "train"}


@pytest.fixture
def other_splits(data_dir, tmp_path):
    """The small data set built again: other names and splits. Its 40 test images were in training, the others were not."""
    folder, rows = tmp_path / "data", tiny.read_csv(data_dir / "metadata.csv")
    (folder / "images").mkdir(parents=True)
    for row in rows:
        target = f"images/new{row['image_id']}.png"
        shutil.copyfile(data_dir / row["image_path"], folder / target)
        row.update(image_path=target, split=NEXT_SPLIT[row["split"]], answers=[])
    tiny.write_rows(folder, rows)
    (folder / "qa_pairs.json").unlink()
    return folder


@pytest.fixture
def score(stage_one, session_cache, tmp_path):
    """score(data folder, *flags) -> (what test.py prints of stage 1's checkpoint, metrics)."""
    def run(data, *flags):
        output = call_script("test.py", "--checkpoint", stage_one / "vqa_checkpoint.pt", "--cache-dir", session_cache,
                             "--results-dir", "r", "--results-csv", "r.csv", "--metrics-json", "m.json", "--num-pictures", 0,
                             "--data-dir", data, *flags, cwd=tmp_path, expect=None)
        return output, json.loads((tmp_path / "m.json").read_text()) if (tmp_path / "m.json").exists() else None
    return run


def test_a_checkpoint_is_not_tested_on_images_that_it_was_trained_on(other_splits, score):
    """The data was built again with another seed: 88.9 BLEU, and not a word about the 27 of 33 test images of training."""
    error, metrics = score(other_splits)
    assert error.startswith("error: ") and metrics is None and "--seed" in error and "--allow-trained-images" in error
    assert "was trained on 40 of 40 test images (120 of 120 questions show them, 120 were trained on themselves)" in error
    output, metrics = score(other_splits, "--allow-trained-images")
    assert "warning: " in output and "Warning: it was trained on 40 of these 40 images." in output.splitlines()[-3]
    assert metrics["trained_images"] == {"images": 40, "of_images": 40, "questions": 120, "of_questions": 120,
                                         "same_questions": 120}
    _, metrics = score(other_splits, "--split", "val")
    assert metrics["trained_images"] == {"images": 0, "of_images": 10, "questions": 0, "of_questions": 30, "same_questions": 0}


def test_training_rows_are_scored_if_asked_for_and_are_not_their_own_nearest_question(data_dir, score, tmp_path):
    """The nearest training question was the tested question itself, and its answer the label."""
    rows = tiny.write_data(tmp_path / "data")
    for row in rows[::3]:
        row["question"] = f"word{row['question_id']}"
    tiny.write_rows(tmp_path / "data", rows)
    output, metrics = score(tmp_path / "data", "--split", "train")
    assert "Warning: it was trained on 40 of these 40 images." in output
    assert metrics["trained_images"]["questions"] == 120 and metrics["trained_images"]["same_questions"] == 80
    assert metrics["floors"]["nearest_question"]["exact_match"]["value"] < 33


def test_stage_two_refuses_such_images_and_its_checkpoint_names_those_of_both_stages(
        stage_one, other_splits, session_cache, tmp_path):
    flags = ["--checkpoint", stage_one / "vqa_checkpoint.pt", "--data-dir", other_splits, "--cache-dir", session_cache,
             "--epochs", 1, "--clip-layers", 0, "--gpt2-layers", 1, "--output-dir", tmp_path / "two"]
    error = call_script("fine_tune.py", *flags, expect=2, cwd=tmp_path)
    assert "was trained on 40 of 50 validation and test images (120 of 150 questions" in error
    assert "--allow-trained-images" in error and not (tmp_path / "two").exists()
    output = call_script("fine_tune.py", *flags, "--allow-trained-images", cwd=tmp_path)
    assert "warning: " in output and "40 of 50 validation and test images" in output
    one, two = (read_checkpoint(folder / "vqa_checkpoint.pt")["trained_on"] for folder in (stage_one, tmp_path / "two"))
    assert {name: len(hashes) for name, hashes in one.items()} == {"images": 40, "questions": 120}
    assert {name: len(hashes) for name, hashes in two.items()} == {"images": 50, "questions": 150}
    assert all(torch.isin(one[name], two[name]).all() for name in one)


def in_two_splits(rows, folder):
    rows[6].update(split="test")  # of image 2, whose other rows are of training


def another_spelling(rows, folder):
    rows[6].update(split="val", image_path=f"./{rows[6]['image_path']}")


def copies(rows, folder):
    for number in (6, 7):  # of test and of validation
        shutil.copyfile(folder / "images/0002.png", folder / f"images/000{number}.png")


@pytest.mark.parametrize(("damage", "message"), [
    (None, None), (in_two_splits, "1 of 31 test rows"), (another_spelling, "1 of 31 val rows"),
    (copies, "3 of 30 val rows and 3 of 30 test rows")])
def test_images_of_training_in_other_splits_are_counted(damage, message, make_model, encoders, session_cache, tmp_path, capsys):
    rows = tiny.write_data(tmp_path)
    if damage:
        damage(rows, tmp_path)
        tiny.write_rows(tmp_path, rows)
    table = read_rows(tmp_path)
    vocab, cfg = Vocab.build(table["answer"]), SimpleNamespace(cache_dir=session_cache, workers=1)
    datasets = build_datasets(make_model(len(vocab)), encoders, vocab, table, tmp_path, cfg, Precision("cpu"), ("train",))
    report_leaks(table, datasets["train"].store.image_digests)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert [f"{message} show an image that is also in training" in line for line in warnings] == [True] * bool(damage)
    assert all("column 'split'" in line for line in warnings)


def test_spellings_of_one_path_are_one_image_in_one_split(tmp_path):
    names = [f"images/{number}.jpg" for number in range(50)]
    lines = [f"{name},q,x\n./{name},q,x\n{name.replace('/', '//')},q,x\n" for name in names]
    (tmp_path / "own.csv").write_text("image_path,question,answer\n" + "".join(lines))
    rows = read_rows(tmp_path / "own.csv")
    assert rows["image_id"].nunique() == 50 and rows["split"].nunique() == 3
    assert rows["split"].tolist() == [split_of(name) for name in names for _ in range(3)]
