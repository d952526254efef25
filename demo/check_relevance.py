"""Checks the relevance map on scenes whose truth is known: does it peak on the thing that the question is about?

Reads a checkpoint of the demo. Draws the scenes of one split again, so it needs no data set. Counts right answers to
questions about one thing: question and label together name exactly one, such as "What is on the left?" with "a big red kite",
or "Where is the dog?" with "in the middle". Prints per kind of question how often the peak of the map lies on the box of
this thing, and beside it the chance level: the mean share of the image that the box takes.
"""
import io
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

import numpy as np
from PIL import Image
from tqdm import tqdm

import mini_vqa_v2
from common import settings
from common.labels import is_agreed, is_long, majority_answer
from demo import make_scenes
from demo.drawing import draw_with_boxes
from demo.make_scenes import demo_scene, image_ids_of, make_questions
from evaluation.generation import load
from evaluation.relevance import explain
from vocab import normalise


@dataclass
class Config:
    checkpoint: str = "demo/vqa_checkpoint.pt"
    """a model of the demo"""
    split: Literal["val", "test"] = "test"
    """the scenes to check; the windows of the map were chosen on val"""
    max_scenes: int = 1000
    """check at most so many scenes of the split, the first ones"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps"""


@dataclass
class Case:
    """A right answer to a question about one thing."""

    kind: str     # of the question
    found: bool   # the peak of the map lies on the thing's box
    chance: float  # share of the image that the box takes, 0 to 1


def main(cfg):
    settings.check_ranges(cfg, max_scenes=settings.COUNT)
    answerer, cases = load(cfg.checkpoint, cfg.device), []
    for image_id in tqdm(image_ids_of(cfg.split)[:cfg.max_scenes], "scenes", unit=" scenes"):
        cases += check_scene(answerer, image_id)
    print("kind of question  right answers  peak on the thing  chance")
    for kind in [*sorted({case.kind for case in cases}), "all"]:
        found, chance = np.array([(case.found, case.chance) for case in cases if kind in (case.kind, "all")]).T
        print(f"{kind:16} {len(found):14} {found.mean():18.1%} {chance.mean():7.1%}")


def check_scene(answerer, image_id):
    """[Case] of the right answers to questions about one thing in a scene of the demo."""
    scene, rng = demo_scene(make_scenes.Config.seed, image_id)
    image, boxes = draw_with_boxes(scene)
    boxes = {thing.kind: np.array(box) / (*image.size, *image.size) for thing, box in boxes.items()}  # in shares of the image
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=make_scenes.JPEG_QUALITY)
    image, cases = Image.open(jpeg), []
    for item in make_questions(image_id, scene, rng):
        named = boxes.keys() & re.findall("[a-z]+", f"{item['question']} {label_of(item)}".lower())
        if len(named) == 1 and answerer(image, item["question"]).text == label_of(item):
            left, top, right, bottom = boxes[named.pop()]
            x, y = peak(explain(answerer, image, item["question"]).image_relevance)
            cases.append(Case(item["kind"], left <= x <= right and top <= y <= bottom, (right - left) * (bottom - top)))
    return cases


def label_of(item):
    """The label of one of `make_questions`, in the spelling of an answer; None if mini_vqa_v2.py does not keep the question."""
    rules, (label, agreement) = mini_vqa_v2.Config(), majority_answer(item["answers"])
    return normalise(label) if is_long(label, rules) and is_agreed(agreement, len(item["answers"]), rules) else None


def peak(relevance):
    """The middle (x, y) of the highest place of a map (height, width), in shares of width and height."""
    rows, columns = np.nonzero(relevance >= relevance.max() - 1e-6)  # equal sums may differ in their last digits
    return (columns.mean() + 0.5) / relevance.shape[1], (rows.mean() + 0.5) / relevance.shape[0]


if __name__ == "__main__":
    settings.run(main, Config)
