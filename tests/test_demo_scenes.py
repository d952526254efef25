"""The embedded default's data and encoders: official layout, determinism, question design, disjoint pretraining."""
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from PIL import Image

from demo import captions, clip_training, gpt2_training, questions, world
from demo.drawing import draw_scene
from demo.make_scenes import banned_descriptions, demo_scene

ROOT = Path(__file__).parents[1]
ENCODERS = ROOT / "demo" / "encoders"
SEED, NUM_SCENES = 42, 600  # the first pictures of the demo's own set: drawn by seed and number, whatever the total
BLEU = sacrebleu.BLEU(lowercase=True, effective_order=True)


@cache
def bleu(answer, label):
    return BLEU.sentence_score(answer, [label]).score


def make_scenes(folder, workers, hash_seed, num_scenes=40):
    environment = dict(os.environ, PYTHONHASHSEED=hash_seed)
    command = [sys.executable, "demo/make_scenes.py", "--output-dir", str(folder), "--num-scenes", str(num_scenes),
               "--workers", str(workers)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vqa_v2")
    return folder, make_scenes(folder, workers=2, hash_seed="1")


@pytest.fixture(scope="module")
def asked():
    """(picture, item) for the questions of the demo's first scenes."""
    found = []
    for image_id in range(1, NUM_SCENES + 1):
        scene, rng = demo_scene(SEED, image_id)
        found += [(image_id, item) for item in questions.ask(scene, rng)]
    return found


@pytest.fixture(scope="module")
def kept(asked):
    """Rows that the filter keeps: (picture, question type, label, its ten answers)."""
    rows = []
    for image_id, item in asked:
        counts = Counter(item["answers"])
        label = min(counts, key=lambda text: (-counts[text], text))
        if len(label.split()) >= 3 and counts[label] >= 3:
            rows.append((image_id, item["question_type"], label, item["answers"]))
    return rows


def test_the_same_bytes_whatever_the_hash_seed_and_workers(written, tmp_path):
    assert make_scenes(tmp_path, workers=1, hash_seed="2") == written[1]


def test_official_layout(written):
    folder, files = written
    asked = json.loads(files["v2_OpenEnded_mscoco_train2014_questions.json"])
    given = json.loads(files["v2_mscoco_train2014_annotations.json"])
    assert {"info", "license", "data_subtype", "data_type", "questions", "task_type"} <= set(asked)
    assert {"info", "license", "data_subtype", "data_type", "annotations"} <= set(given)
    ids = [question["question_id"] for question in asked["questions"]]
    assert len(set(ids)) == len(ids) and ids == [annotation["question_id"] for annotation in given["annotations"]]
    for question, annotation in zip(asked["questions"], given["annotations"], strict=True):
        assert set(question) == {"image_id", "question", "question_id"}
        assert set(annotation) == {"question_type", "multiple_choice_answer", "answers", "image_id", "answer_type",
                                   "question_id"}
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        assert all(answer["answer"] and answer["answer_confidence"] in ("yes", "maybe", "no")
                   for answer in annotation["answers"])
        assert annotation["answer_type"] in ("yes/no", "number", "other")
        assert f"train2014/COCO_train2014_{question['image_id']:012d}.jpg" in files
    assert sum(name.endswith(".jpg") for name in files) == 40


def test_pictures_decode_and_vary_in_size(written):
    sizes = Counter()
    for path in sorted((written[0] / "train2014").iterdir()):
        with Image.open(path) as picture:
            picture.load()
            sizes[picture.size] += 1
            assert np.asarray(picture).std() > 15, f"{path.name} is nearly blank"
    assert len(sizes) >= 4 and any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_kinds_of_things_and_questions(asked):
    drawn = Counter(thing.kind for number in range(1, 200) for thing in demo_scene(SEED, number)[0].things)
    assert len(drawn) >= 12 and min(drawn.values()) > 10
    assert len(world.COLORS) == 8
    kinds = defaultdict(set)
    for _, item in asked:
        kinds[item["kind"]].add(item["question"])
    assert len(kinds) >= 8
    assert sum(len(wordings) > 1 for wordings in kinds.values()) >= 8
    assert "none of the above" not in {item["question_type"] for _, item in asked}


def test_share_of_short_and_ambiguous_questions(asked):
    labels = [Counter(item["answers"]).most_common(1)[0] for _, item in asked]
    short = sum(len(text.split()) < 3 for text, _ in labels) / len(labels)
    ambiguous = sum(len(text.split()) >= 3 and givers < 3 for text, givers in labels) / len(labels)
    assert 0.35 <= short <= 0.45
    assert 0.01 <= ambiguous <= 0.10


def test_one_annotator_is_good_and_priors_are_poor(kept):
    """The room between floor and ceiling that the demo's table needs, estimated without a model."""
    annotator, prior, by_type = [], [], defaultdict(Counter)
    train = [row for row in kept if row[0] % 3]
    for _, kind, label, _ in train:
        by_type[kind][label] += 1
    usual = Counter(label for _, _, label, _ in train).most_common(1)[0][0]
    constant = []
    for image_id, kind, label, answers in kept:
        others = list(answers)
        others.remove(label)
        annotator.append(sum(bleu(answer, label) for answer in others) / len(others))
        if image_id % 3 == 0:
            constant.append(bleu(usual, label))
            prior.append(bleu(by_type[kind].most_common(1)[0][0] if by_type[kind] else usual, label))
    assert 70 <= np.mean(annotator) <= 90
    assert max(np.mean(prior), np.mean(constant)) <= 35


def test_no_demo_scene_is_described_in_pretraining():
    demo = {demo_scene(SEED, number)[0].description() for number in range(1, 1500)}
    families = [scene for number in range(300) for scene in world.family_of(7, number)]
    assert not demo & {scene.description() for scene in families}
    assert all(world.belongs_to_demo(demo_scene(SEED, number)[0]) for number in range(1, 300))
    assert not any(world.belongs_to_demo(scene) for scene in families)
    # the rule is what keeps them apart: without it simple scenes would meet
    anything = [world.sample_scene(random.Random(number)) for number in range(1500)]
    assert 0.15 < np.mean([world.belongs_to_demo(scene) for scene in anything]) < 0.35


def test_no_demo_scene_is_shown_in_a_mirror_by_pretraining():
    """Every family is also seen in a mirror, of which the hash knows nothing: such scenes are exchanged for others."""
    numbers = range(1, 1500)
    mirrored = {scene.mirrored().description() for number in range(30_000) for scene in world.family_of(7, number)}
    banned = banned_descriptions(SEED, numbers)
    assert not mirrored & {demo_scene(SEED, number, banned)[0].description() for number in numbers}
    assert banned == mirrored & {demo_scene(SEED, number)[0].description() for number in numbers}
    left = world.Thing("cat", "red", None, "big", "sitting", "ground", 0)
    scene = world.Scene("day", "clear", "meadow", (left, dataclasses.replace(left, kind="dog", column=1)))
    assert [thing.column for thing in scene.mirrored().things] == [2, 1]
    assert set(captions.statements(scene.mirrored())) == {captions.mirrored(text) for text in captions.statements(scene)}


def test_captions_do_not_use_the_answers_templates(kept):
    labels = {label for _, _, label, _ in kept}
    texts = {text for number in range(300) for scene in world.family_of(7, number)
             for text in captions.statements(scene)}
    assert len(labels) > 200 and len(texts) > 1000
    assert not any(label in text for label in labels for text in texts)


def test_captions_tell_a_family_apart():
    """A changed fact must change the captions, or the contrast would ask for what cannot be seen."""
    for number in range(100):
        first, *changed = world.family_of(3, number)
        for scene in changed:
            same_captions = set(captions.statements(scene)) == set(captions.statements(first))
            assert same_captions == (scene.description() == first.description())


def test_captions_stay_within_vocabulary_and_context():
    words = captions.vocabulary()
    assert len(words) == len(set(words)) < 300 and words[-1] == "<end>"
    longest = 0
    for number in range(200):
        for scene in world.family_of(4, number):
            for text in captions.statements(scene):
                assert set(text.split()) <= set(words)
                longest = max(longest, len(text.split()))
    assert clip_training.JOINED * (longest + 1) + 1 <= captions.CONTEXT_LENGTH


def mirrored_entry(texts, columns):
    """What is true of a picture's mirror image, given what is true of it and of its columns."""
    return ([captions.mirrored(text) for text in texts],
            [[captions.mirrored(text) for text in column] for column in columns[::-1]])


def test_a_mirrored_scene_makes_the_mirrored_statements_true():
    for number in range(40):
        for scene in world.family_of(3, number):
            things = tuple(dataclasses.replace(thing, column=2 - thing.column) for thing in scene.things)
            turned = dataclasses.replace(scene, things=things)
            assert {captions.mirrored(text) for text in captions.statements(scene)} == set(captions.statements(turned))
            texts, columns = mirrored_entry([], captions.column_statements(scene))
            assert [sorted(column) for column in columns] == [sorted(column) for column in captions.column_statements(turned)]


def test_a_batch_knows_which_captions_are_true():
    """Truth as the batch gives it equals truth looked up caption by caption, in mirrored families too."""
    rendered = [clip_training.render_family(number, seed=1) for number in range(4)]
    scenes = clip_training.Scenes(rendered)
    flipped = np.repeat(np.random.default_rng(0).random(4) < 0.5, clip_training.FAMILY)  # a batch draws this first
    assert flipped.any() and not flipped.all()
    flat = [mirrored_entry(*entry) if flip else entry
            for entry, flip in zip((entry for _, family in rendered for entry in family), flipped, strict=True)]
    rows = np.arange(len(flat))
    pixels, (statements, joined, looks) = scenes.batch(rows, np.random.default_rng(0))
    words = captions.vocabulary()
    assert pixels.shape == (16, 3, clip_training.IMAGE_SIZE, clip_training.IMAGE_SIZE)
    owners = {id(statements): [texts for texts, _ in flat], id(joined): [texts for texts, _ in flat],
              id(looks): [column for _, columns in flat for column in columns]}
    for part in (statements, joined, looks):
        ids, truth = part
        for number, row in enumerate(ids.tolist()):
            text = " ".join(words[word] for word in row if word).removeprefix("<start> ").removesuffix(" <end>")
            expected = [all(one in texts for one in text.split(" and ")) for texts in owners[id(part)]]
            assert truth[:, number].tolist() == expected and any(expected)


def test_drawing_depends_on_every_fact():
    """Each kind of change is visible in the pixels."""
    for number in range(60):
        first, *changed = world.family_of(5, number)
        picture = np.asarray(draw_scene(first)).astype(int)
        assert (np.asarray(draw_scene(first)) == picture).all()
        for scene in changed:
            if scene.description() != first.description():
                assert np.abs(np.asarray(draw_scene(scene)).astype(int) - picture).max() > 20


def test_gpt2_texts_are_about_pretraining_scenes_only(monkeypatch):
    partitions = []

    def spy(rng, demo):
        partitions.append(demo)
        return world.sample_partition(rng, demo)
    monkeypatch.setattr(gpt2_training, "sample_partition", spy)
    texts = gpt2_training.question_texts(5, seed=1)
    assert partitions == [False] * 5
    assert all(text.count("?") == gpt2_training.QUESTIONS_PER_TEXT for text in texts)


def test_encoders_load_offline_and_are_small(monkeypatch):
    """Through open_clip's and transformers' own loaders, with no network and nothing left random."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import open_clip
    from transformers import AutoTokenizer, GPT2Model
    files = [path for path in ENCODERS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    clip = open_clip.create_model(f"local-dir:{ENCODERS / 'clip'}", require_pretrained=True).eval()
    assert isinstance(clip.visual, open_clip.transformer.VisionTransformer) and clip.visual.attn_pool is None
    assert len(clip.visual.transformer.resblocks) >= 4
    assert clip.visual.preprocess_cfg["resize_mode"] == "squash"
    gpt2, report = GPT2Model.from_pretrained(ENCODERS / "gpt2", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and len(gpt2.h) >= 4
    tokenizer = AutoTokenizer.from_pretrained(ENCODERS / "gpt2")
    assert tokenizer.eos_token == gpt2_training.END and len(tokenizer) < 1000
    question = "Where is the kite in this picture?"
    assert tokenizer.decode(tokenizer(question)["input_ids"]) == question


def test_clip_tells_pictures_by_their_captions():
    """The shipped CLIP, through open_clip's own forward and tokenizer, finds new pictures within their families."""
    import open_clip
    name = f"local-dir:{ENCODERS / 'clip'}"
    clip = open_clip.create_model(name, require_pretrained=True).eval()
    held_out = clip_training.Scenes([clip_training.render_family(number, seed="a test") for number in range(25)])
    assert clip_training.retrieval_accuracy(clip, held_out) > 0.5  # chance: 0.25
    pixels = (torch.from_numpy(held_out.pixels[:8]).float() / 255 - clip_training.MEAN) / clip_training.STD
    ours, _ = clip_training.encode_images(clip, pixels)
    torch.testing.assert_close(ours, clip.encode_image(pixels, normalize=True))
    ids = open_clip.get_tokenizer(name)(["car red-colored ground-left"])
    words = captions.vocabulary()
    spelled = [words[word] for word in ids[0].tolist() if word]
    assert spelled == ["<start>", "car", "red-colored", "ground-left", "<end>"]
    short = ids[:, :int((ids != 0).sum())]
    torch.testing.assert_close(clip_training.encode_captions(clip, short), clip.encode_text(ids, normalize=True))
