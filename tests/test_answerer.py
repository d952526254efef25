"""From Python: `evaluation.generation.load` answers the same as test.py, whatever form image and question come in."""
import math
import re
import subprocess
import sys

import pytest
import tiny
import torch
from conftest import MODEL_CONFIGS, ROOT, call_script
from PIL import Image

from evaluation.generation import load
from features.trained_model import read_checkpoint

QUESTION = "What do you see in the image?"


@pytest.fixture
def answerer(stage_one):
    return load(stage_one / "vqa_checkpoint.pt")


def check_close(answers, expected):
    """The texts are equal, and the numbers up to the rounding of another batch."""
    assert [answer.text for answer in answers] == [answer.text for answer in expected]
    for answer, other in zip(answers, expected, strict=True):
        assert (answer.confidence, answer.gate) == pytest.approx((other.confidence, other.gate), rel=1e-4)
        for name in ("word_probabilities", "alternatives"):
            (texts, values), (other_texts, other_values) = (zip(*getattr(one, name), strict=True) for one in (answer, other))
            assert texts == other_texts and values == pytest.approx(other_values, rel=1e-4)


def test_the_same_question_gets_the_same_answer_again(answerer, data_dir, capsys):
    """The model is in eval mode, also after somebody has trained it. Nothing is printed."""
    answers = []
    for _ in range(4):
        answers.append(answerer(data_dir / "images/0000.png", QUESTION))
        answerer.trained.model.train()
    assert answers == answers[:1] * 4 and capsys.readouterr().out == ""


def test_paths_images_and_lists_get_the_same_answers(answerer, data_dir):
    paths = [data_dir / f"images/{number:04d}.png" for number in range(20)]  # more than one batch
    questions = [tiny.QUESTIONS[number % 3] for number in range(20)]
    expected = [answerer(path, question) for path, question in zip(paths, questions, strict=True)]
    assert [answerer(Image.open(path), question) for path, question in zip(paths, questions, strict=True)] == expected
    images = [str(path) if number % 2 else Image.open(path) for number, path in enumerate(paths)]
    check_close(answerer(images, questions), expected)
    check_close(answerer(images[:2], questions[0]), [answerer(path, questions[0]) for path in paths[:2]])
    assert answerer([], QUESTION) == []


def test_the_answers_are_those_of_test_py(answerer, stage_one, data_dir, tmp_path):
    call_script("test.py", "--checkpoint", stage_one / "vqa_checkpoint.pt", "--data-dir", data_dir, "--cache-dir",
                tmp_path / "cache", "--question-only-checkpoint", "None", cwd=tmp_path)
    rows = tiny.read_csv(tmp_path / "output/vqa_test_results.csv")
    answers = answerer([data_dir / row["image_path"] for row in rows], [row["question"] for row in rows])
    assert [answer.text for answer in answers] == [row["prediction"] for row in rows]
    assert [answer.confidence for answer in answers] == pytest.approx([float(row["confidence"]) for row in rows], abs=1e-4)


@pytest.mark.parametrize("beam_size", [1, 3])
@MODEL_CONFIGS
def test_word_probabilities_and_alternatives(config, beam_size, make_answerer, data_dir):
    for answer in make_answerer(**config)([data_dir / f"images/{number:04d}.png" for number in range(3)], QUESTION, beam_size):
        words, probabilities = zip(*answer.word_probabilities, strict=True)
        assert " ".join(words) == f"{answer.text} <end>" and math.prod(probabilities) == pytest.approx(answer.confidence)
        texts, confidences = zip(*answer.alternatives, strict=True)
        assert answer.text not in texts and len(set(texts)) == len(texts) >= 4
        assert all(0 < confidence < 1 for confidence in confidences) and list(confidences) == sorted(confidences)[::-1]
        assert (answer.gate is None) == (config == {"fusion": "concat"})


def wrong_image(mode, size=(4, 4), **info):
    image = Image.new(mode, size)
    image.info |= info
    return image


PICTURE = "images/0000.png"


@pytest.mark.parametrize("asked, message", [
    (([PICTURE, "images/none.png"], QUESTION), "image images/none.png: no such file$"),
    (([PICTURE, "metadata.csv"], QUESTION), "image metadata.csv cannot be read as an image"),
    (([PICTURE, 3], QUESTION), "an image is a int: give a path or a Pillow image"),
    (("", QUESTION), "image : no such file$"),
    ((wrong_image("L", (0, 0)), QUESTION), "0 x 0 pixels: it is empty"),
    ((wrong_image("RGB", (0, 9)), QUESTION), "0 x 9 pixels: it is empty"),
    ((wrong_image("L", (5, 0)), QUESTION), "5 x 0 pixels: it is empty"),
    ((wrong_image("L", transparency=None), QUESTION), "cannot be read as an image: 'NoneType' object"),
    ((wrong_image("1", transparency=b"a"), QUESTION), "cannot be read as an image: 'bytes' object"),
    (([PICTURE], [QUESTION] * 2), "1 images and 2 questions"),
    *(((PICTURE, question), "the question .* is empty or no valid UTF-8 text") for question in (
        " ", "\ud800 what", None, 3, b"what", [None], [b"what"])),
    *(((PICTURE, QUESTION, beam_size), f"beam_size is {beam_size!r}, not an integer from 1 to 256")
      for beam_size in (0, -1, 257, 10 ** 6, 1.5, None, "3")),
])
def test_a_mistake_is_named(asked, message, answerer, data_dir, monkeypatch):
    monkeypatch.chdir(data_dir)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        answerer(*asked)


def test_a_device_that_is_no_text_is_named(stage_one):
    with pytest.raises(ValueError, match="--device None is no device"):
        load(stage_one / "vqa_checkpoint.pt", None)


@pytest.mark.parametrize("checkpoint", [None, 3, b"a.pt", ["a.pt"]])
def test_a_checkpoint_that_is_no_path_is_named(checkpoint):
    with pytest.raises(ValueError, match=f"the checkpoint is {re.escape(repr(checkpoint))}: give a path or hf:USER/REPO"):
        load(checkpoint)


# ---- the trained model that comes with the repository, made by demo/shrink_checkpoint.py

def test_the_committed_checkpoint_fits_the_committed_encoders_and_knows_the_example():
    path = ROOT / "demo/vqa_checkpoint.pt"
    weights = read_checkpoint(path)["weights"]
    assert {tensor.dtype for tensor in weights.values()} == {torch.float16} and path.stat().st_size < 6e6
    answerer = load(path)  # refuses encoders with other fingerprints
    assert {parameter.dtype for parameter in answerer.trained.model.parameters()} == {torch.float32}
    sky, dog = answerer([ROOT / "demo/example.jpg"] * 2, ["What is up in the sky?", "What is the dog doing?"])
    assert sky.text == "a small yellow bird" and sky.confidence > 0.5 and dog.text.startswith("sleeping")


def test_the_lines_of_the_readme_run():
    block, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", block], cwd=ROOT, text=True, capture_output=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    assert result.stdout.startswith("a small yellow bird 0.")


def test_one_question_loads_no_library_that_it_does_not_need(stage_one, data_dir, tmp_path):
    """Tables, figures and the vote of the nearest questions are for whole splits: they took half a second of every question."""
    code = ("import sys, test\nfrom common import settings\nsettings.run(test.main, test.Config)\n"
            "print('heavy:', sorted({'pandas', 'matplotlib.figure', 'matplotlib.pyplot', 'sklearn'} & set(sys.modules)))")
    flags = ["--checkpoint", stage_one / "vqa_checkpoint.pt", "--image", data_dir / "images/0000.png", "--question", QUESTION,
             "--results-dir", tmp_path]
    command = [sys.executable, "-c", code, *map(str, flags)]
    result = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=True)
    assert "answer: " in result.stdout and result.stdout.endswith("heavy: []\n")
