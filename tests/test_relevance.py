"""What an answer depends on: numbers that can be computed another way, and a map that finds what the question is about."""
import math

import numpy as np
import pytest
from conftest import MODEL_CONFIGS, ROOT
from PIL import Image, ImageFilter

from demo.check_relevance import check_scene
from demo.make_scenes import image_ids_of
from evaluation import drawing
from evaluation.generation import Answer, load
from evaluation.relevance import Explanation, explain, log_probabilities, windows_of

QUESTION = "What do you  see in the image?"
WORDS = QUESTION.split()


@pytest.mark.parametrize("beam_size", [1, 3])
@MODEL_CONFIGS
def test_relevance_is_the_fall_of_the_answers_log_probability(config, beam_size, make_answerer, data_dir):
    """Each number is computed again from an image or a question that was changed by hand."""
    answerer, path = make_answerer(**config), data_dir / "images/0001.png"
    explanation = explain(answerer, path, QUESTION, beam_size)
    answer, view = explanation.answer, explanation.view
    assert answer == answerer(path, QUESTION, beam_size) and view.size == (32, 32)
    pixels = answerer.decode([path])
    assert np.array_equal(np.asarray(view), pixels[0].permute(1, 2, 0))

    def fall(image, question):
        return math.log(answer.confidence) - log_probabilities(answerer, answer, answerer.decode([image]), [question]).item()

    assert fall(path, QUESTION) == pytest.approx(0, abs=1e-4)
    blurred = view.filter(ImageFilter.GaussianBlur(32 / 6))
    falls = []
    for left, top, right, bottom in ((8, 0, 16, 8), (12, 0, 20, 8), (8, 0, 16, 4), (12, 0, 20, 4)):  # they hide pixel (13, 2)
        hidden = view.copy()
        hidden.paste(blurred.crop((left, top, right, bottom)), (left, top))
        falls.append(fall(hidden, QUESTION))
    sees_image, reads_question = config.get("inputs") != "question", config.get("inputs") != "image"
    assert explanation.image_relevance.shape == (32, 32) and explanation.image_relevance.any() == sees_image
    assert explanation.image_relevance[2, 13] == pytest.approx(np.mean(falls), abs=1e-4)

    words, nats = zip(*explanation.question_words, strict=True)
    assert list(words) == WORDS and any(nats) == reads_question
    assert nats[3] == pytest.approx(fall(path, "What do you in the image?"), abs=1e-4)


@pytest.mark.parametrize("height, width", [(32, 32), (96, 96), (224, 224), (7, 5), (30, 336)])
def test_each_pixel_is_hidden_four_times(height, width):
    hidden = np.zeros((height, width))
    for window in windows_of(height, width):
        hidden[window] += 1
    assert (hidden == 4).all() and len(windows_of(height, width)) == 81


@pytest.mark.parametrize("question, words", [("What?", 1), ("what is " * 500, 1000), ("图片左边是什么东西？" * 9, 1)],
                         ids=["one word", "long", "Chinese"])
def test_a_question_of_one_word_and_a_very_long_one_are_explained(question, words, make_answerer, data_dir):
    """Words beyond --question-max-len are never read: they get 0, and cost no time."""
    explanation = explain(make_answerer(), data_dir / "images/0001.png", question)
    nats = [nats for _, nats in explanation.question_words]
    assert len(nats) == words and nats[0] != 0 and not any(nats[32:])
    assert drawing.draw_explanation(explanation).height < 2000


def test_the_drawn_map_is_strongest_where_the_relevance_is():
    relevance = np.zeros((96, 96))
    relevance[72:, :24] = 4.0
    explanation = Explanation(Answer("a cat", 0.5, None, [("a", 0.8), ("cat", 0.7), ("<end>", 0.9)]),
                              Image.new("RGB", (96, 96), "#808080"), relevance, [("What?", -0.04)])
    drawn = np.asarray(drawing.draw_explanation(explanation)).astype(int)
    panel = drawn[28:324, 354:650]
    colourful = panel[..., 0] - panel[..., 2]  # red more than blue: orange
    assert colourful[266:, :28].min() > 100 and colourful[:140].max() < 30 and colourful[:, 140:].max() < 30


@pytest.mark.parametrize("strongest, other, expected", [
    (4.0, 0.3, ["2.3 nats leave a tenth"]), (0.1, 0.6, ["no single place matters", "need not be the most probable"]),
    (0.0, 0.5, ["no part of it changes"])])
def test_the_captions_say_what_the_map_and_the_beam_show(strongest, other, expected, monkeypatch):
    """A map without color, and another answer with a greater probability, looked like faults."""
    texts, write_text = [], drawing.write_text
    monkeypatch.setattr(drawing, "write_text", lambda *call: (texts.append(call[3]), write_text(*call))[1])
    answer = Answer("a cat", 0.5, 0.4, [("a", 0.8), ("cat", 0.7), ("<end>", 0.9)], [("a dog", other)])
    relevance = np.full((96, 96), strongest)
    drawing.draw_explanation(Explanation(answer, Image.new("RGB", (96, 96)), relevance, [("What?", 1)]))
    sentences = ["2.3 nats leave a tenth", "no single place matters", "no part of it changes", "need not be the most probable"]
    assert [text for text in sentences if text in " ".join(texts)] == expected


def test_the_map_finds_the_thing_that_the_question_is_about():
    """The first scenes of the demo's test split; docs/scores.md has the number of all, by demo/check_relevance.py."""
    answerer = load(ROOT / "demo/vqa_checkpoint.pt")
    cases = [case for image_id in image_ids_of("test")[:20] for case in check_scene(answerer, image_id)]
    assert len(cases) > 8 and np.mean([case.found for case in cases]) >= 0.8 > 4 * np.mean([case.chance for case in cases])
