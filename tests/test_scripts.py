"""The scripts in their order. Then mistakes of their users: one line, status 2, no incomplete output."""
import json
import re
import shutil

import pandas as pd
import pytest
import tiny
from conftest import call_script
from PIL import Image

LOOP = ("--batch-size", 16, "--epochs", 2)
STAGE_ONE = "output/feature_extraction/vqa_checkpoint.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script, encoder_flags, data_dir):
    """Stage 1 and stage 2 by the real scripts: (the folder with output/ and cache/, what the two scripts printed)."""
    folder = tmp_path_factory.mktemp("trained")
    stage_1 = run_script("train.py", "--data-dir", data_dir, *LOOP, *encoder_flags, "--hidden-size", 24,
                         "--answer-max-len", 8, cwd=folder)
    stage_2 = run_script("fine_tune.py", "--data-dir", data_dir, *LOOP, "--clip-layers", 1, "--gpt2-layers", 2, cwd=folder)
    return folder, stage_1.stdout, stage_2.stdout


@pytest.fixture
def score(trained, data_dir, tmp_path):
    """score(*flags) -> (what test.py prints, metrics or None, result rows). The files are r, r.csv and m.json of tmp_path."""
    def run(*flags, data=("--data-dir", data_dir)):
        output = call_script("test.py", *data, "--results-dir", tmp_path / "r", "--results-csv", tmp_path / "r.csv",
                             "--metrics-json", tmp_path / "m.json", *flags, cwd=trained[0])
        metrics = json.loads((tmp_path / "m.json").read_text()) if (tmp_path / "m.json").is_file() else None
        return output, metrics, tiny.read_csv(tmp_path / "r.csv")
    return run


def test_stage_two_prints_what_it_takes_and_logs_each_learning_rate(trained):
    folder, stage_1, stage_2 = trained
    assert "* hidden_size = 24" in stage_1 and "answers (train): 120 rows, 0 truncated" in stage_1
    assert "answer_max_len 8" in stage_2 and "vocabulary 13 words" in stage_2 and "interrupted" not in stage_2
    log = tiny.read_log(folder / "output/fine_tuning")
    assert {"learning_rate_head", "learning_rate_clip", "learning_rate_gpt2"} < set(log[0])
    # stage 2 starts from the best model of stage 1, through another freeze boundary and other stored states
    best = min(float(row["val_loss"]) for row in tiny.read_log(folder / "output/feature_extraction"))
    assert float(log[0]["val_loss"]) == pytest.approx(best, abs=1e-5)
    # no image is decoded twice
    assert len(list((folder / "cache").glob("pixels-*.npy"))) == 1
    assert not list((folder / "cache").glob(".*"))


def test_test_py_scores_stage_two_by_default_and_writes_the_same_bytes_again(trained, run_script, score, data_dir, tmp_path):
    folder, *_ = trained
    output = run_script("test.py", "--data-dir", data_dir, cwd=folder, PYTHONHASHSEED="1").stdout
    rows = tiny.read_csv(folder / "output/vqa_test_results.csv")
    assert list(rows[0]) == ["question_id", "image_id", "image_path", "question", "answer", "prediction", "sentence_bleu",
                             "exact_match", "vqa_accuracy", "confidence", "question_type", "answer_type"]
    assert len(rows) == 30 and all(0 < float(row["confidence"]) <= 1 for row in rows)
    metrics = json.loads((folder / "output/vqa_test_metrics.json").read_text())
    assert metrics["num_questions"] == 30 and metrics["split"] == "test"
    assert {"most_frequent", "most_frequent_per_question_type", "wrong_picture"} <= set(metrics["floors"])
    mean = sum(float(row["sentence_bleu"]) for row in rows) / len(rows)
    assert metrics["scores"]["mean_sentence_bleu"]["value"] == pytest.approx(mean, abs=0.01)
    assert metrics["ceilings"]["vocabulary"]["exact_match"]["value"] == 100
    assert metrics["one_annotator"] == "optimistic" and metrics["novel_predictions"]["n"] == 30
    assert sum(part["n"] for part in metrics["by_training_label"].values()) == 30
    assert 0 <= metrics["calibration"]["brier_score"] <= 1
    assert "verdict:" in output and "floor: wrong" in output
    images = {path.name for path in (folder / "results").glob("*.png")}
    assert {"overview.png", "scores.png", "calibration.png"} <= images and len(images) == 12 + 12 + 3
    explained = {name.removesuffix("_why.png") for name in images if name.endswith("_why.png")}
    assert len(explained) == 12 and {f"{name}.png" for name in explained} < images
    score()
    for name, again in (("output/vqa_test_results.csv", "r.csv"), ("output/vqa_test_metrics.json", "m.json"),
                        ("results/index.html", "r/index.html")):
        assert (folder / name).read_bytes() == (tmp_path / again).read_bytes()


def test_stage_one_and_another_split_are_scored_too(score):
    _, metrics, _ = score("--split", "val", "--checkpoint", STAGE_ONE, "--num-pictures", 0)
    assert metrics["checkpoint"] == STAGE_ONE and metrics["split"] == "val" and metrics["num_questions"] == 30


def test_all_rows_of_a_separate_test_file_are_scored(score, data_dir, tmp_path):
    """A test.csv without `split` answered a tenth of its rows without a word; with `split` = test it failed at the end."""
    rows = [row for row in tiny.read_csv(data_dir / "metadata.csv") if row["split"] == "test"]
    texts = ("question_id", "image_path", "question", "answer", "question_type", "answer_type", "image_id")
    folder = tmp_path / "other"
    shutil.copytree(data_dir / "images", folder / "images")
    tests = {"own.csv": [{name: row[name] for name in texts} for row in rows], "test.csv": rows,
             "dev.csv": [{**row, "split": "dev"} for row in rows]}
    for name, content in tests.items():
        pd.DataFrame(content).to_csv(folder / name, index=False)
    shutil.copy(data_dir / "qa_pairs.json", folder)
    _, expected, answers = score("--num-pictures", 0)
    output, metrics, _ = score("--num-pictures", 0, data=("--data-dir", folder / "test.csv"))
    assert metrics == expected | {"test_csv": None} and f"answering 30 of 30 rows of {folder / 'test.csv'}" in output
    for name in ("own.csv", "dev.csv"):
        output, metrics, found = score("--num-pictures", 0, data=("--test-csv", folder / name))
        assert found == answers and metrics == expected | {"split": None, "test_csv": str(folder / name)}
        assert f"answering all 30 rows of {folder / name}" in output
    output, metrics, _ = score("--num-pictures", 0, data=("--data-dir", folder / "own.csv"))
    assert f"answering {metrics['num_questions']} of 30 rows" in output and "--test-csv answers all rows" in output


def test_a_csv_with_several_answers_is_trained_on_and_scored_against_all(score, data_dir, train_flags, tmp_path):
    """The column answers instead of answer and qa_pairs.json: the same scores, and training on the annotators' answers."""
    _, expected, _ = score("--num-pictures", 0)
    own = shutil.copytree(data_dir, tmp_path / "own")
    answers = {str(pair["question_id"]): pair["answers"] for pair in json.loads((own / "qa_pairs.json").read_text())}
    rows = pd.DataFrame(tiny.read_csv(own / "metadata.csv")).drop(columns="answer")
    rows["answers"] = [json.dumps(answers[question_id]) for question_id in rows["question_id"]]
    rows.to_csv(own / "own.csv", index=False)
    (own / "qa_pairs.json").unlink()
    output, metrics, _ = score("--num-pictures", 0, data=("--data-dir", own / "own.csv"))
    assert metrics == expected and "10 annotations each" in output
    call_script("train.py", *train_flags, "--data-dir", own / "own.csv", "--answer-sampling", "humans", "--output-dir", "out",
                "--cache-dir", "cache", cwd=tmp_path)


def test_references_are_the_original_strings(score, tmp_path):
    """The published implementation scores references that went through its vocabulary: <unk> matches <unk>."""
    rows = tiny.write_data(tmp_path / "data")
    for row in rows:
        if row["split"] == "test":
            row["answer"] = "Some Unheard-of thing, isn't it"
            row["answers"] = [row["answer"]] * 10
    tiny.write_rows(tmp_path / "data", rows)
    _, metrics, results = score(data=("--data-dir", tmp_path / "data"))
    assert {row["answer"] for row in results} == {"Some Unheard-of thing, isn't it"}
    assert metrics["scores"]["exact_match"]["value"] == 0
    assert metrics["ceilings"]["vocabulary"]["exact_match"]["value"] == 0


def test_one_annotator_is_scored_on_the_held_out_entries_of_the_tested_split(score, data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    entries = [{"question_id": "of another question " + row["question_id"], "image_id": row["image_id"], "split": row["split"],
                "answers": [row["answer"]] * 10, "labels": [row["answer"]] * 2 + [None] * 8}
               for row in tiny.read_csv(folder / "metadata.csv")]
    (folder / "held_out_annotators.json").write_text(json.dumps(entries))
    _, metrics, _ = score("--num-pictures", 0, data=("--data-dir", folder))
    assert metrics["one_annotator"] == "held out"
    assert metrics["ceilings"]["human"]["exact_match"] == {"value": 100.0, "ci95": [100.0, 100.0], "n": 60}
    _, metrics, _ = score("--baselines-only", data=("--data-dir", folder))
    assert metrics["ceilings"]["human"]["exact_match"]["n"] == 360, "of all splits"


def test_a_classifier_over_training_answers_trains_and_is_scored(trained, score, encoder_flags, data_dir, tmp_path):
    folder, *_ = trained
    call_script("train.py", "--data-dir", data_dir, *LOOP, *encoder_flags, "--hidden-size", 24, "--decoder", "classifier",
                "--min-word-freq", 1, "--learning-rate", 1e-2, "--output-dir", tmp_path / "one", cwd=folder)
    call_script("fine_tune.py", "--data-dir", data_dir, *LOOP, "--clip-layers", 1, "--gpt2-layers", 0, "--checkpoint",
                tmp_path / "one/vqa_checkpoint.pt", "--output-dir", tmp_path / "two", cwd=folder)
    training_answers = {row["answer"] for row in tiny.read_csv(data_dir / "metadata.csv") if row["split"] == "train"}
    for beam_size in (1, 3):
        _, metrics, rows = score("--checkpoint", tmp_path / "two/vqa_checkpoint.pt", "--beam-size", beam_size)
        assert {row["prediction"] for row in rows} <= training_answers
        known = [row["answer"] in training_answers for row in rows]
        assert metrics["ceilings"]["vocabulary"]["exact_match"]["value"] == pytest.approx(100 * sum(known) / 30, abs=0.01)


def test_known_true_answers_are_scored_as_the_oracle(trained, score, data_dir, tmp_path):
    rows = [row for row in tiny.read_csv(data_dir / "metadata.csv") if row["split"] == "test"]
    true_answers = {row["question_id"]: row["answer"] for row in rows} | {rows[0]["question_id"]: "a wrong one"}
    (tmp_path / "true.json").write_text(json.dumps(true_answers))
    output, metrics, _ = score("--true-answers", tmp_path / "true.json")
    assert metrics["ceilings"]["oracle"]["exact_match"]["value"] == pytest.approx(100 * 29 / 30, abs=0.01)
    assert "ceiling: oracle" in output
    of_lists = json.dumps(dict.fromkeys(true_answers, ["a"]))
    for content in ('{"0": "a"}', "[]", "{", "[" * 100_000, of_lists):
        (tmp_path / "true.json").write_text(content)
        flags = ("--data-dir", data_dir, "--true-answers", tmp_path / "true.json")
        line = call_script("test.py", *flags, expect=2, cwd=trained[0])
        assert "is no JSON file with an answer for every tested question" in line


def test_one_question_about_one_image(trained, data_dir, tmp_path):
    """Answers about images of one name in two folders were written to one file, and so were two questions about one image."""
    shutil.copytree(data_dir / "images", tmp_path / "other")
    for folder, question in ((data_dir / "images", "left"), (tmp_path / "other", "left"), (tmp_path / "other", "right")):
        output = call_script("test.py", "--image", folder / "0003.png", "--question", f"What is on the {question}?",
                             "--results-dir", tmp_path / "r", "--beam-size", 3, cwd=trained[0])
        assert "answer: " in output and "confidence: 0." in output
    names = [path.name for path in (tmp_path / "r").iterdir()]
    assert len(names) == 3 and all(re.fullmatch(r"0003_answer_[0-9a-f]{8}\.png", name) for name in names)
    explained = call_script("test.py", "--image", folder / "0003.png", "--question", "What is on the right?", "--explain",
                            "--results-dir", tmp_path / "why", "--beam-size", 3, cwd=trained[0])
    assert re.findall("(answer|confidence): (.+)", explained) == re.findall("(answer|confidence): (.+)", output)
    path, = (tmp_path / "why").iterdir()
    assert re.fullmatch(r"0003_why_[0-9a-f]{8}\.png", path.name)
    for drawn in (tmp_path / "r" / names[0], path):
        with Image.open(drawn) as image:
            assert image.width > 300


def test_own_questions_without_answers_are_answered_and_not_scored(score, data_dir, tmp_path):
    shutil.copytree(data_dir / "images", tmp_path / "own/images")
    (tmp_path / "own/questions.csv").write_text(
        "image_path,question\nimages/0001.png,What is on the left?\nimages/0002.png,What is on the right?\n")
    output, metrics, rows = score("--cache-dir", tmp_path / "cache", data=("--data-csv", tmp_path / "own/questions.csv"))
    assert [row["image_path"] for row in rows] == ["images/0001.png", "images/0002.png"]
    assert all(row["prediction"] and row["sentence_bleu"] == "" for row in rows)
    assert "not scored" in output and metrics is None and (tmp_path / "r/index.html").is_file()


def test_one_bad_image_costs_own_questions_only_its_own_answer(trained, score, data_dir, tmp_path):
    """One bad image of three was more than 1 %: nothing was answered."""
    own = tmp_path / "own.csv"
    own.write_text(f"image_path,question\n{data_dir}/images/0001.png,What?\n{data_dir}/IMAGES/0002.png,What?\n")
    data, flags = ("--data-csv", own), ("--allow-outside", "--cache-dir", tmp_path / "cache")
    assert "use --allow-outside" in call_script("test.py", *data, expect=2, cwd=trained[0])
    output, _, rows = score(*flags, data=data)
    assert [row["image_path"] for row in rows] == [f"{data_dir}/images/0001.png"]
    bad = f"{data_dir}/IMAGES/0002.png (missing; {data_dir}/images/0002.png exists)"
    assert f"1 of 2 images cannot be read, their rows are left out: {bad}" in output
    own.write_text("image_path,question\nnowhere.png,What?\n")
    error = call_script("test.py", *data, *flags, expect=2, cwd=trained[0])
    assert "1 of 1 images cannot be read: nowhere.png (missing)" in error


def test_a_missing_training_image_does_not_stop_the_scoring_of_the_test_split(score, data_dir, tmp_path):
    """One image of 60 was more than 1 %, though no test row shows it."""
    data = shutil.copytree(data_dir, tmp_path / "data")
    rows = tiny.read_csv(data / "metadata.csv")
    (data / next(row["image_path"] for row in rows if row["split"] == "train")).unlink()
    output, metrics, _ = score("--num-pictures", 0, "--cache-dir", tmp_path / "cache", data=("--data-dir", data))
    assert metrics["num_questions"] == sum(row["split"] == "test" for row in rows)
    assert "1 of 60 images cannot be read, their rows are left out" in output


def test_a_question_only_model_has_its_own_folder_and_becomes_a_floor(trained, score, encoder_flags, data_dir, tmp_path):
    folder, *_ = trained
    stage_1 = (folder / STAGE_ONE).read_bytes()
    blind = ["train.py", *encoder_flags, "--hidden-size", 24, "--inputs", "question", *LOOP]
    call_script(*blind, "--data-dir", data_dir, cwd=folder)
    assert "question_only" in score("--num-pictures", 0)[1]["floors"]
    assert "question_only" not in score("--num-pictures", 0, "--question-only-checkpoint", "None")[1]["floors"]
    assert (folder / STAGE_ONE).read_bytes() == stage_1
    # a model that was trained on other rows may have seen these answers
    other = shutil.copytree(data_dir, tmp_path / "other")
    lines = (other / "metadata.csv").read_text().splitlines(keepends=True)
    (other / "metadata.csv").write_text("".join(lines[:-7]))
    (other / "qa_pairs.json").unlink()
    call_script(*blind, "--data-dir", other, "--output-dir", tmp_path / "blind", "--cache-dir", tmp_path / "cache", cwd=folder)
    output, metrics, _ = score("--question-only-checkpoint", tmp_path / "blind/vqa_checkpoint.pt", "--num-pictures", 0)
    assert "question_only" not in metrics["floors"] and "was trained on other rows" in output


def test_images_of_an_earlier_evaluation_are_removed(score, data_dir, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/mine.png").write_bytes(b"not one of them")
    for seed in (1, 2):
        score("--num-pictures", 2, "--seed", seed)
    others = {"overview.png", "scores.png", "calibration.png", "mine.png"}
    assert len({path.name for path in (tmp_path / "r").glob("*.png")} - others) == 4  # with explanations
    score("--num-pictures", 0, data=("--data-csv", data_dir / "metadata.csv"))  # without scores
    assert [path.name for path in (tmp_path / "r").glob("*.png")] == ["mine.png"]


def test_baselines_need_no_image_and_no_model(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "text", ignore=shutil.ignore_patterns("images"))
    output = call_script("test.py", "--data-dir", "text", "--baselines-only", "--metrics-json", "m.json", cwd=tmp_path)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["num_questions"] == 180 and "scores" not in metrics
    assert metrics["ceilings"]["human"]["mean_sentence_bleu"]["value"] > 80
    assert "floor: nearest question" in output and "verdict" not in output


def test_bleu_of_answers_without_spaces_needs_another_tokenizer(tmp_path):
    """One wrong character in a Chinese answer gave 0 BLEU, since the whole answer was one word."""
    answers = ["红色的书", "红色的笔", "蓝色的书"]
    (tmp_path / "own.csv").write_text("image_path,question,answer\n" + "".join(
        f"{number}.jpg,这是什么,{answers[number % 3]}\n" for number in range(12)), encoding="utf-8")
    flags = ("test.py", "--data-dir", "own.csv", "--baselines-only", "--metrics-json", "m.json")
    scores = {}
    for name in ("13a", "zh"):
        output = call_script(*flags, "--bleu-tokenize", name, cwd=tmp_path)
        scores[name] = json.loads((tmp_path / "m.json").read_text())["floors"]["most_frequent"]["mean_sentence_bleu"]["value"]
        assert f"|tok:{name}|" in output and ("12 of 12 labels have no spaces between words" in output) == (name == "13a")
    assert scores["13a"] < scores["zh"] - 20


@pytest.mark.parametrize("damage, message", [
    (lambda folder: (folder / "metadata.csv").unlink(), "metadata.csv not found"),
    (lambda folder: (folder / "images/0005.png").write_bytes(b"no image"), "images/0005.png")],
    ids=["no CSV", "damaged image"])
def test_bad_data_ends_training_in_one_line(damage, message, train_flags, data_dir, tmp_path):
    damage(shutil.copytree(data_dir, tmp_path / "data"))
    assert message in call_script("train.py", *train_flags, "--data-dir", "data", expect=2, cwd=tmp_path)
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("script, flags, message", [
    ("train.py", ["--learning-rate", "nan"], "--learning-rate nan"),
    ("train.py", ["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a CUDA device"),
    ("train.py", ["--device", "tpu9"], "--device tpu9"),
    ("train.py", ["--clip-model", "local-dir:nowhere"], "no open_clip_config.json"),
    ("fine_tune.py", ["--checkpoint", "nowhere.pt"], "checkpoint nowhere.pt not found"),
    ("fine_tune.py", ["--checkpoint", "output/fine_tuning/vqa_checkpoint.pt"], "is a fine-tuned checkpoint"),
    ("fine_tune.py", ["--clip-layers", 9], "--clip-layers 9"),
    ("fine_tune.py", ["--output-dir", "output/feature_extraction"], "stage 1's own folder"),
    ("test.py", ["--checkpoint", "LICENSE"], "is not a checkpoint"),
    ("test.py", ["--image", "x.jpg"], "--image and --question go together"),
    ("test.py", ["--explain"], "--explain is for one answer: give --image and --question"),
    ("test.py", ["--image", "nowhere.jpg", "--question", "What?"], "error: image nowhere.jpg: no such file"),
    ("test.py", ["--image", "license", "--question", "What?"], "image license: no such file; LICENSE exists"),
    ("test.py", ["--image", "a.png", "--question", " "], "--question"),
    ("test.py", ["--image", "a.png", "--question", "a \udcff"], "--question"),
    ("test.py", ["--image", "a.png", "--question", "What?", "--data-csv", "a.csv"], "--image and --data-csv"),
    ("test.py", ["--test-csv", "nowhere.csv"], "--test-csv nowhere.csv is no CSV file that exists"),
    ("test.py", ["--data-csv", "output"], "--data-csv output is no CSV file that exists"),
    ("test.py", ["--test-csv", "a.csv", "--data-csv", "b.csv"], "--data-csv and --test-csv cannot be used together"),
    ("train.py", ["--image-pooling", "attention", "--hidden-size", "30"], "--hidden-size 30 must be a multiple of 4"),
])
def test_a_mistake_is_one_line_and_status_2(script, flags, message, trained, encoder_flags, data_dir, tmp_path):
    folder, *_ = trained
    (folder / "LICENSE").write_text("not a checkpoint")
    needed = [] if "--image" in flags else ["--data-dir", data_dir]
    if script == "train.py":
        needed += encoder_flags
    if script != "test.py" and "--output-dir" not in flags:
        needed += ["--output-dir", tmp_path / "out"]
    assert message in call_script(script, *needed, *flags, expect=2, cwd=folder)
    assert not (tmp_path / "out").exists()


def test_stage_two_says_if_stage_one_was_interrupted(trained, data_dir, tmp_path):
    folder, *_ = trained
    shutil.copytree(folder / "output/feature_extraction", tmp_path / "one")
    log = (tmp_path / "one/train_log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "one/train_log.csv").write_text("".join(log[:-1]))
    output = call_script("fine_tune.py", "--checkpoint", tmp_path / "one/vqa_checkpoint.pt", "--data-dir", data_dir,
                         "--epochs", 1, "--clip-layers", 0, "--gpt2-layers", 1, "--output-dir", tmp_path / "out", cwd=folder)
    assert "stage 1 was interrupted after epoch 1; the same train.py command with --resume finishes it" in output


def test_a_checkpoint_moves_and_its_encoders_are_found_or_named(train_flags, encoder_flags, data_dir, tmp_path):
    """Its relative folders were looked for in the working folder alone, and the message named flags that test.py lacked."""
    first, second = tmp_path / "first", tmp_path / "second"
    shutil.copytree(encoder_flags[1].removeprefix("local-dir:"), first / "own/clip")
    shutil.copytree(encoder_flags[3], first / "own/gpt2")
    train = ["train.py", *train_flags, "--clip-model", "local-dir:own/clip", "--gpt2-model", "own/gpt2"]
    call_script(*train, "--output-dir", second, cwd=first)
    call_script(*train, "--inputs", "question", "--output-dir", second / "blind", cwd=first)
    checkpoint = ["--checkpoint", second / "vqa_checkpoint.pt"]
    ask = ["test.py", *checkpoint, "--image", data_dir / "images/0000.png", "--question", "What?"]
    assert "name the folder with --clip-model local-dir:FOLDER" in call_script(*ask, expect=2, cwd=tmp_path)
    shutil.move(first / "own/clip", second / "own/clip")  # beside the checkpoint
    assert "or pass a local folder (--gpt2-model FOLDER)" in call_script(*ask, expect=2, cwd=tmp_path)
    moved = ["--gpt2-model", first / "own/gpt2", "--data-dir", data_dir, "--cache-dir", tmp_path / "cache"]
    assert "answer: " in call_script(*ask, *moved, cwd=tmp_path)
    tiny.write_encoders(tmp_path / "other", seed=1)
    other = call_script(*ask, "--gpt2-model", tmp_path / "other/gpt2", expect=2, cwd=tmp_path)
    assert "trained with own/gpt2 of fingerprint" in other and "name the same weights and settings with --gpt2-model" in other
    # stage 2 stores what was used; the question-only model is found in the same way
    moved += ["--clip-model", f"local-dir:{second}/own/clip"]
    output = call_script("fine_tune.py", *checkpoint, *moved, "--output-dir", "two", "--epochs", 1, cwd=tmp_path)
    assert f"gpt2_model {first}/own/gpt2" in output
    call_script("test.py", "--checkpoint", "two/vqa_checkpoint.pt", *moved, "--metrics-json", "m.json",
                "--question-only-checkpoint", second / "blind/vqa_checkpoint.pt", cwd=tmp_path)
    assert "question_only" in json.loads((tmp_path / "m.json").read_text())["floors"]
