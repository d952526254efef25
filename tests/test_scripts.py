"""The real scripts in a subprocess, in order; then their users' mistakes: one line, status 2, nothing half-written."""
import csv
import json
import shutil

import pytest
import tiny
from PIL import Image

LOOP = ("--batch-size", 16, "--epochs", 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, encoder_flags, data_dir):
    """Stage 1 and stage 2 on the small data set; the folder with output/ and cache/ in it."""
    import os
    import subprocess
    import sys

    from conftest import ROOT
    folder = tmp_path_factory.mktemp("trained")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    common = ["--data-dir", data_dir, *map(str, LOOP)]
    outputs = []
    for script, flags in (("train.py", [*encoder_flags, "--hidden-size", "24", "--answer-max-len", "8"]),
                          ("fine_tune.py", ["--clip-layers", "1", "--gpt2-layers", "2"])):
        outputs.append(subprocess.run([sys.executable, ROOT / script, *common, *flags], cwd=folder, env=env, text=True,
                                      capture_output=True, timeout=300))
        assert outputs[-1].returncode == 0, outputs[-1].stderr
    return folder, outputs


def test_stage_two_says_what_it_takes_and_logs_each_learning_rate(trained):
    folder, (stage_1, stage_2) = trained
    assert "* hidden_size = 24" in stage_1.stdout and "answers (train): 120 rows, 0 cut" in stage_1.stdout
    assert "answer_max_len 8" in stage_2.stdout and "vocabulary 13 words" in stage_2.stdout
    assert "interrupted" not in stage_2.stdout
    with open(folder / "output/fine_tuning/train_log.csv", newline="") as stream:
        log = list(csv.DictReader(stream))
    assert {"learning_rate_head", "learning_rate_clip", "learning_rate_gpt2"} < set(log[0])
    with open(folder / "output/feature_extraction/train_log.csv", newline="") as stream:
        stage_1_log = list(csv.DictReader(stream))
    # stage 2 starts from the very model that stage 1 kept, through another cut and its own cache
    best = min(float(row["val_loss"]) for row in stage_1_log)
    assert float(log[0]["val_loss"]) == pytest.approx(best, abs=1e-5)


def test_the_defaults_of_test_py_find_stage_two(trained, run_script, data_dir):
    folder, _ = trained
    result = run_script("test.py", "--data-dir", data_dir, cwd=folder)
    with open(folder / "output/vqa_test_results.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["question_id", "image_id", "image_path", "question", "answer", "prediction", "sentence_bleu",
                             "exact_match", "vqa_accuracy", "confidence", "question_type", "answer_type"]
    assert len(rows) == 30 and all(0 < float(row["confidence"]) <= 1 for row in rows)
    metrics = json.loads((folder / "output/vqa_test_metrics.json").read_text())
    assert metrics["num_questions"] == 30 and metrics["split"] == "test"
    assert {"most_frequent", "most_frequent_per_question_type", "wrong_picture"} <= set(metrics["floors"])
    mean = sum(float(row["sentence_bleu"]) for row in rows) / len(rows)
    assert metrics["scores"]["mean_sentence_bleu"]["value"] == pytest.approx(mean, abs=0.01)
    assert metrics["ceilings"]["vocabulary"]["exact_match"]["value"] == 100
    assert "verdict:" in result.stdout and "floor: wrong picture" in result.stdout
    pictures = sorted(path.name for path in (folder / "results").glob("*.png"))
    assert {"overview.png", "scores.png", "calibration.png"} <= set(pictures) and len(pictures) == 12 + 3
    assert (folder / "results/index.html").is_file()


def test_two_runs_of_test_py_write_the_same_bytes(trained, run_script, data_dir):
    folder, _ = trained
    contents = []
    for seed in ("1", "2"):
        run_script("test.py", "--data-dir", data_dir, "--results-dir", f"again_{seed}", cwd=folder, PYTHONHASHSEED=seed)
        names = ("output/vqa_test_results.csv", "output/vqa_test_metrics.json", f"again_{seed}/overview.png")
        contents.append([(folder / name).read_bytes() for name in names])
    assert contents[0] == contents[1]


def test_references_are_the_original_strings(trained, run_script, data_dir, tmp_path):
    """The published implementation scores references that went through its vocabulary: <unk> matches <unk>."""
    folder, _ = trained
    rows = tiny.write_data(tmp_path / "data")
    for row in rows:
        if row["split"] == "test":
            row["answer"] = "Some Unheard-of thing, isn't it"
            row["answers"] = [row["answer"]] * 10
    tiny.write_rows(tmp_path / "data", rows)
    run_script("test.py", "--data-dir", tmp_path / "data", "--results-dir", tmp_path / "r", "--results-csv", tmp_path / "r.csv",
               "--metrics-json", tmp_path / "m.json", cwd=folder)
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as stream:
        assert {row["answer"] for row in csv.DictReader(stream)} == {"Some Unheard-of thing, isn't it"}
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["scores"]["exact_match"]["value"] == 0
    assert metrics["ceilings"]["vocabulary"]["exact_match"]["value"] == 0


def test_one_question_about_one_picture(trained, run_script, data_dir, tmp_path):
    folder, _ = trained
    result = run_script("test.py", "--image", data_dir / "images/0003.png", "--question", "What is on the left?",
                        "--results-dir", tmp_path, "--beam-size", 3, cwd=folder)
    assert "answer: " in result.stdout and "confidence: 0." in result.stdout
    assert Image.open(tmp_path / "0003_answer.png").width > 300


def test_own_questions_without_answers_are_answered_and_not_scored(trained, run_script, data_dir, tmp_path):
    folder, _ = trained
    shutil.copytree(data_dir / "images", tmp_path / "own/images")
    (tmp_path / "own/questions.csv").write_text(
        "image_path,question\nimages/0001.png,What is on the left?\nimages/0002.png,What is on the right?\n")
    result = run_script("test.py", "--data-csv", tmp_path / "own/questions.csv", "--results-csv", tmp_path / "r.csv",
                        "--metrics-json", tmp_path / "m.json", "--results-dir", tmp_path / "r",
                        "--cache-dir", tmp_path / "cache", cwd=folder)
    with open(tmp_path / "r.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["image_path"] for row in rows] == ["images/0001.png", "images/0002.png"]
    assert all(row["prediction"] and row["sentence_bleu"] == "" for row in rows) and "not scored" in result.stdout
    assert not (tmp_path / "m.json").exists() and (tmp_path / "r/index.html").is_file()


def test_a_question_only_model_has_its_own_folder_and_is_picked_up_as_a_floor(trained, run_script, encoder_flags, data_dir,
                                                                              tmp_path):
    folder, _ = trained
    stage_1 = (folder / "output/feature_extraction/vqa_checkpoint.pt").read_bytes()
    blind = ["train.py", *encoder_flags, "--hidden-size", 24, "--inputs", "question", *LOOP]
    score = ["test.py", "--data-dir", data_dir, "--results-dir", tmp_path, "--results-csv", tmp_path / "r.csv",
             "--metrics-json", tmp_path / "m.json"]
    run_script(*blind, "--data-dir", data_dir, cwd=folder)
    run_script(*score, cwd=folder)
    assert "question_only" in json.loads((tmp_path / "m.json").read_text())["floors"]
    assert (folder / "output/feature_extraction/vqa_checkpoint.pt").read_bytes() == stage_1
    # one that was trained on other rows may have seen these answers
    other = shutil.copytree(data_dir, tmp_path / "other")
    lines = (other / "metadata.csv").read_text().splitlines(keepends=True)
    (other / "metadata.csv").write_text("".join(lines[:-7]))
    (other / "qa_pairs.json").unlink(missing_ok=True)
    run_script(*blind, "--data-dir", other, "--output-dir", tmp_path / "blind", "--cache-dir",
               tmp_path / "cache", cwd=folder)
    result = run_script(*score, "--question-only-checkpoint", tmp_path / "blind/vqa_checkpoint.pt", cwd=folder)
    assert "question_only" not in json.loads((tmp_path / "m.json").read_text())["floors"]
    assert "was trained on other rows" in result.stdout


def test_samples_of_an_earlier_evaluation_do_not_stay(trained, run_script, data_dir, tmp_path):
    folder, _ = trained
    (tmp_path / "mine.png").write_bytes(b"not one of them")
    for seed in (1, 2):
        run_script("test.py", "--data-dir", data_dir, "--results-dir", tmp_path, "--results-csv", tmp_path / "r.csv",
                   "--metrics-json", tmp_path / "m.json", "--num-pictures", 2, "--seed", seed, cwd=folder)
    charts = {"overview.png", "scores.png", "calibration.png", "mine.png"}
    assert len({path.name for path in tmp_path.glob("*.png")} - charts) == 2


def test_baselines_need_no_picture_and_no_model(run_script, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "text", ignore=shutil.ignore_patterns("images"))
    result = run_script("test.py", "--data-dir", tmp_path / "text", "--baselines-only", "--metrics-json", tmp_path / "m.json",
                        cwd=tmp_path)
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics["num_questions"] == 180 and "scores" not in metrics
    assert metrics["ceilings"]["human"]["mean_sentence_bleu"]["value"] > 80
    assert "floor: nearest question" in result.stdout and "verdict" not in result.stdout


def test_stage_one_can_be_scored_too(trained, run_script, data_dir, tmp_path):
    folder, _ = trained
    run_script("test.py", "--data-dir", data_dir, "--split", "val",
               "--checkpoint", "output/feature_extraction/vqa_checkpoint.pt",
               "--results-dir", tmp_path, "--results-csv", tmp_path / "r.csv", "--metrics-json", tmp_path / "m.json",
               "--num-pictures", 0, cwd=folder)
    assert json.loads((tmp_path / "m.json").read_text())["checkpoint"].endswith("feature_extraction/vqa_checkpoint.pt")


def test_no_picture_is_decoded_twice_by_the_three_scripts(trained):
    folder, _ = trained
    assert len(list((folder / "cache").glob("pixels-*.npy"))) == 1
    assert not list((folder / "cache").glob(".*"))


def broken_data(kind, source, folder):
    """A copy of the small data set with one thing wrong."""
    shutil.copytree(source, folder)
    rows = json.loads((folder / "qa_pairs.json").read_text())
    if kind == "column":
        for row in rows:
            del row["answer"]
    if kind == "n/a":
        for row in rows:
            row.update(answer="n/a", answers=["n/a"] * 10)
    if kind == "no val":
        for row in rows:
            row["split"] = "test" if row["split"] == "val" else row["split"]
    if kind == "picture":
        (folder / "images/0005.png").write_bytes(b"not a picture")
    if kind == "empty":
        (folder / "metadata.csv").unlink()
        return
    tiny.write_rows(folder, rows)


@pytest.mark.parametrize("kind, message", [
    ("column", "lacks the column answer"), ("n/a", "'n/a'"), ("no val", "no rows in the split 'val'"),
    ("picture", "images/0005.png"), ("empty", "metadata.csv not found")])
def test_bad_data_ends_training_with_one_line(kind, message, run_script, encoder_flags, data_dir, tmp_path):
    broken_data(kind, data_dir, tmp_path / "data")
    result = run_script("train.py", "--data-dir", tmp_path / "data", *encoder_flags, expect=2, cwd=tmp_path)
    check_one_line(result, message)
    assert not (tmp_path / "output").exists()


def check_one_line(result, message):
    lines = [line for line in result.stderr.splitlines() if line and "pictures" not in line.split(":")[0]]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], result.stderr


@pytest.mark.parametrize("script, flags, message", [
    ("train.py", ["--epochs", 0], "--epochs 0"),
    ("train.py", ["--learning-rate", "nan"], "--learning-rate nan"),
    ("train.py", ["--learning-rate", "-1"], "--learning-rate -1"),
    ("train.py", ["--dropout", 1.5], "--dropout 1.5"),
    ("train.py", ["--amp", "fp16", "--device", "cpu"], "--amp fp16 needs a CUDA device"),
    ("train.py", ["--device", "tpu9"], "--device tpu9"),
    ("train.py", ["--clip-model", "local-dir:nowhere"], "no open_clip_config.json"),
    ("fine_tune.py", ["--checkpoint", "nowhere.pt"], "checkpoint nowhere.pt not found"),
    ("fine_tune.py", ["--clip-layers", 9], "--clip-layers 9"),
    ("fine_tune.py", ["--output-dir", "output/feature_extraction"], "stage 1's own folder"),
    ("test.py", ["--checkpoint", "LICENSE"], "is not a checkpoint"),
    ("test.py", ["--split", "dev"], "--split dev"),
    ("test.py", ["--image", "x.jpg"], "--image and --question go together"),
    ("test.py", ["--image", "nowhere.jpg", "--question", "What?"], "--image nowhere.jpg: no such file"),
])
def test_a_mistake_is_one_line_and_status_2(script, flags, message, trained, run_script, encoder_flags, data_dir, tmp_path):
    folder, _ = trained
    (folder / "LICENSE").write_text("not a checkpoint")
    needed = [] if "--image" in flags else ["--data-dir", data_dir]
    if script == "train.py":
        needed += [*(encoder_flags if "--clip-model" not in flags else encoder_flags[2:]), "--output-dir", tmp_path / "out"]
    elif script == "fine_tune.py" and "--output-dir" not in flags:
        needed += ["--output-dir", tmp_path / "out"]
    result = run_script(script, *needed, *flags, expect=2, cwd=folder)
    check_one_line(result, message)
    assert not (tmp_path / "out").exists()


def test_an_unknown_flag_stops_the_run(run_script):
    assert "--epoch" in run_script("train.py", "--epochz", 3, expect=2).stderr


def test_stage_two_refuses_a_fine_tuned_checkpoint(trained, run_script, data_dir, tmp_path):
    folder, _ = trained
    result = run_script("fine_tune.py", "--checkpoint", "output/fine_tuning/vqa_checkpoint.pt", "--data-dir", data_dir,
                        "--output-dir", tmp_path / "out", expect=2, cwd=folder)
    check_one_line(result, "is a fine-tuned checkpoint")


def test_stage_two_says_when_stage_one_was_interrupted(trained, run_script, data_dir, tmp_path):
    from training.checkpoint import read_checkpoint, save_checkpoint
    folder, _ = trained
    shutil.copytree(folder / "output/feature_extraction", tmp_path / "one")
    last = read_checkpoint(tmp_path / "one/last.pt")
    last["state"]["finished"] = False
    save_checkpoint(tmp_path / "one/last.pt", last)
    result = run_script("fine_tune.py", "--checkpoint", tmp_path / "one/vqa_checkpoint.pt", "--data-dir", data_dir, *LOOP[:2],
                        "--epochs", 1, "--clip-layers", 0, "--gpt2-layers", 1, "--output-dir", tmp_path / "out", cwd=folder)
    assert "stage 1 was interrupted after epoch 2" in result.stdout
