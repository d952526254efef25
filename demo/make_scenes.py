"""Draws the demo's cartoon scenes and writes them, with questions and answers, in the file layout of VQA v2.

Reads the settings of the encoders' pretraining. Writes OUTPUT_DIR/train2014/COCO_train2014_%012d.jpg, the two JSON files
of VQA v2 (questions, and annotations with ten simulated answers each), and true_answers.json: for each question the usual
phrase for the true scene. Prints the number of questions of each kind. No image that mini_vqa_v2.py, with its default
split, puts into training shows one of `world.HELD_OUT`.
6,000 scenes take about a quarter of a minute on two cores. The same seed gives the same bytes with any number of workers.
If the same settings and the same code wrote the files that are there, nothing is drawn again. Of the images only names
and sizes are compared: a changed byte is not noticed.
"""
import hashlib
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import PIL
from tqdm.contrib.concurrent import process_map

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository's root, for imports

import mini_vqa_v2
from common import settings
from common.files import atomic_write, file_lock, write_json
from demo.drawing import draw_scene
from demo.questions import ask
from demo.world import belongs_to_demo, change_one_fact, family_of, sample_scene, without_held_out

ROOT = Path(__file__).resolve().parents[1]
PRETRAINING = ROOT / "demo/encoders/settings_clip.json"
# what the files depend on, besides the settings
CODE = [ROOT / name for name in ("mini_vqa_v2.py", "demo/make_scenes.py", "demo/world.py", "demo/drawing.py",
                                 "demo/questions.py")]
SUBSET = "train2014"
IMAGES = f"{SUBSET}/COCO_{SUBSET}_*.jpg"
JPEG_QUALITY = 88
LICENSE = {"url": "https://opensource.org/license/mit", "name": "MIT: drawn by demo/make_scenes.py"}


@dataclass
class Config:
    output_dir: str = "demo/vqa_v2"
    """folder for the two JSON files and the images"""
    num_scenes: int = 6000
    """number of images, each with about five questions"""
    workers: int = 2
    """processes that draw"""
    seed: int = 42
    """another seed gives other scenes, questions and answers"""


def demo_scene(seed, image_id, banned=frozenset()):
    """The scene of one demo image, and the generator for its questions. Scenes with a `banned` description are skipped."""
    rng = random.Random(f"{seed}:{image_id}")
    while True:
        scene = sample_scene(rng)
        if is_training_image(image_id):
            scene = without_held_out(scene, rng)
        if belongs_to_demo(scene) and scene.description() not in banned:
            return scene, rng


def split_of(image_id):
    """The split that mini_vqa_v2.py gives the image with its default settings: "train", "val" or "test"."""
    rules = mini_vqa_v2.Config()
    return mini_vqa_v2.choose_split(image_id, rules.seed, rules.val_fraction, rules.test_fraction)


def is_training_image(image_id):
    return split_of(image_id) == "train"


def image_ids_of(split):
    """The images of one split of the demo's data, in order."""
    return [image_id for image_id in range(1, Config.num_scenes + 1) if split_of(image_id) == split]


def banned_descriptions(seed, image_ids, workers=1):
    """Descriptions (frozenset of str) of demo scenes whose mirror image was in the pretraining set.

    Pretraining shows every scene mirrored too, and a mirror image may fall on the demo's side of the hash. The
    pretraining scenes are sampled again, without drawing them, from the settings stored with the encoders.
    """
    pretraining = json.loads(PRETRAINING.read_text(encoding="utf-8"))
    mirrored = process_map(partial(mirrored_descriptions, pretraining["seed"]), range(pretraining["num_families"]),
                           max_workers=workers, chunksize=250, desc="pretraining's scenes", unit=" families")
    seen, banned = set().union(*mirrored), set()
    described = dict(zip(image_ids, process_map(partial(demo_description, seed), image_ids, max_workers=workers,
                                                chunksize=250, desc="the demo's scenes", unit=" scenes"), strict=True))
    while clashes := seen & set(described.values()):
        banned |= clashes
        described |= {image_id: demo_description(seed, image_id, banned)
                      for image_id, description in described.items() if description in clashes}
    return frozenset(banned)


def mirrored_descriptions(seed, number):
    """Descriptions of the mirrored scenes of one pretraining family that are on the demo's side of the hash."""
    mirrored = [scene.mirrored() for scene in family_of(seed, number)]
    return [scene.description() for scene in mirrored if belongs_to_demo(scene)]


def demo_description(seed, image_id, banned=frozenset()):
    return demo_scene(seed, image_id, banned)[0].description()


def make_questions(image_id, scene, rng):
    """The questions about a scene, as `questions.ask` gives them. No annotator of a training image names a held-out color."""
    def misread(scene, rng):
        changed = change_one_fact(scene, rng)
        return without_held_out(changed, rng) if is_training_image(image_id) else changed
    return ask(scene, rng, misread=misread)


def make_image(image_id, seed, image_dir, banned):
    """Draw and save one scene. Returns its questions."""
    scene, rng = demo_scene(seed, image_id, banned)
    draw_scene(scene).save(image_dir / f"COCO_{SUBSET}_{image_id:012d}.jpg", "JPEG", quality=JPEG_QUALITY)
    return make_questions(image_id, scene, rng)


def official_entries(image_id, question_id, item):
    """The entries of one question in VQA v2's questions file and annotations file."""
    counts = Counter(item["answers"])
    usual = min(counts, key=lambda text: (-counts[text], text))
    answers = [{"answer": text, "answer_id": number, "answer_confidence": "yes" if counts[text] > 1 else "maybe"}
               for number, text in enumerate(item["answers"], start=1)]
    kind = "yes/no" if usual in ("yes", "no") else "number" if usual.isdigit() else "other"
    return ({"image_id": image_id, "question": item["question"], "question_id": question_id},
            {"question_type": item["question_type"], "multiple_choice_answer": usual, "answers": answers,
             "image_id": image_id, "answer_type": kind, "question_id": question_id})


def main(cfg):
    settings.check_ranges(cfg, num_scenes=settings.COUNT, workers=(1, 256))
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / ".lock", f"another run is writing to --output-dir {folder}: wait for it, or name another"):
        if is_finished(folder, cfg):
            print(f"{folder} holds these {cfg.num_scenes} scenes already: nothing is drawn")
        else:
            write_scenes(folder, cfg)


def is_finished(folder, cfg):
    """Whether the last run in `folder` ended, had these settings and this code, and left that many images."""
    try:
        state = (folder / "finished.txt").read_bytes()
    except OSError:  # there is none, or it cannot be read
        return False
    return state == state_of(folder, cfg).encode() and len(list(folder.glob(IMAGES))) == cfg.num_scenes


def write_scenes(folder, cfg):
    """Draw all scenes and write the files of the data set; finished.txt is the last one."""
    image_dir, finished = folder / SUBSET, folder / "finished.txt"
    if finished.is_dir():
        raise ValueError(f"{finished} is a folder: remove it, or choose another --output-dir")
    image_dir.mkdir(parents=True, exist_ok=True)
    finished.unlink(missing_ok=True)
    for stale in folder.glob(IMAGES):
        stale.unlink()
    image_ids = range(1, cfg.num_scenes + 1)
    banned = banned_descriptions(cfg.seed, image_ids, cfg.workers)
    draw = partial(make_image, seed=cfg.seed, image_dir=image_dir, banned=banned)
    asked = process_map(draw, image_ids, max_workers=cfg.workers, chunksize=32, desc="scenes", unit=" scenes")
    if banned:
        print(f"scenes drawn anew, because pretraining saw their mirror image: {len(banned)}")
    entries = [official_entries(image_id, 1000 * image_id + number, item)
               for image_id, items in zip(image_ids, asked, strict=True) for number, item in enumerate(items)]
    questions, annotations = zip(*entries, strict=True)
    head = {"info": {"description": "Cartoon scenes for a demonstration; not VQA v2", "version": "1.0"},
            "license": LICENSE, "data_subtype": SUBSET, "data_type": "mscoco"}
    write_compact(folder / f"v2_OpenEnded_mscoco_{SUBSET}_questions.json",
                  head | {"task_type": "Open-Ended", "questions": questions})
    write_compact(folder / f"v2_mscoco_{SUBSET}_annotations.json", head | {"annotations": annotations})
    write_json(folder / "true_answers.json", {str(1000 * image_id + number): item["usual"] for image_id, items in
                                              zip(image_ids, asked, strict=True) for number, item in enumerate(items)})
    with atomic_write(finished) as temporary:  # last: an interrupted run has none
        temporary.write_text(state_of(folder, cfg), encoding="utf-8")
    kinds = Counter(item["kind"] for items in asked for item in items)
    print(f"{len(asked)} images and {kinds.total()} questions with ten answers each in {folder}")
    print("kinds of questions (demo/questions.py): " + ", ".join(f"{kind} {number}" for kind, number in kinds.most_common()))


def state_of(folder, cfg):
    """Hash (str) of settings, code, Pillow, JSON files, and of the images' names and sizes. Their bytes are not read."""
    code = [path.read_text(encoding="utf-8") for path in (*CODE, PRETRAINING)]
    files = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in sorted(folder.glob("*.json"))]
    files += [(path.name, path.stat().st_size) for path in sorted(folder.glob(IMAGES))]
    return hashlib.sha256(repr([cfg.num_scenes, cfg.seed, PIL.__version__, code, files]).encode()).hexdigest() + "\n"


def write_compact(path, value):
    """Write JSON without indentation, like the official files."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(value) + "\n", encoding="utf-8")


if __name__ == "__main__":
    settings.run(main, Config)
