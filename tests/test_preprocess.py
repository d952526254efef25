"""From a CSV to batches: CSVs as people have them, splits, annotators' answers, the dataset and its assembly."""
import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from PIL import Image

from common.device import Precision
from features.store import FeatureStore
from preprocess import SPLITS, VQADataset, build_datasets, read_rows, report_answers, rows_of_split, split_of, training_answers
from vocab import END, PAD, START, Vocab

TEN_THOUSAND_WORDS = "word " * 10_000
HEADER = "image_path,question,answer\n"


def write_csv(folder, text, encoding="utf-8"):
    path = folder / "own.csv"
    path.write_bytes(text.encode(encoding))
    return path


@pytest.mark.parametrize(("text", "encoding", "answers"), [
    (HEADER + "a.jpg,q,x\n", "utf-8-sig", ["x"]),
    (HEADER.replace("\n", "\r\n") + "a.jpg,q,x\r\nb.jpg,q,y\r\n", "utf-8", ["x", "y"]),
    (HEADER + 'a.jpg,"two\nlines","a\r\nb"\n', "utf-8", ["a\r\nb"]),
    ("image_path;question;answer\na.jpg;one, two;x\n", "utf-8", ["x"]),
    ("image_path\tquestion\tanswer\na.jpg\tq\tx\n", "utf-8", ["x"]),
    ("note,answer,question,image_path\nhello,x,q,a.jpg\n", "utf-8", ["x"]),
    (HEADER + "a.jpg,q,=1+1\nb.jpg,q,@cmd\n", "utf-8", ["=1+1", "@cmd"]),
    (HEADER + "a.jpg,q,😀 כלב كلب\n", "utf-8", ["😀 כלב كلب"]),
    (HEADER + f"a.jpg,q,{TEN_THOUSAND_WORDS}\n", "utf-8", [TEN_THOUSAND_WORDS]),
    (HEADER + "\na.jpg,q,x\n\n", "utf-8", ["x"]),
    (",,\n" + HEADER + "a.jpg,q,x\n,,\n   \n , ,\nb.jpg,q,y\n,,\n", "utf-8", ["x", "y"]),
    (" image_path ; question;\tanswer;;\na.jpg;q;x;;\n", "utf-8", ["x"]),
    ("Image_Path,Question,ANSWER\na.jpg,q,X\n", "utf-8", ["X"]),
    (HEADER + "a.jpg,q,n/a\na.jpg,q,NULL\nb.jpg,q,None\n", "utf-8", ["n/a", "NULL", "None"]),
], ids=["byte order mark", "CRLF", "quoted line breaks", "semicolons", "tabs", "other order and more columns", "formulas",
        "emoji and right to left", "ten thousand words", "empty lines",
        "blank rows", "spaces and columns without a name in the header", "upper case in the header", "looks missing"])
def test_csvs_as_people_have_them(text, encoding, answers, tmp_path):
    rows = read_rows(write_csv(tmp_path, text, encoding))
    assert rows["answer"].tolist() == answers and rows["answers"].tolist() == [[answer] for answer in answers]
    assert rows["question_id"].tolist() == [str(number) for number in range(len(rows))]
    assert set(rows["split"]) <= set(SPLITS)


@pytest.mark.parametrize(("text", "encoding", "message"), [
    (HEADER + "a.jpg,q,x\n", "utf-16", "not a UTF-8 CSV"),
    (HEADER + "a.jpg,q,\xe9\n", "latin-1", "save it as CSV in UTF-8"),
    (HEADER + "a.jpg,q,x\0y\n", "utf-8", "NUL"),
    (HEADER + "a.jpg,q\n", "utf-8", "line 2: 2 cells, the header has 3"),
    (HEADER + "a.jpg,q,x,y\n", "utf-8", "line 2: 4 cells, the header has 3"),
    (HEADER + ",,\n  \n" + 'a.jpg,"two\nlines"\n', "utf-8", "line 4: 2 cells, the header has 3"),
    (HEADER + 'a.jpg,"q,x\n', "utf-8", "line 2: unexpected end of data"),
    (HEADER + 'a.jpg,q,x\nb.jpg,"q\n\n' + "q" * 131_073, "utf-8", "line 3: field larger than field limit (131072)"),
    ("question_id;image_path;question;answer\n394;a.jpg;q;x\n18,394;b.jpg;q;x\n", "utf-8", "line 3: the question_id '18,394'"),
    (HEADER.replace("\n", ',image_id\na.jpg,q,x,"262\u202f148"\n'), "utf-8", "line 2: the image_id '262\\u202f148'"),
    ("image_path,question\na.jpg,q\n", "utf-8", "lacks the column answer; it has image_path, question"),
    ("imagepath, question\na.jpg,q\n", "utf-8", "lacks the columns image_path, answer"),
    ("image_path,question,answer,answer\na.jpg,q,x,y\n", "utf-8", "the column 'answer' twice"),
    (HEADER, "utf-8", "no row with question and answer"),
    (HEADER + "a.jpg,,x\n", "utf-8", "no row with question and answer"),
    ("", "utf-8", "is empty"),
    (HEADER + "/etc/passwd,q,x\n", "utf-8", "is absolute or leaves the folder of the CSV; if it is meant, use --allow-outside"),
    (HEADER + ",q,x\n", "utf-8", "a row has no image_path"),
    (HEADER + "a/../../b.jpg,q,x\n", "utf-8", "is absolute or leaves"),
    (HEADER + "..\\b.jpg,q,x\n", "utf-8", "is absolute or leaves"),
    ("image_path,question,answer,split\na.jpg,q,x,dev\n", "utf-8", "the split 'dev' is none of train, val, test"),
    ("question_id,image_path,question,answer\n7,a.jpg,q,x\n7,b.jpg,q,x\n", "utf-8", "question_id '7' occurs twice"),
], ids=["utf-16", "latin-1", "NUL", "too few cells", "too many cells", "lines are counted with blank rows and line breaks",
        "open quote", "huge cell", "grouped digits", "digits grouped by a narrow space", "column missing", "columns misspelled",
        "column twice", "no rows", "no question", "empty file", "absolute path", "no path", "path that leaves",
        "path that leaves by backslash", "unknown split", "question id twice"])
def test_bad_csvs_end_in_one_clear_line(text, encoding, message, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        read_rows(write_csv(tmp_path, text, encoding))
    assert "own.csv" in str(error.value)


def test_blank_rows_are_counted_and_a_tsv_is_a_csv(tmp_path, capsys):
    """Excel writes `,,,` for an empty row: the run ended with "image_path '' does not lie inside the folder"."""
    path = tmp_path / "own.TSV"
    path.write_text(HEADER.replace(",", "\t") + "a.jpg\tq\tx\n\t\t\n   \n\n")
    assert len(read_rows(path)) == 1
    assert "own.TSV: 2 blank rows are left out" in capsys.readouterr().out


def test_a_file_of_questions_may_have_a_split_of_its_own(tmp_path):
    path = write_csv(tmp_path, "image_path,question,split\na.jpg,q,dev\nb.jpg,q,\n")
    assert len(read_rows(path, need_answers=False, use_split=False)) == 2


@pytest.mark.parametrize("path", ["/data/a.jpg", "../a.jpg", "a/../../b.jpg"])
def test_paths_outside_the_folder_are_allowed_by_a_flag(path, tmp_path):
    assert read_rows(write_csv(tmp_path, HEADER + f"{path},q,x\n"), allow_outside=True)["image_path"].tolist() == [path]


def test_rows_without_question_or_answer_are_counted(tmp_path, capsys):
    rows = read_rows(write_csv(tmp_path, HEADER + "a.jpg,q,\nb.jpg,q,x\nc.jpg, ,x\n"))
    assert len(rows) == 1 and "2 rows" in capsys.readouterr().out


def test_truncated_answers_and_unknown_words_are_counted(capsys):
    rows = pd.DataFrame({"answer": ["a cat", TEN_THOUSAND_WORDS], "split": "train"})
    report_answers(rows, Vocab.build(["a", "word"]), 16)
    assert ("2 rows, 1 truncated to 15 words (the longest has 10000: see train.py --answer-max-len), 1 of 10002 words unknown "
            "(0.0%: see train.py --min-word-freq)" in capsys.readouterr().out)
    report_answers(rows[:1], Vocab.build(["a", "cat"]), 16)
    assert "1 rows, 0 truncated to 15 words, 0 of 2 words unknown (0.0%)\n" in capsys.readouterr().out


def test_qa_pairs_json_adds_the_answers_of_all_annotators(data_dir):
    assert all(len(answers) == 10 for answers in read_rows(data_dir)["answers"])


def test_rows_that_qa_pairs_json_lacks_are_counted_and_sharing_none_is_an_error(tmp_path, capsys):
    """With other ids every row silently had one annotation."""
    rows = tiny.write_data(tmp_path, 3)
    (tmp_path / "qa_pairs.json").write_text(json.dumps(rows[2:]))
    assert [len(answers) for answers in read_rows(tmp_path)["answers"]] == [1, 1] + [10] * 7
    assert "qa_pairs.json lacks 2 of 9 rows, for example question '0'" in capsys.readouterr().out
    (tmp_path / "qa_pairs.json").write_text(json.dumps([{**row, "question_id": f"x{row['question_id']}"} for row in rows]))
    with pytest.raises(ValueError, match="qa_pairs.json has none of the 9 rows of the CSV.*the CSV has '0'"):
        read_rows(tmp_path)


def test_row_numbers_are_no_ids_of_qa_pairs_json(tmp_path, capsys):
    """A CSV without question_id beside the JSON was joined by its row numbers: refused, or with another question's answers."""
    rows = tiny.write_data(tmp_path, 3)
    (tmp_path / "own.csv").write_text(HEADER + "".join(f"{row['image_path']},{row['question']},other\n" for row in rows))
    assert read_rows(tmp_path / "own.csv")["answers"].tolist() == [["other"]] * 9
    assert "qa_pairs.json is not used: the CSV has no column question_id" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["another label", "a question twice"])
def test_a_qa_pairs_json_of_another_run_is_an_error(kind, tmp_path):
    rows = tiny.write_data(tmp_path / "d", 3)
    if kind == "another label":
        rows[1]["answer"], message = "another label", "answer is .* in the CSV and 'another label' in .*qa_pairs.json"
    else:
        rows, message = [*rows, rows[1]], f"has the question_id {rows[1]['question_id']} twice"
    (tmp_path / "d" / "qa_pairs.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "d")


@pytest.mark.parametrize("content", [
    '[{"question_id": "0"', '"text"', "[1, 2]", "[" * 100_000, '[{"question": "q"}]', "null",
    '[{"question_id": 0, "answers": "x"}]', '[{"question_id": 0, "answers": ["x", 3]}]',
    '[{"question_id": 0, "answers": {"answer": "x"}}]'],
    ids=["truncated", "a text", "numbers", "deep", "no ids", "null", "answers a text", "an answer a number",
         "answers an object"])
def test_a_damaged_qa_pairs_json_is_refused(content, tmp_path):
    (tmp_path / "metadata.csv").write_text("question_id,image_path,question,answer\n0,a.jpg,q,x\n")
    (tmp_path / "qa_pairs.json").write_text(content)
    with pytest.raises(ValueError, match="qa_pairs.json is not what mini_vqa_v2.py writes"):
        read_rows(tmp_path)


CATS = ["a cat", "a cat", "tabby"]


@pytest.mark.parametrize(("cells", "label", "answers"), [
    ({"answers": json.dumps(CATS)}, "a cat", CATS),
    ({"Answers ": json.dumps(CATS), "answer": "tabby"}, "tabby", CATS),
    ({"answers": json.dumps(CATS), "answer": " "}, "a cat", CATS),
    ({"answers": '["b", "a", "B"]'}, "B", ["b", "a", "B"]),
    ({"answers": r'["caf\u00e9, two\nlines"]'}, "café, two\nlines", ["café, two\nlines"]),
    ({"answers": " ", "answer": "x"}, "x", ["x"]), ({"answers": "[]", "answer": "x"}, "x", ["x"]),
    ({"answers": '[" ", "x"]'}, "x", ["x"])],
    ids=["no label", "a label of one's own", "an empty label", "a tie", "escapes", "no cell", "empty list", "an empty text"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_a_cell_may_hold_the_answers_of_several_annotators(separator, cells, label, answers, tmp_path):
    text = pd.DataFrame([{"image_path": "a.jpg", "question": "q"} | cells]).to_csv(index=False, sep=separator)
    rows = read_rows(write_csv(tmp_path, text))
    assert rows["answer"].tolist() == [label] and rows["answers"].tolist() == [answers]


@pytest.mark.parametrize("cell", ["a cat", '["a cat", 3]', '"a cat"', "['a cat']", '{"answer": "a cat"}', "3", '["a cat"',
                                  r'["\ud83d"]', r'["a\u0000b"]', "[" * 100_000], ids=lambda cell: cell[:10])
def test_a_cell_that_is_no_list_of_texts_is_named_by_its_line(cell, tmp_path):
    rows = pd.DataFrame({"image_path": "a.jpg", "question": ["two\nlines", "q"], "answers": [json.dumps(CATS), cell]})
    with pytest.raises(ValueError, match=r"own.csv, line 4: .* is no JSON list of texts, such as \[") as error:
        read_rows(write_csv(tmp_path, rows.to_csv(index=False)))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300 + len(str(tmp_path))
    assert len(read_rows(tmp_path / "own.csv", need_answers=False)) == 2, "--data-csv needs no answers"


def test_rows_without_any_answer_are_left_out(tmp_path, capsys):
    rows = read_rows(write_csv(tmp_path, 'image_path,question,answers\na.jpg,q,[]\nb.jpg,q,"[""x""]"\nc.jpg,q,\n'))
    assert rows["image_path"].tolist() == ["b.jpg"]
    assert "2 rows without question or answer are left out" in capsys.readouterr().out


def test_a_column_answers_gives_what_qa_pairs_json_gives_and_goes_before_it(data_dir, tmp_path, capsys):
    expected = read_rows(data_dir)
    rows = pd.read_csv(data_dir / "metadata.csv", dtype=str, keep_default_na=False)
    rows["answers"] = expected["answers"].map(json.dumps)
    rows.to_csv(tmp_path / "own.csv", index=False)
    pd.testing.assert_frame_equal(read_rows(tmp_path / "own.csv"), expected, check_like=True)
    (tmp_path / "qa_pairs.json").write_text("[]")
    pd.testing.assert_frame_equal(read_rows(tmp_path / "own.csv"), expected, check_like=True)
    assert "qa_pairs.json is not used: the CSV has the column answers" in capsys.readouterr().out


def test_the_split_of_an_own_image_is_constant_and_near_its_share():
    splits = pd.Series([split_of(f"{number}.jpg") for number in range(5000)])
    shares = splits.value_counts(normalize=True)
    assert abs(shares["train"] - 0.8) < 0.02 and abs(shares["val"] - 0.1) < 0.02
    # written down once: train.py and test.py of any version must agree
    assert [split_of(path) for path in ("a.jpg", "images/1.png", "7.jpg", "12.jpg")] == ["val", "train", "train", "train"]


@pytest.fixture
def train_set(feature_store, data_dir):
    rows = rows_of_split(read_rows(data_dir), "train")
    return VQADataset(rows, Vocab.build(rows["answer"]), 16, feature_store)


def test_batches_contain_complete_answers_and_no_column_of_padding(train_set):
    texts = []
    for index in torch.arange(len(train_set)).split(7):
        ids = train_set.batch(index)["answer_ids"]
        assert (ids[:, 0] == START).all() and ((ids == END).sum(1) == 1).all()
        assert (ids != PAD).any(0).all(), "a column of padding alone was not trimmed"
        texts += [train_set.vocab.decode(row) for row in ids.tolist()]
    assert texts == train_set.rows["answer"].tolist()


@pytest.mark.parametrize("by_image", [False, True])
def test_an_epoch_visits_every_row_once_in_a_seeded_order(by_image, train_set):
    orders = [train_set.epoch_order(torch.Generator().manual_seed(seed), by_image).tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == list(range(len(train_set)))
    images = train_set.rows["image_path"].iloc[orders[0]].tolist()
    changes = sum(a != b for a, b in zip(images, images[1:], strict=False))
    assert (changes == train_set.rows["image_path"].nunique() - 1) == by_image


def test_annotators_answers_are_drawn_as_often_as_they_were_given_and_only_if_long_enough():
    rows = pd.DataFrame({"image_path": "a.jpg", "question": "q", "answer": ["a cat", "a dog"],
                         "answers": [["a cat"] * 3 + ["a tabby", "cat"], ["dog"]]})
    assert training_answers(rows, "humans") == ["a cat"] * 3 + ["a tabby", "a dog"]
    assert training_answers(rows, "majority") == ["a cat", "a dog"]
    store = FeatureStore(["a.jpg"], torch.zeros(1, 2), ["q"], torch.zeros(1, 2), torch.ones(1), torch.device("cpu"))
    dataset = VQADataset(rows, Vocab.build(["a cat", "a dog", "a tabby"]), 8, store, "humans")
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([dataset.draw_answers(generator) for _ in range(400)])
    taught = [dataset.vocab.decode(ids) for ids in dataset.answer_ids[draws.flatten()].tolist()]
    assert set(taught[0::2]) == {"a cat", "a tabby"} and set(taught[1::2]) == {"a dog"}
    assert 0.7 < taught[0::2].count("a cat") / 400 < 0.8


def build(rows, folder, cache_dir, make_model, encoders, splits, answer_sampling="majority"):
    vocab = Vocab.build(rows["answer"])
    cfg = SimpleNamespace(cache_dir=cache_dir, workers=1)
    return build_datasets(make_model(len(vocab)), encoders, vocab, rows, folder, cfg, Precision("cpu"), splits, answer_sampling)


def test_build_datasets_leaves_out_the_rows_of_unreadable_images(make_model, encoders, tmp_path):
    lines = [f"{number}.png,what is {n}?,answer {n},{'train' if number < 90 else 'val'}"
             for number in range(100) for n in (1, 2)]
    for number in range(100):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    (tmp_path / "95.png").write_text("no image")
    rows = read_rows(write_csv(tmp_path, "\n".join(["image_path,question,answer,split", *lines])))
    datasets = build(rows, tmp_path, tmp_path / "cache", make_model, encoders, ("train", "val"))
    assert {split: len(dataset) for split, dataset in datasets.items()} == {"train": 180, "val": 18}
    assert "95.png" not in set(datasets["val"].rows["image_path"])


def test_answer_sampling_needs_a_row_with_another_answer_than_its_label(make_model, encoders, data_dir, tmp_path):
    """Without a qa_pairs.json `humans` trained like `majority` and did not say so."""
    rows = read_rows(data_dir).assign(answers=lambda rows: [[label] * 10 for label in rows["answer"]])
    with pytest.raises(ValueError, match="--answer-sampling humans: none of the 120 training rows.*--answer-sampling majority"):
        build(rows, data_dir, tmp_path / "cache", make_model, encoders, ("train", "val"), "humans")
    assert not (tmp_path / "cache").exists()


def test_an_empty_split_is_found_before_images_are_decoded(make_model, encoders, data_dir, tmp_path):
    rows = read_rows(data_dir)
    with pytest.raises(ValueError, match=r"no rows in the split 'val' \(rows: test 30, train 120\)"):
        build(rows[rows["split"] != "val"], data_dir, tmp_path / "cache", make_model, encoders, ("train", "val"))
    assert not (tmp_path / "cache").exists()
