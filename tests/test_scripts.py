"""The real scripts in a subprocess, in order. Then mistakes of their users: one line, status 2, no incomplete output."""
import json
import shutil

import pytest
import tiny
from PIL import Image

LOOP = ("--batch-size", 16, "--epochs", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, run_script, encoder_flags, data_dir):
    """Stage 1 and stage 2 on the small data set: (the folder with output/ and cache/, what the two scripts printed)."""
    folder = tmp_path_factory.mktemp("trained")
    stage_1 = run_script("train.py", "--data-dir", data_dir, *LOOP, *encoder_flags, "--hidden-size", 24,
                         "--answer-max-len", 8, cwd=folder)
    stage_2 = run_script("fine_tune.py", "--data-dir", data_dir, *LOOP, "--clip-layers", 1, "--gpt2-layers", 2, cwd=folder)
    return folder, stage_1.stdout, stage_2.stdout


@pytest.fixture
def score(trained, run_script, data_dir, tmp_path):
    """score(*flags) -> (CompletedProcess, metrics or None, result rows) of test.py, written to tmp_path."""
    def run(*flags, data=("--data-dir", data_dir), **options):
        result = run_script("test.py", *data, "--results-dir", tmp_path / "r", "--results-csv", tmp_path / "r.csv",
                            "--metrics-json", tmp_path / "m.json", *flags, cwd=trained[0], **options)
        metrics = json.loads((tmp_path / "m.json").read_text()) if (tmp_path / "m.json").is_file() else None
        return result, metrics, tiny.read_csv(tmp_path / "r.csv")
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


def test_no_image_is_decoded_twice_by_the_scripts(trained):
    folder, *_ = trained
    assert len(list((folder / "cache").glob("pixels-*.npy"))) == 1
    assert not list((folder / "cache").glob(".*"))


def test_the_defaults_of_test_py_score_stage_two(trained, run_script, data_dir):
    folder, *_ = trained
    output = run_script("test.py", "--data-dir", data_dir, cwd=folder).stdout
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
    assert "verdict:" in output and "floor: wrong" in output
    images = {path.name for path in (folder / "results").glob("*.png")}
    assert {"overview.png", "scores.png", "calibration.png"} <= images and len(images) == 12 + 3
    assert (folder / "results/index.html").is_file()


def test_stage_one_is_scored_too_and_two_runs_write_the_same_bytes(score, tmp_path):
    contents, checkpoint = [], "output/feature_extraction/vqa_checkpoint.pt"
    for seed in ("1", "2"):
        _, metrics, _ = score("--split", "val", "--checkpoint", checkpoint, "--num-pictures", 0, PYTHONHASHSEED=seed)
        contents.append([(tmp_path / name).read_bytes() for name in ("r.csv", "m.json", "r/index.html")])
    assert metrics["checkpoint"] == checkpoint and metrics["split"] == "val" and metrics["num_questions"] == 30
    assert contents[0] == contents[1]


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


def test_one_question_about_one_image(trained, run_script, data_dir, tmp_path):
    folder, *_ = trained
    output = run_script("test.py", "--image", data_dir / "images/0003.png", "--question", "What is on the left?",
                        "--results-dir", tmp_path, "--beam-size", 3, cwd=folder).stdout
    assert "answer: " in output and "confidence: 0." in output
    with Image.open(tmp_path / "0003_answer.png") as image:
        assert image.width > 300


def test_own_questions_without_answers_are_answered_and_not_scored(score, data_dir, tmp_path):
    shutil.copytree(data_dir / "images", tmp_path / "own/images")
    (tmp_path / "own/questions.csv").write_text(
        "image_path,question\nimages/0001.png,What is on the left?\nimages/0002.png,What is on the right?\n")
    result, metrics, rows = score("--cache-dir", tmp_path / "cache", data=("--data-csv", tmp_path / "own/questions.csv"))
    assert [row["image_path"] for row in rows] == ["images/0001.png", "images/0002.png"]
    assert all(row["prediction"] and row["sentence_bleu"] == "" for row in rows)
    assert "not scored" in result.stdout and metrics is None and (tmp_path / "r/index.html").is_file()


def test_a_question_only_model_has_its_own_folder_and_becomes_a_floor(trained, score, run_script, encoder_flags, data_dir,
                                                                      tmp_path):
    folder, *_ = trained
    stage_1 = (folder / "output/feature_extraction/vqa_checkpoint.pt").read_bytes()
    blind = ["train.py", *encoder_flags, "--hidden-size", 24, "--inputs", "question", *LOOP]
    run_script(*blind, "--data-dir", data_dir, cwd=folder)
    assert "question_only" in score()[1]["floors"]
    assert (folder / "output/feature_extraction/vqa_checkpoint.pt").read_bytes() == stage_1
    # a model that was trained on other rows may have seen these answers
    other = shutil.copytree(data_dir, tmp_path / "other")
    lines = (other / "metadata.csv").read_text().splitlines(keepends=True)
    (other / "metadata.csv").write_text("".join(lines[:-7]))
    (other / "qa_pairs.json").unlink()
    run_script(*blind, "--data-dir", other, "--output-dir", tmp_path / "blind", "--cache-dir", tmp_path / "cache", cwd=folder)
    result, metrics, _ = score("--question-only-checkpoint", tmp_path / "blind/vqa_checkpoint.pt")
    assert "question_only" not in metrics["floors"] and "was trained on other rows" in result.stdout


def test_sample_images_of_an_earlier_evaluation_are_removed(score, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/mine.png").write_bytes(b"not one of them")
    for seed in (1, 2):
        score("--num-pictures", 2, "--seed", seed)
    others = {"overview.png", "scores.png", "calibration.png", "mine.png"}
    assert len({path.name for path in (tmp_path / "r").glob("*.png")} - others) == 2


def test_baselines_need_no_image_and_no_model(run_script, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "text", ignore=shutil.ignore_patterns("images"))
    output = run_script("test.py", "--data-dir", tmp_path / "text", "--baselines-only", "--metrics-json", tmp_path / "m.json",
                        cwd=tmp_path).stdout
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["num_questions"] == 180 and "scores" not in metrics
    assert metrics["ceilings"]["human"]["mean_sentence_bleu"]["value"] > 80
    assert "floor: nearest question" in output and "verdict" not in output


def check_one_line(result, message):
    line, = [line for line in result.stderr.splitlines() if line and not line.startswith("decoding images")]
    assert line.startswith("error: ") and message in line, result.stderr


def change_rows(**values):
    """A damage that gives every row these values."""
    def damage(folder, rows):
        for row in rows:
            row.update(values)
    return damage


@pytest.mark.parametrize("damage, message", [
    (lambda folder, rows: [row.pop("answer") for row in rows], "lacks the column answer"),
    (change_rows(answer="n/a", answers=["n/a"] * 10), "'n/a'"),
    (change_rows(split="train"), "no rows in the split 'val'"),
    (lambda folder, rows: (folder / "images/0005.png").write_bytes(b"no image"), "images/0005.png"),
    (lambda folder, rows: rows.clear(), "metadata.csv not found")],
    ids=["no answers", "one answer", "no val", "damaged image", "no CSV"])
def test_bad_data_ends_training_in_one_line(damage, message, run_script, encoder_flags, data_dir, tmp_path):
    folder = shutil.copytree(data_dir, tmp_path / "data")
    rows = json.loads((folder / "qa_pairs.json").read_text())
    damage(folder, rows)
    (folder / "metadata.csv").unlink()
    if rows:
        tiny.write_rows(folder, rows)
    check_one_line(run_script("train.py", "--data-dir", folder, *encoder_flags, expect=2, cwd=tmp_path), message)
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
    ("test.py", ["--image", "nowhere.jpg", "--question", "What?"], "--image nowhere.jpg: no such file"),
])
def test_a_mistake_is_one_line_and_status_2(script, flags, message, trained, run_script, encoder_flags, data_dir, tmp_path):
    folder, *_ = trained
    (folder / "LICENSE").write_text("not a checkpoint")
    needed = [] if "--image" in flags else ["--data-dir", data_dir]
    if script == "train.py":
        needed += encoder_flags[2:] if "--clip-model" in flags else encoder_flags
    if script != "test.py" and "--output-dir" not in flags:
        needed += ["--output-dir", tmp_path / "out"]
    check_one_line(run_script(script, *needed, *flags, expect=2, cwd=folder), message)
    assert not (tmp_path / "out").exists()


def test_an_unknown_flag_stops_the_run(run_script):
    assert "--epoch" in run_script("train.py", "--epochz", 3, expect=2).stderr


def test_stage_two_says_if_stage_one_was_interrupted(trained, run_script, data_dir, tmp_path):
    folder, *_ = trained
    shutil.copytree(folder / "output/feature_extraction", tmp_path / "one")
    log = (tmp_path / "one/train_log.csv").read_text().splitlines(keepends=True)
    (tmp_path / "one/train_log.csv").write_text("".join(log[:-1]))
    output = run_script("fine_tune.py", "--checkpoint", tmp_path / "one/vqa_checkpoint.pt", "--data-dir", data_dir,
                        "--epochs", 1, "--clip-layers", 0, "--gpt2-layers", 1, "--output-dir", tmp_path / "out",
                        cwd=folder).stdout
    assert "stage 1 was interrupted after epoch 1; the same train.py command with --resume finishes it" in output
