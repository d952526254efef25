"""mini_vqa_v2.py: labels, filters, splits, files, local images, and bad input."""
import gzip
import json
import random
import re

import builder
import pandas as pd
import pytest
from builder import ANNOTATIONS, QUESTIONS, ROOT, ZIPS, entry, many_entries, read_rows, repack, write_official
from image_server import ImageServer, draw_jpeg
from PIL import Image

import download.images
import mini_vqa_v2
import preprocess
from mini_vqa_v2 import COLUMNS, Config, choose_split, held_out_labels, majority_answer
from preprocess import read_held_out

SHARED = ROOT.parent / "shared/data/vqa_v2_text"
NO_ROWS = pd.DataFrame(columns=["question_id", "answers", "split"])
run, short_waits = builder.run, builder.short_waits  # fixtures


def printed_counts(text):
    """{reason: number} of the "dropped N: REASON" lines."""
    return {reason: int(count) for count, reason in re.findall(r"^dropped (\d+): (.*)$", text, re.M)}


def count_independently(annotations):
    """({image_id: [(question id, label)]}, number too short, number disputed) as design.md says, by independent code."""
    kept, num_short, num_disputed = {}, 0, 0
    for annotation in annotations:
        texts = [answer["answer"] for answer in annotation["answers"]]
        best = sorted(texts, key=lambda text: (-texts.count(text), text != annotation["multiple_choice_answer"], text))
        if len(re.findall(r"\S+", best[0])) < 3:
            num_short += 1
        elif texts.count(best[0]) < 3:
            num_disputed += 1
        else:
            kept.setdefault(annotation["image_id"], []).append((annotation["question_id"], best[0]))
    return kept, num_short, num_disputed


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/vqa_v2_text is not here")
def test_vqa_v2_with_downloaded_images_is_the_same_under_another_hash_seed(run, run_script, tmp_path):
    with gzip.open(SHARED / f"{ANNOTATIONS}.gz", "rt", encoding="utf-8") as stream:
        kept, num_short, num_disputed = count_independently(json.load(stream)["annotations"])
    with ImageServer() as server:
        flags = ["--vqa-dir", SHARED, "--image-url", server.url]
        text = run(*flags)
        run_script("mini_vqa_v2.py", *flags, "--output-dir", tmp_path / "again", PYTHONHASHSEED="1")
        assert sorted(server.paths) == sorted(2 * [f"/train2014/COCO_train2014_{key:012d}.jpg" for key in kept])
    for name in ("metadata.csv", "qa_pairs.json", "held_out_annotators.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 503  # facts.md
    assert {int(row["question_id"]): row["answer"] for row in rows} == dict(pair for pairs in kept.values() for pair in pairs)
    assert "kept 503\n" in text and "read 48061 questions, 48061 annotations" in text
    assert list(printed_counts(text).values()) == [0, 0, num_short, num_disputed, 0]
    for split in ("train", "val", "test"):
        ids = [row["image_id"] for row in rows if row["split"] == split]
        assert f"{split}: {len(set(ids))} images, {len(ids)} rows" in text
    images = list((tmp_path / "out" / "images").iterdir())
    assert {f"images/{path.name}" for path in images} == {row["image_path"] for row in rows}
    assert all(path.read_bytes() == draw_jpeg(path.name) for path in images)


@pytest.mark.parametrize(("answers", "choice", "expected"), [
    (["b"] * 4 + ["a"] * 3 + ["c"] * 3, "a", ("b", 4)),  # no tie: VQA's choice does not count
    (["b"] * 5 + ["a"] * 5, "b", ("b", 5)),  # a tie goes to VQA's choice
    (["b"] * 5 + ["a"] * 5, "a", ("a", 5)),
    (["c"] * 4 + ["b"] * 4 + ["a"] * 2, "a", ("b", 4)),  # VQA's choice is not among the tied: the alphabet
    (["c"] * 4 + ["b"] * 4 + ["a"] * 2, None, ("b", 4)),
    (list("jihgfedcba"), "z", ("a", 1)),
    (["B", "a"], None, ("B", 1)),  # alphabet of code points, letters as written
    (["n/a"], "n/a", ("n/a", 1)),
])
def test_majority_answer_and_ties(answers, choice, expected):
    for seed in range(5):
        shuffled = random.Random(seed).sample(answers, len(answers))
        assert majority_answer(shuffled, choice) == expected


A, B = "a red kite", "blue kite now"


@pytest.mark.parametrize(("answers", "expected"), [
    ([A] * 3 + list("bcdefgh"), [None] * 3 + [A] * 7),       # without one of its three givers the label has two votes
    ([A] * 4 + [B] * 4 + ["c"] * 2, [B] * 4 + [A] * 6),      # a tie of the others goes to the alphabetically first
    (["kite"] * 4 + [B] * 4 + ["c"] * 2, [B] * 4 + [None] * 4 + [B] * 2),
    (["kite"] * 4 + [A] * 3 + ["c"] * 3, [A] * 4 + [None] * 6),
    ([A, B], [B, A]), ([A, A, B], [None, None, A]),          # of one other annotator one vote is needed, of two both
    ([A], [None]),
])
def test_held_out_labels_by_hand(answers, expected):
    assert held_out_labels(answers, Config()) == expected


def test_no_annotator_chose_the_own_label(run, tmp_path):
    """VQA's choice breaks a tie of all ten, but not of nine: the tenth took part in it. A dropped question has an entry if
    one set of nine would keep it."""
    entries = many_entries(60) + [entry(9001, answers=[A] * 4 + [B] * 4 + ["c"] * 2, choice=B),
                                  entry(9011, answers=[A] * 4 + ["a kite"] * 4 + ["c"] * 2, choice="a kite"),
                                  entry(9021, answers=[A])]
    run("--vqa-dir", write_official(tmp_path / "vqa", entries), "--no-pictures")
    label_of = {row["question_id"]: row["answer"] for row in read_rows(tmp_path / "out")}
    held_out = {item["question_id"]: item for item in read_held_out(tmp_path / "out", NO_ROWS)}
    assert label_of["9001"] == B and "9011" not in label_of and label_of["9021"] == A
    assert held_out[9001]["labels"] == [B] * 4 + [A] * 6
    assert held_out[9011] == {"question_id": 9011, "image_id": 901, "split": choose_split(901, 42, 0.1, 0.1),
                              "answers": [A] * 4 + ["a kite"] * 4 + ["c"] * 2, "labels": [None] * 4 + [A] * 4 + [None] * 2}
    assert 9021 not in held_out and list(held_out) == sorted(held_out)
    assert read_held_out(tmp_path / "out" / "my_own.csv", NO_ROWS) == []  # other rows: the file does not describe them
    in_test = read_held_out(tmp_path / "out", preprocess.read_rows(tmp_path / "out"), "test")
    assert in_test and in_test == [item for item in held_out.values() if item["split"] == "test"]


@pytest.mark.parametrize("change", [
    lambda item: item.pop("labels"), lambda item: item.update(split="all"), lambda item: item.update(image_id=None),
    lambda item: item.update(labels=[A]), lambda item: item.update(labels=[None, None]),
    lambda item: item.update(labels=[A, 3]), lambda item: item.update(labels=A),
    lambda item: item.update(answers=[A, None]), lambda item: item.update(answers=None)])
def test_damaged_held_out_annotators_end_in_one_line(change, tmp_path):
    assert read_held_out(tmp_path, NO_ROWS) == []
    item = {"question_id": 1, "image_id": 2, "split": "test", "answers": [A, B], "labels": [None, A]}
    path = tmp_path / "held_out_annotators.json"
    path.write_text(json.dumps([item]))
    assert read_held_out(tmp_path, NO_ROWS, "test") == [item] and read_held_out(tmp_path, NO_ROWS, "val") == []
    change(item)
    for content in (json.dumps([item]), json.dumps([item])[:-9], "[7]", "null"):
        path.write_text(content)
        with pytest.raises(ValueError, match="held_out_annotators.json is not what mini_vqa_v2.py writes") as error:
            read_held_out(tmp_path, NO_ROWS)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"answers": [[A, B]]}, {"split": ["val"]}, {}])
def test_held_out_annotators_of_another_build_are_refused(change, tmp_path):
    """One annotator was scored on the questions of an earlier build, without a word."""
    item = {"question_id": 1, "image_id": 2, "split": "test", "answers": [A, A], "labels": [None, A]}
    (tmp_path / "held_out_annotators.json").write_text(json.dumps([item]))
    rows = pd.DataFrame({"question_id": ["1"], "answers": [[A, A]], "split": ["test"]}).assign(**change)
    if not change:
        assert read_held_out(tmp_path, rows, "test") == [item]
        return
    with pytest.raises(ValueError, match="question 1 has other answers or another split than in metadata.csv"):
        read_held_out(tmp_path, rows, "test")


def test_each_reason_is_counted_and_few_annotators_need_less_agreement(run, tmp_path):
    """min(min_agreement, annotators): the phrase of a single annotator is kept, one that two of four gave is not."""
    answers = {9001: ("red kite",) * 10, 9011: ("a red kite",), 9021: ("a red kite",) * 3 + tuple("abcdefg"),
               9031: tuple(f"a red kite {i}" for i in range(10)), 9041: ("a red kite",) * 2 + ("b", "c")}
    folder = write_official(tmp_path / "vqa", many_entries(60) + [entry(key, answers=texts) for key, texts in answers.items()])
    questions = json.loads((folder / QUESTIONS).read_text())
    questions["questions"] = questions["questions"][1:] + [entry(9051)[0], entry(9061)[0]]
    (folder / QUESTIONS).write_text(json.dumps(questions))
    text = run("--vqa-dir", folder, "--no-pictures")
    assert list(printed_counts(text).values()) == [2, 1, 1, 2]
    rows = {row["question_id"]: row for row in read_rows(tmp_path / "out")}
    assert len(rows) == 119 + 2 and "read 126 questions, 125 annotations" in text and "kept 121\n" in text
    assert rows["9011"]["agreement"] == "1" and rows["9021"]["agreement"] == "3"


STRANGE = ["n/a", "None", "null", "nan", "NA", " lead and trail ", 'she said "no", twice', "naïve café 日本 👍",
           "two\nlines", "carriage\rreturn", "tab\there", "=1+1", "don't", "10:30", "true", "007"]


def test_answers_are_written_unchanged(run, tmp_path):
    """pandas and an unquoted carriage return each destroyed some of these in other implementations."""
    entries = many_entries(60) + [entry(9000 + 10 * i, answers=(text,) * 6 + ("other",) * 4, question=f"{text}?")
                                  for i, text in enumerate(STRANGE)]
    run("--vqa-dir", write_official(tmp_path / "vqa", entries), "--no-pictures", "--min-answer-words", 1)
    frame = pd.read_csv(tmp_path / "out" / "metadata.csv", dtype=str, keep_default_na=False)
    pairs = json.loads((tmp_path / "out" / "qa_pairs.json").read_text(encoding="utf-8"))
    for rows in (frame.to_dict("records"), read_rows(tmp_path / "out"), pairs):
        by_id = {int(row["question_id"]): row for row in rows}
        for i, text in enumerate(STRANGE):
            assert by_id[9000 + 10 * i]["answer"] == text and by_id[9000 + 10 * i]["question"] == f"{text}?"
    assert b"\r\n" not in (tmp_path / "out" / "metadata.csv").read_bytes()


def test_split_is_pinned_uniform_and_follows_the_seed():
    """Another hash would move images between train and test of data sets that exist."""
    splits = [choose_split(image, 42, 0.1, 0.1) for image in range(60)]
    assert [image for image in range(60) if splits[image] == "test"] == [3, 9, 14, 22, 27, 44, 53]
    assert [image for image in range(60) if splits[image] == "val"] == [6, 16, 20, 25, 50]
    drawn = [choose_split(image, 42, 0.2, 0.1) for image in range(20_000)]
    assert abs(drawn.count("val") / 20_000 - 0.2) < 0.01 and abs(drawn.count("test") / 20_000 - 0.1) < 0.01
    assert drawn != [choose_split(image, 43, 0.2, 0.1) for image in range(20_000)]


def test_adding_rows_moves_no_image_and_splits_share_none(run, tmp_path):
    few, more = many_entries(80), many_entries(200, per_image=3)
    splits = []
    for name, entries in (("few", few), ("more", random.Random(0).sample(more, len(more)))):
        run("--vqa-dir", write_official(tmp_path / name, entries), "--no-pictures")
        rows = read_rows(tmp_path / "out")
        assert [row["question_id"] for row in rows] == sorted((row["question_id"] for row in rows), key=int)
        splits.append({row["image_id"]: row["split"] for row in rows})
        assert {(row["image_id"], row["split"]) for row in rows} == set(splits[-1].items())
    assert splits[1].items() >= splits[0].items() and len(splits[1]) == 200


@pytest.mark.parametrize(("flags", "splits"), [
    (["--subset", "val2014", "--split", "test"], {"test"}), (["--split", "train"], {"train"}),
    (["--test-fraction", 1, "--split", "test"], {"test"}),
    (["--val-fraction", 0, "--test-fraction", 1], {"test"}), (["--val-fraction", 0], {"train", "test"}),
    (["--val-fraction", 0.7, "--test-fraction", 0.3], {"val", "test"})])
def test_a_split_may_get_no_image_or_all(flags, splits, run, tmp_path):
    """VQA v2's validation images could not be built as a test set: each of the three splits had to have rows."""
    folder = write_official(tmp_path / "vqa", many_entries(), "val2014" if "val2014" in flags else "train2014")
    run("--vqa-dir", folder, "--no-pictures", *flags)
    assert {row["split"] for row in read_rows(tmp_path / "out")} == splits
    for name in ("qa_pairs.json", "held_out_annotators.json"):
        assert {entry["split"] for entry in json.loads((tmp_path / "out" / name).read_text())} == splits


def test_max_questions_takes_the_same_questions_in_any_file_order(run, tmp_path):
    entries = many_entries(100)
    chosen = []
    for name, order in (("a", entries), ("b", entries[::-1])):
        folder = write_official(tmp_path / name, order)
        text = run("--vqa-dir", folder, "--no-pictures", "--max-questions", 90)
        assert "dropped 110: beyond the first 90 (--max-questions)" in text
        chosen.append((tmp_path / "out" / "metadata.csv").read_bytes())
        kept = {int(row["question_id"]) for row in read_rows(tmp_path / "out")}
        assert {item["question_id"] for item in read_held_out(tmp_path / "out", NO_ROWS)} == kept
    assert chosen[0] == chosen[1] and chosen[0].count(b"\n") == 91
    ninety = {row["question_id"] for row in read_rows(tmp_path / "out")}
    run("--vqa-dir", folder, "--no-pictures", "--max-questions", 120)
    assert ninety < {row["question_id"] for row in read_rows(tmp_path / "out")}
    assert "dropped 0: beyond" in run("--vqa-dir", folder, "--no-pictures", "--max-questions", 500)


def test_every_form_of_the_official_files_gives_the_same_data_set(run, tmp_path):
    folder = write_official(tmp_path / "vqa", many_entries() + [entry(9000, answers=("naïve café 日本",) * 10)])
    found = set()
    for kind in ("json", "gz", "zip", "bom"):
        run("--vqa-dir", repack(folder, tmp_path / kind, kind), "--no-pictures", "--base-url", "http://127.0.0.1:1",
            "--min-answer-words", 2)
        found.add(((tmp_path / "out" / "metadata.csv").read_bytes(), (tmp_path / "out" / "qa_pairs.json").read_bytes()))
        assert not (tmp_path / "out" / "images").exists()
    assert len(found) == 1 and "naïve café 日本".encode() in found.pop()[0]


def test_columns_and_json_are_as_documented(run, tmp_path):
    answers = ("a red kite", "kite", "a red kite", "a red kite")
    folder = write_official(tmp_path / "vqa", many_entries() + [entry(77001, 77, answers, "What flies?")])
    run("--vqa-dir", folder, "--no-pictures")
    lines = (tmp_path / "out" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == ("image_id,question_id,question,answer,image_path,split,question_type,answer_type,agreement")
    pairs = json.loads((tmp_path / "out" / "qa_pairs.json").read_text(encoding="utf-8"))
    assert pairs[-1] == {"image_id": 77, "question_id": 77001, "question": "What flies?", "answer": "a red kite",
                         "image_path": "images/COCO_train2014_000000000077.jpg",
                         "split": choose_split(77, 42, 0.1, 0.1), "question_type": "what is", "answer_type": "other",
                         "agreement": 3, "answers": list(answers)}
    assert [{name: str(pair[name]) for name in COLUMNS} for pair in pairs] == read_rows(tmp_path / "out")


def test_val2014_reads_its_own_files_and_images(run, tmp_path):
    folder = write_official(tmp_path / "vqa", many_entries(), subset="val2014")
    with ImageServer() as server:
        run("--vqa-dir", folder, "--subset", "val2014", "--image-url", server.url)
    assert {row["image_path"] for row in read_rows(tmp_path / "out")} == {
        f"images/COCO_val2014_{image:012d}.jpg" for image in range(120)}


def test_interrupted_write_leaves_no_csv(run, tmp_path, monkeypatch):
    def full_disk(path, value):
        raise OSError(28, "No space left on device")

    folder = write_official(tmp_path / "vqa", many_entries())
    with monkeypatch.context() as patch:
        patch.setattr(mini_vqa_v2, "write_json", full_disk)
        assert "No space left" in run("--vqa-dir", folder, "--no-pictures", expect=2)
    assert list((tmp_path / "out").iterdir()) == []
    run("--vqa-dir", folder, "--no-pictures")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run("--vqa-dir", folder, "--no-pictures", "--min-answer-words", 50, expect=2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def local_images(folder, num=120):
    folder.mkdir(parents=True)
    for image in range(num):
        name = f"COCO_train2014_{image:012d}.jpg"
        (folder / name).write_bytes(draw_jpeg(name))
    return folder


@pytest.mark.parametrize("subfolder", ["", "train2014"])
def test_local_images_are_copied_and_decoded_once(run, tmp_path, monkeypatch, subfolder):
    """They were hard links: who edited an image of the data set edited the original."""
    vqa_dir, folder = write_official(tmp_path / "vqa", many_entries()), local_images(tmp_path / "coco" / subfolder)
    for _ in range(2):
        run("--vqa-dir", vqa_dir, "--image-dir", tmp_path / "coco", "--image-url", "http://127.0.0.1:1")
        found = sorted((tmp_path / "out" / "images").iterdir())
        assert len(found) == 120 and not any(path.samefile(folder / path.name) for path in found)
        assert all(path.read_bytes() == draw_jpeg(path.name) for path in found)
        monkeypatch.setattr(download.images, "check_image", lambda body: pytest.fail("decoded again"))


def test_lost_local_images_are_named_up_to_one_percent_and_an_error_beyond(run, tmp_path):
    vqa_dir, folder = write_official(tmp_path / "vqa", many_entries(250)), local_images(tmp_path / "coco", 250)
    names = sorted(path.name for path in folder.iterdir())
    for name in names[3:5]:
        (folder / name).unlink()
    (folder / names[4]).mkdir()
    text = run("--vqa-dir", vqa_dir, "--image-dir", folder)
    assert f"2 of 250 images are missing, for example {names[3]} missing, {names[4]} not an image file of at most " in text
    assert "dropped 4: image missing or unreadable" in text and "kept 496\n" in text
    (tmp_path / "out" / "metadata.csv").unlink()
    (folder / names[5]).write_bytes(draw_jpeg(names[5])[:-200])
    error = run("--vqa-dir", vqa_dir, "--image-dir", folder, expect=2)
    assert "3 of 250" in error and f"{names[5]} unreadable" in error and f"check --image-dir {folder}" in error
    assert not (tmp_path / "out" / "metadata.csv").exists()


def test_a_replaced_local_image_replaces_its_old_link(run, tmp_path):
    vqa_dir, folder = write_official(tmp_path / "vqa", many_entries()), local_images(tmp_path / "coco")
    run("--vqa-dir", vqa_dir, "--image-dir", folder)
    name = "COCO_train2014_000000000009.jpg"
    (folder / name).unlink()
    Image.new("RGB", (8, 8), "red").save(folder / name)
    run("--vqa-dir", vqa_dir, "--image-dir", folder)
    assert (tmp_path / "out" / "images" / name).read_bytes() == (folder / name).read_bytes()


def test_copies_of_an_image_are_in_its_split(run, tmp_path):
    """Two names with the same bytes: otherwise the test split would show an image of training."""
    vqa_dir, folder = write_official(tmp_path / "vqa", many_entries(250)), local_images(tmp_path / "coco", 250)
    names = sorted(path.name for path in folder.iterdir())
    for copy in (3, 6):  # image 3 is of test, 6 of val, 1 of train
        (folder / names[copy]).write_bytes((folder / names[1]).read_bytes())
    text = run("--vqa-dir", vqa_dir, "--image-dir", folder)
    assert f"copies of another one and get its split: 2 ({names[3]}, {names[6]})" in text
    rows = read_rows(tmp_path / "out")
    assert {row["split"] for row in rows if row["image_id"] in ("1", "3", "6")} == {"train"}
    assert len(read_held_out(tmp_path / "out", preprocess.read_rows(tmp_path / "out"))) == 500, "the same splits"


@pytest.mark.parametrize(("num_images", "num_copies"), [(60, 59), (60, 2), (250, 3)])
def test_a_placeholder_in_place_of_images_is_refused(num_images, num_copies, run, tmp_path):
    """A mirror answered every name with one image, and the data set of it was built and trained on without a word."""
    vqa_dir, placeholder = write_official(tmp_path / "vqa", many_entries(num_images)), draw_jpeg("placeholder")
    names = [f"COCO_train2014_{image:012d}.jpg" for image in range(num_images)]
    files = {f"/train2014/{name}": placeholder for name in names[:num_copies + 1]}
    with ImageServer(files) as server:
        error = run("--vqa-dir", vqa_dir, "--image-url", server.url, expect=2)
        assert f"{num_copies} of {num_images} images are copies of another one, for example {names[1]} of {names[0]}" in error
        assert f"--image-url {server.url}" in error and f"delete {tmp_path / 'out/images'}" in error
        assert not (tmp_path / "out/metadata.csv").exists()
        if num_copies == 2:  # one copy is no placeholder, however few images there are
            server.files.popitem()
            (tmp_path / f"out/images/{names[2]}").unlink()
            assert "copies of another one and get its split: 1" in run("--vqa-dir", vqa_dir, "--image-url", server.url)


def damage(change):
    """A function of the folder that applies `change` to the parsed (questions, annotations) lists."""
    def apply(folder):
        questions, annotations = (json.loads((folder / name).read_text()) for name in (QUESTIONS, ANNOTATIONS))
        change(questions["questions"], annotations["annotations"])
        (folder / QUESTIONS).write_text(json.dumps(questions))
        (folder / ANNOTATIONS).write_text(json.dumps(annotations))
    return apply


def overwrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


BAD_FILES = {
    "truncated json": (lambda folder: overwrite(QUESTIONS, (folder / QUESTIONS).read_bytes()[:-40])(folder),
                       "not a whole JSON file"),
    "empty file": (overwrite(ANNOTATIONS, b""), "not a whole JSON file"),
    "not utf-8": (overwrite(ANNOTATIONS, b'{"annotations": "\xff\xfe"}'), "not a whole JSON file"),
    "deep nesting": (overwrite(ANNOTATIONS, b"[" * 200_000), "not a whole JSON file"),
    "a list on top": (overwrite(QUESTIONS, b"[]"), "no list 'questions'"),
    "another key": (overwrite(ANNOTATIONS, b'{"questions": []}'), "no list 'annotations'"),
    "no list": (overwrite(ANNOTATIONS, b'{"annotations": {"1": 2}}'), "no list 'annotations'"),
    "no entries": (overwrite(ANNOTATIONS, b'{"annotations": []}'), "nothing is kept: 240 question without"),
    "entry is a number": (damage(lambda q, a: q.append(7)), "entry 240: question_id is None"),
    "id is a text": (damage(lambda q, a: q[3].update(question_id="3")), "question_id is '3'"),
    "id is true": (damage(lambda q, a: a[3].update(question_id=True)), "question_id is True"),
    "negative image": (damage(lambda q, a: q[3].update(image_id=-1)), "image_id is -1"),
    "question twice": (damage(lambda q, a: q.append(q[0])), "question id 0 occurs twice"),
    "annotation twice": (damage(lambda q, a: a.append(a[21])), "question id 101 occurs twice"),
    "other image": (damage(lambda q, a: a[21].update(image_id=3)), "question 101 has another image_id"),
    "question missing": (damage(lambda q, a: q[21].pop("question")), "question 101: question is None"),
    "type is a number": (damage(lambda q, a: a[21].update(answer_type=3)), "question 101: answer_type is 3"),
    "no answers": (damage(lambda q, a: a[21].pop("answers")), "question 101 has no list of answers"),
    "empty answers": (damage(lambda q, a: a[21].update(answers=[])), "question 101 has no list of answers"),
    "answer missing": (damage(lambda q, a: a[21]["answers"][4].pop("answer")), "question 101: answer is {"),
    "answer is null": (damage(lambda q, a: a[21]["answers"][4].update(answer=None)), "question 101: answer is None"),
    "half a character": (damage(lambda q, a: q[21].update(question="\ud83d?")), r"question 101: '\ud83d?' holds"),
    "half in an answer": (damage(lambda q, a: a[21]["answers"][4].update(answer="a \udc00 cat")), r"101: 'a \udc00 cat' holds"),
    "a NUL": (damage(lambda q, a: q[21].update(question="What\0?")), r"question 101: 'What\x00?' holds a NUL"),
    "other questions": (damage(lambda q, a: [one.update(question_id=one["question_id"] + 5000) for one in q]),
                        "nothing is kept: 240 question without an annotation; 240 annotation without"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_official_files_end_in_one_line(run, tmp_path, name):
    spoil, expected = BAD_FILES[name]
    folder = write_official(tmp_path / "vqa", many_entries())
    spoil(folder)
    error = run("--vqa-dir", folder, "--no-pictures", expect=2)
    assert expected in error
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


DAMAGED_ARCHIVES = {
    "no gzip": b"plain", "gzip truncated": gzip.compress(b'{"questions": []}', mtime=0)[:-9],
    "gzip garbled": gzip.compress(b'{"questions": [' + b"1," * 5000, mtime=0)[:40] + b"x" * 40, "no zip": b"PK plain",
}


@pytest.mark.parametrize("name", DAMAGED_ARCHIVES)
def test_damaged_archives_end_in_one_line(run, tmp_path, name):
    folder = write_official(tmp_path / "vqa", many_entries())
    (folder / QUESTIONS).unlink()
    path = folder / (f"{QUESTIONS}.gz" if "gzip" in name else ZIPS[QUESTIONS])
    path.write_bytes(DAMAGED_ARCHIVES[name])
    assert f"{path} is not a whole JSON file" in run("--vqa-dir", folder, "--no-pictures", expect=2)


BAD_FLAGS = [
    (["--min-answer-words", "0"], "--min-answer-words 0"), (["--min-agreement", "0"], "--min-agreement 0"),
    (["--max-questions", "-1"], "--max-questions -1"), (["--workers", "0"], "--workers 0"),
    (["--val-fraction", "nan"], "--val-fraction nan"), (["--val-fraction", "1.1"], "--val-fraction 1.1"),
    (["--test-fraction", "-0.1"], "--test-fraction -0.1"), (["--val-fraction", "inf"], "--val-fraction inf"),
    (["--test-fraction", "1"], "--val-fraction 0.1 and --test-fraction 1.0: their sum is above 1; set one of them lower or to "
     "0, or put all images into one split with --split"),
    (["--image-dir", "nowhere"], "--image-dir nowhere does not exist"),
    (["--min-answer-words", "4"], "nothing is kept: 0 question without an annotation; 0 annotation without a question; "
     "240 label of fewer than 4 words (--min-answer-words)"),
    (["--val-fraction", "0.000001"], "a split has no rows"), (["--max-questions", "1"], "a split has no rows"),
]


@pytest.mark.parametrize(("flags", "expected"), BAD_FLAGS, ids=lambda value: str(value)[:40])
def test_bad_settings_end_in_one_line(run, tmp_path, monkeypatch, flags, expected):
    monkeypatch.chdir(tmp_path)
    folder = write_official(tmp_path / "vqa", many_entries())
    extra = [] if "--image-dir" in flags else ["--no-pictures"]
    error = run("--vqa-dir", folder, *flags, *extra, expect=2)
    assert expected in error
    assert not (tmp_path / "out").exists()


def test_a_file_in_place_of_a_folder_is_named(run, tmp_path):
    (tmp_path / "file").write_text("x")
    for flag in ("--vqa-dir", "--image-dir", "--output-dir"):
        assert f"{flag} {tmp_path / 'file'} is not a folder" in run(flag, tmp_path / "file", expect=2)


@pytest.mark.parametrize("flags", [["--min-words", "3"], ["--subset", "test2014"]], ids=str)
def test_an_unknown_flag_or_subset_stops_the_script(flags, run_script, tmp_path):
    errors = run_script("mini_vqa_v2.py", "--output-dir", tmp_path / "out", *flags, expect=2).stderr
    assert flags[0] in errors and "Traceback" not in errors and not (tmp_path / "out").exists()


def test_the_defaults_are_the_documented_ones():
    documented = {"vqa_dir": "vqa_v2", "image_dir": None, "output_dir": "mini_vqa_v2", "subset": "train2014",
                  "base_url": "https://s3.amazonaws.com/cvmlp/vqa/mscoco/vqa",
                  "image_url": "http://images.cocodataset.org", "min_answer_words": 3, "min_agreement": 3,
                  "max_questions": 0, "val_fraction": 0.1, "test_fraction": 0.1, "workers": 16, "seed": 42}
    assert {name: getattr(Config(), name) for name in documented} == documented
