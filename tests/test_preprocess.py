import json

import pandas as pd
import pytest
import tiny
import torch

from preprocess import SPLITS, VQADataset, read_rows, rows_of_split, split_of
from vocab import END, PAD, START, Vocab


def write_csv(folder, text):
    folder.mkdir(exist_ok=True)
    (folder / "metadata.csv").write_text(text, encoding="utf-8")
    return folder


def test_own_csv_needs_three_columns_and_keeps_missing_looking_text(tmp_path):
    rows = read_rows(write_csv(tmp_path / "own", "image_path,question,answer\na.jpg,What is it?,n/a\nb.jpg,Who?,None\n"))
    assert rows["answer"].tolist() == ["n/a", "None"]
    assert rows["answers"].tolist() == [["n/a"], ["None"]]
    assert rows["question_id"].tolist() == ["0", "1"]
    assert set(rows["split"]) <= set(SPLITS)


def test_a_csv_file_may_be_named_itself(tmp_path):
    write_csv(tmp_path / "own", "image_path,question,answer\na.jpg,What is it?,a cat\n")
    (tmp_path / "own" / "metadata.csv").rename(tmp_path / "own" / "mine.csv")
    assert len(read_rows(tmp_path / "own" / "mine.csv")) == 1


def test_split_of_own_pictures_is_constant_and_near_its_shares():
    splits = pd.Series([split_of(f"{number}.jpg") for number in range(5000)])
    shares = splits.value_counts(normalize=True)
    assert abs(shares["train"] - 0.8) < 0.02 and abs(shares["val"] - 0.1) < 0.02
    # written down once: train.py and test.py of any version must agree
    assert [split_of(path) for path in ("a.jpg", "images/1.png", "7.jpg", "12.jpg")] == ["val", "train", "train", "train"]


def test_splits_share_no_picture(data_dir):
    rows = read_rows(data_dir)
    pictures = [set(rows_of_split(rows, split)["image_path"]) for split in SPLITS]
    assert not (pictures[0] & pictures[1] or pictures[0] & pictures[2] or pictures[1] & pictures[2])


def test_json_adds_all_human_answers(data_dir):
    assert all(len(answers) == 10 for answers in read_rows(data_dir)["answers"])


def test_json_that_disagrees_with_the_csv_is_an_error(tmp_path):
    rows = tiny.write_data(tmp_path / "d", num_pictures=3)
    rows[1]["answer"] = "another label"
    (tmp_path / "d" / "qa_pairs.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="another label"):
        read_rows(tmp_path / "d")


def test_json_with_a_question_twice_is_an_error(tmp_path):
    rows = tiny.write_data(tmp_path / "d", num_pictures=3)
    (tmp_path / "d" / "qa_pairs.json").write_text(json.dumps([*rows, rows[1]]))
    with pytest.raises(ValueError, match=f"has the question_id {rows[1]['question_id']} twice"):
        read_rows(tmp_path / "d")


@pytest.mark.parametrize("text, message", [
    ("image_path,question\na.jpg,b\n", "lacks the column answer"),
    ("image_path,question,answer\n", "no row"),
    ("image_path,question,answer\na.jpg,,x\n", "no row"),
    ("image_path,question,answer\n../a.jpg,q,x\n", "inside the folder"),
    ("image_path,question,answer\n/etc/a.jpg,q,x\n", "inside the folder"),
    ("image_path,question,answer,split\na.jpg,q,x,dev\n", "'dev'"),
    ("question_id,image_path,question,answer\n1,a.jpg,q,x\n1,b.jpg,q,x\n", "twice"),
    ("", "not a UTF-8 CSV"),
])
def test_bad_csv_is_one_clear_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_rows(write_csv(tmp_path / "bad", text))


def test_missing_data_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="mini_vqa_v2.py"):
        read_rows(tmp_path / "nowhere")


def test_rows_without_question_or_answer_are_counted(tmp_path, capsys):
    rows = read_rows(write_csv(tmp_path / "own", "image_path,question,answer\na.jpg,q,\nb.jpg,q,x\nc.jpg, ,x\n"))
    assert len(rows) == 1 and "2 rows" in capsys.readouterr().out


def test_batches_hold_whole_answers_and_trimmed_lengths(feature_store, data_dir):
    rows = rows_of_split(read_rows(data_dir), "train")
    vocab = Vocab.build(rows["answer"])
    dataset = VQADataset(rows, vocab, 16, feature_store)
    seen = []
    for batch in dataset.batches(7):
        ids = batch["answer_ids"]
        assert (ids[:, 0] == START).all() and ((ids == END).sum(1) == 1).all()
        assert (ids != PAD).any(0).all(), "a column of padding alone was not trimmed"
        seen += [vocab.decode(row) for row in ids.tolist()]
    assert seen == rows["answer"].tolist()


@pytest.mark.parametrize("by_picture", [False, True])
def test_an_epoch_visits_every_row_once_in_a_seeded_order(by_picture, feature_store, data_dir):
    rows = rows_of_split(read_rows(data_dir), "train")
    dataset = VQADataset(rows, Vocab.build(rows["answer"]), 16, feature_store)
    orders = [dataset.epoch_order(torch.Generator().manual_seed(seed), by_picture).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(len(rows)))
    pictures = rows["image_path"].iloc[orders[0]].tolist()
    changes = sum(a != b for a, b in zip(pictures, pictures[1:], strict=False))
    assert (changes == rows["image_path"].nunique() - 1) == by_picture
