"""Official protocol, test subsets, results for the evaluation server, and other data sets in VQA's layout."""
import gzip
import json
import shutil
from types import SimpleNamespace

import builder
import pytest
import tiny
from builder import ANNOTATIONS, QUESTIONS, ROOT, entry, many_entries, read_rows, write_official
from conftest import call_script
from image_server import ImageServer, draw_jpeg

from evaluation.results import write_results_json
from mini_vqa_v2 import choose_split

SHARED = ROOT.parent / "shared/data/vqa_v2_text"
TEST_QUESTIONS = "v2_OpenEnded_mscoco_test2015_questions.json"
run, short_waits = builder.run, builder.short_waits  # fixtures


class ServerLoader:
    """What the official evaluator asks of a results file, written from its documentation: it raises AssertionError."""

    def __init__(self, question_ids):
        self.question_ids = question_ids

    def load(self, path):
        """{question_id: answer} of a results file."""
        entries = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(entries, list), "results are no list"
        for one in entries:
            assert set(one) == {"question_id", "answer"} and type(one["question_id"]) is int and type(one["answer"]) is str
        assert {one["question_id"] for one in entries} == set(self.question_ids), "other questions than the question file"
        assert len(entries) == len(self.question_ids), "a question twice"
        return {one["question_id"]: one["answer"] for one in entries}


@pytest.fixture
def both_subsets(tmp_path):
    """train2014 with images 0 to 119, val2014 with images 200 to 259; two questions each."""
    write_official(tmp_path / "vqa", many_entries())
    later = [entry(10 * image + i, answers=(f"kite number {image}",) * 10) for image in range(200, 260) for i in range(2)]
    return write_official(tmp_path / "vqa", later, "val2014")


def test_val2014_tests_what_a_slice_of_train2014_validates(run, both_subsets, tmp_path):
    with ImageServer() as server:
        output = run("--vqa-dir", both_subsets, "--protocol", "official", "--image-url", server.url, "--val-fraction", 0.2)
        assert {path.split("/")[1] for path in server.paths} == {"train2014", "val2014"} and len(server.paths) == 180
    rows = read_rows(tmp_path / "out")
    for row in rows:
        image, subset = int(row["image_id"]), row["image_path"].split("_")[1]
        assert row["split"] == ("test" if image >= 200 else choose_split(image, 42, 0.2, 0))
        assert subset == ("val2014" if row["split"] == "test" else "train2014")
    assert len(rows) == 360 and len(list((tmp_path / "out/images").iterdir())) == 180
    held_out = json.loads((tmp_path / "out/held_out_annotators.json").read_text())
    assert {(one["question_id"], one["split"]) for one in held_out} == {(int(row["question_id"]), row["split"]) for row in rows}
    assert "test: 60 images, 120 rows" in output and output.count("read ") == 2
    assert len(json.loads((tmp_path / "out/qa_pairs.json").read_text())) == 360


def test_the_official_test_split_stays_whole(run, tmp_path):
    """Copies followed the first image's split, and rows without an image were dropped: val2014 would lack questions."""
    write_official(tmp_path / "vqa", many_entries(200))
    later = [entry(10 * image, answers=(f"kite number {image}",) * 10) for image in range(200, 400)]
    folder, images = write_official(tmp_path / "vqa", later, "val2014"), tmp_path / "coco"
    names = [f"{subset}/COCO_{subset}_{image:012d}.jpg" for subset, image in
             [("train2014", image) for image in range(200)] + [("val2014", image) for image in range(200, 400)]]
    for name in names:
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(draw_jpeg(name))
    shutil.copyfile(images / names[5], images / names[205])
    for lost in (7, 207):
        (images / names[lost]).unlink()
    output = run("--vqa-dir", folder, "--protocol", "official", "--image-dir", images)
    rows = read_rows(tmp_path / "out")
    assert {int(row["image_id"]) for row in rows if row["split"] == "test"} == set(range(200, 400))
    assert {int(row["image_id"]) for row in rows if row["split"] != "test"} == set(range(200)) - {5, 7}
    assert "kept without an image: 1 test questions" in output and "dropped 2: image missing" in output
    assert "dropped 2: training image that is a copy of a test image" in output


def test_an_image_of_both_subsets_is_refused(run, tmp_path):
    for subset in ("train2014", "val2014"):
        write_official(tmp_path / "vqa", many_entries(), subset)
    error = run("--vqa-dir", tmp_path / "vqa", "--protocol", "official", "--no-pictures", expect=2)
    assert "the question_id 0 is in train2014 and in val2014" in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags, message", [
    (["--subset", "val2014"], "--subset val2014 cannot be used with --protocol official"),
    (["--split", "test"], "--split test cannot be used with --protocol official"),
    (["--test-fraction", 0.2], "--test-fraction 0.2 cannot be used with --protocol official"),
    (["--questions", "q.json"], "--questions q.json cannot be used with --protocol official"),
    (["--val-fraction", 1.5], "--val-fraction 1.5 is out of range")])
def test_settings_that_do_not_fit_the_protocol_are_refused(flags, message, run, tmp_path):
    assert message in run("--protocol", "official", *flags, expect=2)


def test_an_empty_split_names_only_settings_of_the_protocol(both_subsets, run):
    error = run("--vqa-dir", both_subsets, "--protocol", "official", "--no-pictures", "--val-fraction", 1e-9, expect=2)
    assert "a split has no rows" in error and "change --val-fraction 1e-09 or --seed 42" in error


# ---- questions without answers, and the file for the evaluation server

def write_test_questions(folder, num_images=200, subset="test2015"):
    """Official questions without annotations, two for each image; returns their ids."""
    folder.mkdir(parents=True, exist_ok=True)
    questions = [{"image_id": image, "question": f"What is on side {i}?", "question_id": 1000 * image + i}
                 for image in range(num_images) for i in range(2)]
    name = TEST_QUESTIONS.replace("test2015", subset)
    (folder / name).write_text(json.dumps({"data_subtype": subset, "questions": questions[::-1]}))
    return [one["question_id"] for one in questions]


@pytest.mark.parametrize("subset", ["test2015", "test-dev2015"])
def test_questions_without_answers_become_rows_of_the_split_test(subset, run, tmp_path):
    ids = write_test_questions(tmp_path / "vqa", 30, subset)
    with ImageServer() as server:
        output = run("--vqa-dir", tmp_path / "vqa", "--subset", subset, "--image-url", server.url)
        assert sorted(server.paths) == [f"/test2015/COCO_test2015_{image:012d}.jpg" for image in range(30)]
    rows = read_rows(tmp_path / "out")
    assert [int(row["question_id"]) for row in rows] == ids and {row["split"] for row in rows} == {"test"}
    assert {row["answer"] + row["agreement"] for row in rows} == {""} and "test: 30 images, 60 rows" in output
    error = call_script("train.py", "--data-dir", tmp_path / "out", expect=2, cwd=tmp_path)
    assert "no row with question and answer; `test.py --data-csv` answers questions that have no answers" in error
    assert "--split val: test2015 has no answers" in run("--subset", "test2015", "--split", "val", expect=2)


@pytest.fixture
def answer(stage_one, tmp_path):
    """answer(*flags) -> what test.py prints with stage 1's checkpoint; the results for the server go to server.json."""
    def call(*flags, expect=0):
        return call_script("test.py", "--checkpoint", stage_one / "vqa_checkpoint.pt", "--results-dir", "r", "--results-csv",
                           "r.csv", "--num-pictures", 0, "--results-json", "server.json", *flags, expect=expect, cwd=tmp_path)
    return call


def test_every_question_of_test2015_gets_a_line_for_the_server(run, answer, tmp_path):
    """400 questions on 200 images, of which one was not found and another one was damaged later."""
    ids = write_test_questions(tmp_path / "vqa")
    images = tmp_path / "coco/test2015"
    images.mkdir(parents=True)
    for image in range(199):
        name = f"COCO_test2015_{image:012d}.jpg"
        (images / name).write_bytes(draw_jpeg(name))
    run("--vqa-dir", tmp_path / "vqa", "--subset", "test2015", "--image-dir", tmp_path / "coco")
    (tmp_path / "out/images/COCO_test2015_000000000007.jpg").write_text("no image")
    output = answer("--data-csv", "out/metadata.csv")
    answers = ServerLoader(ids).load(tmp_path / "server.json")
    predictions = {int(row["question_id"]): row["prediction"] for row in tiny.read_csv(tmp_path / "r.csv")}
    assert {key for key in ids if key not in predictions} == {7000, 7001, 199000, 199001}
    assert answers == {key: predictions.get(key, "") for key in ids}
    assert "400 answers in server.json, 4 of them empty" in output and "--min-answer-words 1 --min-agreement 1" in output
    assert len((tmp_path / "server.json").read_text().splitlines()) == 402 and "not scored" in output


@pytest.mark.parametrize("flags, num_lines", [(("--data-dir", "data"), 30), (("--test-csv", "data/metadata.csv"), 180)])
def test_a_scored_split_has_a_line_for_every_question_too(flags, num_lines, answer, data_dir, tmp_path):
    """Also for a row without a label and for a damaged image."""
    rows = tiny.read_csv(shutil.copytree(data_dir, tmp_path / "data") / "metadata.csv")
    (tmp_path / "data/images/0006.png").write_text("no image")  # of the split test
    rows[0]["answer"] = ""
    for row in rows:
        row["answers"] = []
    tiny.write_rows(tmp_path / "data", rows)
    (tmp_path / "data/qa_pairs.json").unlink()
    output = answer(*flags, "--allow-trained-images")
    ids = [int(row["question_id"]) for row in rows if row["split"] == "test" or num_lines == 180]
    answers = ServerLoader(ids).load(tmp_path / "server.json")
    assert len(answers) == num_lines and [answers[key] for key in (0, 60, 61, 62)] == [""] * 4
    assert f"{num_lines} answers in server.json, 4 of them empty" in output


@pytest.mark.parametrize("question_id", ["a1", "18.0", "007", "1_0", "\u0663", "", "-0", "1" * 19])
def test_the_server_takes_integers_as_question_ids_only(question_id, answer, data_dir, tmp_path):
    (tmp_path / "own.csv").write_text(f"question_id,image_path,question\n{question_id},{data_dir}/images/0001.png,What?\n")
    error = answer("--data-csv", "own.csv", "--allow-outside", expect=2)
    assert f"--results-json needs integers of at most 18 digits as question ids: own.csv has '{question_id}'" in error
    assert [path.name for path in tmp_path.iterdir()] == ["own.csv"]


def test_the_server_needs_its_own_question_ids(answer, data_dir, tmp_path):
    (tmp_path / "own.csv").write_text("image_path,question\na.png,What?\n")
    assert "own.csv has no column question_id" in answer("--data-csv", "own.csv", expect=2)
    assert "--results-json cannot be used with --image" in answer("--image", "a.png", "--question", "What?", expect=2)


@pytest.mark.parametrize("labels, fewest", [(["a red kite", "two kites"], 2), (["a red kite", "yes"], None)])
def test_a_note_says_that_long_labels_score_badly_on_the_server(labels, fewest, tmp_path, capsys):
    cfg = SimpleNamespace(results_json=tmp_path / "server.json")
    write_results_json([7, 8], [{"question_id": "7", "prediction": "naïve"}], labels, cfg)
    assert ServerLoader([7, 8]).load(cfg.results_json) == {7: "naïve", 8: ""}
    output = capsys.readouterr().out
    assert "2 answers in" in output and (f"every label in training had {fewest} or more words" in output) == bool(fewest)


# ---- other data sets in VQA's layout

OK_VQA = {"questions": "OpenEnded_mscoco_val2014_questions.json", "annotations": "mscoco_val2014_annotations.json"}


def write_ok_vqa(folder, num_images=60, question=None, annotation=None):
    """OK-VQA's two files: five answers, each given twice, with stems, and no multiple_choice_answer. Returns the flags.

    question, annotation: changes to every entry.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions = [{"image_id": 7 * image, "question": "What is this?", "question_id": 70 * image + 5} | (question or {})
                 for image in range(num_images)]
    texts = [("pony tails", "pony tail"), ("a b c", "a b c"), ("braid", "braid"), ("d", "d"), ("e", "e")]
    annotations = [{"image_id": one["image_id"], "question_id": one["question_id"], "answer_type": "other",
                    "question_type": "four", "confidence": 3, "answers": [
                        {"answer_id": 1 + 2 * i + j, "raw_answer": raw, "answer_confidence": "yes", "answer": stem}
                        for i, (raw, stem) in enumerate(texts) for j in range(2)]} | (annotation or {}) for one in questions]
    (folder / OK_VQA["questions"]).write_text(json.dumps({"task_type": "Open-Ended", "questions": questions}))
    with gzip.open(folder / f"{OK_VQA['annotations']}.gz", "wt") as stream:
        json.dump({"annotations": annotations}, stream)
    return ["--questions", folder / OK_VQA["questions"], "--annotations", folder / f"{OK_VQA['annotations']}.gz"]


COCO_PATTERN = "val2014/COCO_val2014_{image_id:012d}.jpg"


@pytest.mark.parametrize("pattern, path", [
    (COCO_PATTERN, "val2014/COCO_val2014_000000000007.jpg"), ("{image_id:012d}.jpg", "000000000007.jpg"),
    ("VG_100K/{image_id}.jpg", "VG_100K/7.jpg")])
@pytest.mark.parametrize("source", ["--image-url", "--image-dir"])
def test_files_of_other_names_in_vqas_layout_are_read(source, pattern, path, run, tmp_path):
    flags = [*write_ok_vqa(tmp_path / "ok"), "--image-pattern", pattern, "--min-answer-words", 1, "--min-agreement", 1]
    paths = [path.replace("0" * 10 + "07" if "0" * 10 in path else "7", f"{7 * image:0{12 if '0' * 10 in path else 1}d}")
             for image in range(60)]
    files = {f"/{one}": draw_jpeg(one) for one in paths}
    for one in paths:
        (tmp_path / "local" / one).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "local" / one).write_bytes(draw_jpeg(one))
    with ImageServer(files) as server:
        run(*flags, source, server.url if source == "--image-url" else tmp_path / "local")
    rows = read_rows(tmp_path / "out")
    assert rows[1]["image_path"] == f"images/{path.split('/')[-1]}" and rows[1]["image_id"] == "7"
    assert {(row["answer"], row["agreement"], row["question_type"]) for row in rows} == {("a b c", "2", "four")}
    assert all((tmp_path / "out" / row["image_path"]).read_bytes() == draw_jpeg(one)
               for row, one in zip(rows, paths, strict=True))
    pairs = json.loads((tmp_path / "out/qa_pairs.json").read_text())
    assert pairs[0]["answers"] == [text for text in ("pony tail", "a b c", "braid", "d", "e") for _ in range(2)]


@pytest.mark.parametrize("files", [list(OK_VQA.values()), ["captions_train2017.json.gz"], ["a.json.zip"]], ids=len)
def test_a_folder_of_other_files_does_not_start_a_download_of_vqa_v2(files, run, tmp_path):
    (tmp_path / "ok").mkdir()
    for name in files:
        (tmp_path / "ok" / name).write_text("{}")
    with ImageServer() as server:
        error = run("--vqa-dir", tmp_path / "ok", "--base-url", server.url, "--no-pictures", expect=2)
        assert server.paths == [] and f"holds {sorted(files)[0]}" in error and "--questions FILE --annotations FILE" in error
        (tmp_path / "ok" / QUESTIONS.replace("train", "val")).write_text("{}")  # an official file: the others are downloaded
        assert "status 404" in run("--vqa-dir", tmp_path / "ok", "--base-url", server.url, "--no-pictures", expect=2)
        assert len(server.paths) == 1


@pytest.mark.parametrize("pattern", [
    "%012d.jpg", "{}.jpg", "a.jpg", "{image_id:012d}/a.jpg", "../{image_id}.jpg", "/{image_id}.jpg", "{image_id}{image_id}.jpg",
    "{image_id:999999999d}.jpg", "{image_id.real}.jpg", "a//{image_id}", "a,{image_id}.jpg", "{image_id}\n.jpg",
    "http://host/{image_id}.jpg", "", "\udce9{image_id}.jpg"], ids=ascii)
def test_a_pattern_that_gives_no_path_for_each_image_is_refused(pattern, run, tmp_path):
    error = run(*write_ok_vqa(tmp_path / "ok"), f"--image-pattern={pattern}", "--no-pictures", expect=2)
    assert "--image-pattern '" in error and "must hold {image_id} once" in error


@pytest.mark.parametrize("questions, annotations, pattern, message", [
    ("q.json", None, None, "--annotations and --image-pattern is missing"),
    (None, None, COCO_PATTERN, "--questions and --annotations is missing"),
    ("q.json", "none.json", COCO_PATTERN, "--annotations none.json is no .json or .json.gz file that exists"),
    ("q.zip", "q.json", COCO_PATTERN, "--questions q.zip is no .json or .json.gz file that exists (unpack a .zip)"),
    ("q.json", "q.json", COCO_PATTERN, "q.json has no list 'questions'"),
    ("cut.json", "q.json", COCO_PATTERN, "cut.json is not a whole JSON file (Expecting value: line 1 column 15")])
def test_files_that_do_not_fit_are_named(questions, annotations, pattern, message, run, tmp_path):
    for name, text in (("q.json", "{}"), ("q.zip", "{}"), ("cut.json", '{"questions": ')):
        (tmp_path / name).write_text(text)
    values = {"--questions": questions, "--annotations": annotations, "--image-pattern": pattern}
    flags = [text for flag, value in values.items() if value is not None for text in (flag, value)]
    assert message in run("--no-pictures", *flags, expect=2)


def test_images_that_the_pattern_does_not_find_name_it(run, tmp_path):
    (tmp_path / "local").mkdir()
    error = run(*write_ok_vqa(tmp_path / "ok"), "--image-pattern", "{image_id:02d}.jpg", "--image-dir", tmp_path / "local",
                "--min-answer-words", 1, "--min-agreement", 1, expect=2)
    assert "60 of 60 images are missing" in error
    assert f"check --image-dir {tmp_path / 'local'} and --image-pattern {{image_id:02d}}.jpg" in error


def test_own_files_and_a_subset_exclude_each_other(run, tmp_path):
    flags = [*write_ok_vqa(tmp_path / "ok"), "--image-pattern", COCO_PATTERN, "--subset", "val2014"]
    assert "--subset val2014 cannot be used with --questions" in run(*flags, expect=2)


VIZWIZ = [{"image": "VizWiz_val_00000000.jpg", "question": "What is this?", "answers": [{"answer": "a can"}]}]


@pytest.mark.parametrize("content", [
    VIZWIZ, {"questions": VIZWIZ}, {"201307251": {"imageId": "n161313", "question": "Is it red?"}},
    {"questions": [{"image_id": "n161313", "question_id": 5, "question": "Is it red?"}]},
    {"questions": [{"image_id": 5, "question_id": "201307251", "question": "Is it red?"}]}],
    ids=["VizWiz", "VizWiz in a list", "GQA", "image ids are texts", "question ids are texts"])
def test_other_layouts_get_a_line_that_names_the_csv(content, run, tmp_path):
    flags = write_ok_vqa(tmp_path / "ok", question={"question_id": 5, "image_id": 5}, num_images=1)
    (tmp_path / "ok" / OK_VQA["questions"]).write_text(json.dumps(content))
    error = run(*flags, "--image-pattern", COCO_PATTERN, "--no-pictures", expect=2)
    assert "can be given as a CSV: see 'Your own data' in docs/data.md" in error and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data/vqa_v2_text is not here")
def test_real_texts_as_another_set_give_the_same_rows(run, tmp_path):
    run("--vqa-dir", SHARED, "--no-pictures")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run("--questions", SHARED / f"{QUESTIONS}.gz", "--annotations", SHARED / f"{ANNOTATIONS}.gz", "--image-pattern",
        "train2014/COCO_train2014_{image_id:012d}.jpg", "--no-pictures")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == expected and len(expected) == 3
