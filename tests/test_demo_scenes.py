"""The demo's data and encoders: file layout, determinism, questions, and that pretraining never uses a scene of the demo."""
import dataclasses
import json
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
import sacrebleu
import torch
from conftest import ROOT
from PIL import Image

from common.files import file_lock
from demo import make_scenes, world
from demo.drawing import draw_scene, draw_with_boxes
from demo.make_scenes import banned_descriptions, demo_scene, is_training_image, make_questions
from demo.pretraining import captions, clip_training, gpt2_training

ENCODERS = ROOT / "demo" / "encoders"
SEED, NUM_SCENES = 42, 600  # the first images of the demo's own set
BLEU = sacrebleu.BLEU(lowercase=True, effective_order=True)


@cache
def bleu(answer, label):
    return BLEU.sentence_score(answer, [label]).score


def families(number, seed):
    return [world.family_of(seed, index) for index in range(number)]


@pytest.fixture(scope="module")
def asked():
    """(image id, question) of the demo's first scenes."""
    found = []
    for image_id in range(1, NUM_SCENES + 1):
        found += [(image_id, item) for item in make_questions(image_id, *demo_scene(SEED, image_id))]
    return found


@pytest.fixture(scope="module")
def kept(asked):
    """The rows that the filter of mini_vqa_v2.py keeps: (image id, question type, label, ten answers)."""
    rows = []
    for image_id, item in asked:
        counts = Counter(item["answers"])
        label = min(counts, key=lambda text: (-counts[text], text))
        if len(label.split()) >= 3 and counts[label] >= 3:
            rows.append((image_id, item["question_type"], label, item["answers"]))
    return rows


def test_files_do_not_depend_on_workers_or_hash_seed_and_have_the_layout_of_vqa_v2(run_script, tmp_path):
    def make(folder, workers):
        """The content of all files that make_scenes.py writes, by name."""
        run_script("demo/make_scenes.py", "--output-dir", folder, "--num-scenes", 40, "--workers", workers,
                   PYTHONHASHSEED=str(workers))
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    files = make(tmp_path / "one", workers=2)
    assert files == make(tmp_path / "two", workers=1)
    questions_file = json.loads(files["v2_OpenEnded_mscoco_train2014_questions.json"])
    annotations_file = json.loads(files["v2_mscoco_train2014_annotations.json"])
    assert {"info", "license", "data_subtype", "data_type", "questions", "task_type"} == set(questions_file)
    assert {"info", "license", "data_subtype", "data_type", "annotations"} == set(annotations_file)
    ids = [question["question_id"] for question in questions_file["questions"]]
    assert len(set(ids)) == len(ids) == len(annotations_file["annotations"])
    for question, annotation in zip(questions_file["questions"], annotations_file["annotations"], strict=True):
        assert set(question) == {"image_id", "question", "question_id"}
        assert set(annotation) == {"question_type", "multiple_choice_answer", "answers", "image_id", "answer_type",
                                   "question_id"}
        assert question["question_id"] == annotation["question_id"]
        assert [answer["answer_id"] for answer in annotation["answers"]] == list(range(1, 11))
        assert all(answer["answer"] and answer["answer_confidence"] in ("yes", "maybe", "no")
                   for answer in annotation["answers"])
        assert annotation["answer_type"] in ("yes/no", "number", "other")
        assert f"train2014/COCO_train2014_{question['image_id']:012d}.jpg" in files
    sizes = set()
    for path in sorted((tmp_path / "one/train2014").iterdir()):
        with Image.open(path) as image:
            assert np.asarray(image).std() > 15, f"{path.name} is nearly blank"
            sizes.add(image.size)
    true_answers = json.loads(files["true_answers.json"])
    assert list(map(int, true_answers)) == ids
    usual = [annotation["multiple_choice_answer"] == true_answers[str(annotation["question_id"])]
             for annotation in annotations_file["annotations"]]
    assert 0.9 < np.mean(usual) < 1, "most annotators give the usual phrase for the true scene"
    assert len(files) == 44 and any(w > h for w, h in sizes) and any(w < h for w, h in sizes)


def test_scenes_are_drawn_again_only_if_something_changed_or_is_missing(tmp_path, monkeypatch):
    """A second `make demo` drew all scenes again. An interrupted run must not look finished."""
    monkeypatch.setattr(make_scenes, "banned_descriptions", lambda *arguments: frozenset())

    def make(**changes):
        """Whether the images were drawn."""
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")}
        make_scenes.main(make_scenes.Config(**{"output_dir": str(tmp_path), "num_scenes": 3, "workers": 1, **changes}))
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.jpg")} != before

    image, finished = tmp_path / "train2014/COCO_train2014_000000000002.jpg", tmp_path / "finished.txt"
    assert make() and not make() and not make(workers=2)
    assert make(seed=43) and make(num_scenes=4) and make()
    content = image.read_bytes()
    image.unlink()
    assert make() and image.read_bytes() == content
    image.write_bytes(content[:-1])
    assert make() and image.read_bytes() == content and not make()
    questions = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    questions.write_bytes(questions.read_bytes().replace(b"What", b"Whit"))
    assert make() and b"Whit" not in questions.read_bytes()
    finished.write_bytes(b"\xff\xfe")
    assert make() and not make()
    (tmp_path / "train2014/COCO_train2014_000000000099.jpg").touch()
    finished.write_text(make_scenes.state_of(tmp_path, make_scenes.Config(num_scenes=3)))
    assert make() and len(list(tmp_path.rglob("*.jpg"))) == 3, "a fourth image was taken for one of three scenes"
    monkeypatch.setattr(make_scenes, "CODE", make_scenes.CODE[:-1])
    assert make() and not make()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_scenes, "write_json", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        make(seed=44)
    assert not finished.exists() and make(seed=44)


def test_a_second_run_in_the_same_folder_and_a_folder_named_finished_are_refused(tmp_path):
    """Two runs mixed their images, and finished.txt declared the mixture finished."""
    cfg = make_scenes.Config(output_dir=str(tmp_path), num_scenes=3, workers=1)
    with file_lock(tmp_path / ".lock", ""), pytest.raises(ValueError, match="^another run is writing to --output-dir "):
        make_scenes.main(cfg)
    (tmp_path / "finished.txt").mkdir()
    with pytest.raises(ValueError, match="finished.txt is a folder: remove it, or choose another --output-dir$"):
        make_scenes.main(cfg)
    assert [path.name for path in tmp_path.iterdir()] == ["finished.txt"]


def test_scenes_and_questions_are_varied(asked):
    drawn = Counter(thing.kind for number in range(1, 200) for thing in demo_scene(SEED, number)[0].things)
    assert len(drawn) == len(world.KINDS) and min(drawn.values()) > 10
    wordings = defaultdict(set)
    for _, item in asked:
        wordings[item["kind"]].add(item["question"])
    assert sum(len(texts) > 1 for texts in wordings.values()) >= 8
    assert "none of the above" not in {item["question_type"] for _, item in asked}


def test_the_filter_drops_short_and_ambiguous_answers(asked):
    labels = [Counter(item["answers"]).most_common(1)[0] for _, item in asked]
    assert 0.35 <= np.mean([len(text.split()) < 3 for text, _ in labels]) <= 0.45
    assert 0.01 <= np.mean([len(text.split()) >= 3 and count < 3 for text, count in labels]) <= 0.10


def test_one_annotator_scores_high_and_most_frequent_answers_score_low(kept):
    """The demo's table needs room between floor and ceiling. This estimates both without a model."""
    by_type = defaultdict(Counter)
    for image_id, kind, label, _ in kept:
        if image_id % 3:
            by_type[kind][label] += 1
    most_frequent = sum(by_type.values(), Counter()).most_common(1)[0][0]
    annotator, constant, per_type = [], [], []
    for image_id, kind, label, answers in kept:
        others = list(answers)
        others.remove(label)
        annotator.append(np.mean([bleu(answer, label) for answer in others]))
        if image_id % 3 == 0:
            constant.append(bleu(most_frequent, label))
            per_type.append(bleu(by_type[kind].most_common(1)[0][0] if by_type[kind] else most_frequent, label))
    assert 70 <= np.mean(annotator) <= 90
    assert max(np.mean(per_type), np.mean(constant)) <= 35


def test_no_training_image_shows_a_held_out_color_and_a_sixth_of_the_test_labels_needs_one(asked, kept):
    """904 training answers covered 99.2 % of the test labels: a model that copies answers lost nothing."""
    assert all((thing.color, thing.kind) not in world.HELD_OUT for image_id in range(1, NUM_SCENES + 1)
               if is_training_image(image_id) for thing in demo_scene(SEED, image_id)[0].things)
    held_out = [f" {color} {kind} " for color, kind in world.HELD_OUT]
    annotations = [f" {answer} " for image_id, item in asked if is_training_image(image_id) for answer in item["answers"]]
    assert len(annotations) > 10_000 and not any(phrase in answer for phrase in held_out for answer in annotations)
    training_labels = {label for image_id, _, label, _ in kept if is_training_image(image_id)}
    other_labels = [label for image_id, _, label, _ in kept if not is_training_image(image_id)]
    new = [label for label in other_labels if any(phrase in f" {label} " for phrase in held_out)]
    assert 0.12 < len(new) / len(other_labels) < 0.25 and not training_labels & set(new)
    assert {word for label in new for word in label.split()} <= {word for label in training_labels for word in label.split()}


def test_pretraining_never_uses_a_scene_of_the_demo():
    demo = [demo_scene(SEED, number)[0] for number in range(1, 1500)]
    pretraining = [scene for family in families(300, seed=7) for scene in family]
    assert not {scene.description() for scene in demo} & {scene.description() for scene in pretraining}
    assert all(map(world.belongs_to_demo, demo)) and not any(map(world.belongs_to_demo, pretraining))


def test_the_demo_never_shows_the_mirror_image_of_a_pretraining_scene():
    """The hash does not cover mirror images, which pretraining shows too. Such scenes of the demo are replaced."""
    made_with = json.loads((ENCODERS / "settings_clip.json").read_text())
    mirrored = {scene.mirrored().description() for family in families(made_with["num_families"], made_with["seed"])
                for scene in family}
    numbers = range(1, 6001)  # all scenes of the demo: one of them is such a scene
    banned = banned_descriptions(SEED, numbers)
    assert banned == mirrored & {demo_scene(SEED, number)[0].description() for number in numbers} != set()
    assert not mirrored & {demo_scene(SEED, number, banned)[0].description() for number in numbers}


def test_gpt2_texts_are_about_pretraining_scenes_only(monkeypatch):
    partitions = []

    def spy(rng, demo):
        partitions.append(demo)
        return world.sample_partition(rng, demo)
    monkeypatch.setattr(gpt2_training, "sample_partition", spy)
    texts = gpt2_training.question_texts(5, seed=1)
    assert partitions == [False] * 5
    assert all(text.count("?") == gpt2_training.QUESTIONS_PER_TEXT for text in texts)


def test_captions_contain_no_answer_of_the_demo(kept):
    labels = {label for _, _, label, _ in kept}
    texts = {text for family in families(300, seed=7) for scene in family for text in captions.statements(scene)}
    assert len(labels) > 200 and len(texts) > 1000
    assert not any(label in text for label in labels for text in texts)


def test_every_changed_fact_changes_captions_and_pixels():
    for first, *changed in families(60, seed=5):
        image = np.asarray(draw_scene(first)).astype(int)
        assert (np.asarray(draw_scene(first)) == image).all()
        for scene in changed:
            same = scene.description() == first.description()
            assert same == (set(captions.statements(scene)) == set(captions.statements(first)))
            assert same or np.abs(np.asarray(draw_scene(scene)).astype(int) - image).max() > 20


def test_captions_stay_within_vocabulary_and_context():
    words = captions.vocabulary()
    assert len(words) == len(set(words)) < 300 and words[-1] == "<end>"
    statements = [text.split() for family in families(200, seed=4) for scene in family for text in captions.statements(scene)]
    assert all(set(statement) <= set(words) for statement in statements)
    assert clip_training.JOINED * (max(map(len, statements)) + 1) + 1 <= captions.CONTEXT_LENGTH


def mirrored_texts(texts, columns):
    """The statements of an image and of its columns, for the mirror image."""
    return ([captions.mirrored(text) for text in texts],
            [[captions.mirrored(text) for text in column] for column in columns[::-1]])


def test_mirrored_statements_are_those_of_the_mirrored_scene():
    for scene in [scene for family in families(40, seed=3) for scene in family]:
        mirror = scene.mirrored()
        assert [thing.column for thing in mirror.things] == [2 - thing.column for thing in scene.things]
        texts, columns = mirrored_texts(captions.statements(scene), captions.column_statements(scene))
        assert set(texts) == set(captions.statements(mirror))
        assert [sorted(column) for column in columns] == [sorted(column) for column in captions.column_statements(mirror)]


def test_a_batch_knows_which_captions_are_true():
    """The truth matrices equal a lookup caption by caption, also in mirrored families."""
    rendered = [clip_training.render_family(number, seed=1) for number in range(4)]
    flipped = np.repeat(np.random.default_rng(0).random(4) < 0.5, clip_training.FAMILY)  # a batch draws this first
    assert flipped.any() and not flipped.all()
    flat = [mirrored_texts(*entry) if flip else entry
            for entry, flip in zip((entry for _, family in rendered for entry in family), flipped, strict=True)]
    images, columns = [texts for texts, _ in flat], [column for _, parts in flat for column in parts]
    pixels, contrasts = clip_training.Scenes(rendered).batch(np.arange(len(flat)), np.random.default_rng(0))
    assert pixels.shape == (16, 3, clip_training.IMAGE_SIZE, clip_training.IMAGE_SIZE)
    words = captions.vocabulary()
    for (ids, truth), owners in zip(contrasts, (images, images, columns), strict=True):
        for number, row in enumerate(ids.tolist()):
            text = " ".join(words[word] for word in row if word).removeprefix("<start> ").removesuffix(" <end>")
            expected = [all(one in texts for one in text.split(" and ")) for texts in owners]
            assert truth[:, number].tolist() == expected and any(expected)


def test_the_pretraining_script_writes_encoders_logs_and_settings(run_script, tmp_path):
    run_script("demo/pretraining/pretrain_encoders.py", "--output-dir", tmp_path, "--num-families", 32, "--clip-steps", 2,
               "--gpt2-steps", 2, "--num-texts", 300, "--workers", 2)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in ENCODERS.iterdir()} - {"README.md"}
    for name in ("clip", "gpt2"):
        assert {path.name for path in (tmp_path / name).iterdir()} == {path.name for path in (ENCODERS / name).iterdir()}
        assert json.loads((tmp_path / f"settings_{name}.json").read_text())["num_families"] == 32


def test_encoders_load_offline_and_are_small():
    """Loaded with open_clip and transformers themselves; no weight is missing."""
    import open_clip
    from transformers import AutoTokenizer, GPT2Model
    assert sum(path.stat().st_size for path in ENCODERS.rglob("*") if path.is_file()) <= 10e6
    clip = open_clip.create_model(f"local-dir:{ENCODERS / 'clip'}", require_pretrained=True).eval()
    assert len(clip.visual.transformer.resblocks) == 4 and clip.visual.preprocess_cfg["resize_mode"] == "squash"
    gpt2, report = GPT2Model.from_pretrained(ENCODERS / "gpt2", dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"] and len(gpt2.h) == 4
    tokenizer = AutoTokenizer.from_pretrained(ENCODERS / "gpt2")
    assert tokenizer.eos_token == gpt2_training.END and len(tokenizer) <= gpt2_training.VOCAB_SIZE
    question = "Where is the kite in this picture?"
    assert tokenizer.decode(tokenizer(question)["input_ids"]) == question


def test_clip_finds_new_images_by_their_captions():
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
    assert [words[word] for word in ids[0].tolist() if word] == ["<start>", "car", "red-colored", "ground-left", "<end>"]
    short = ids[:, :int((ids != 0).sum())]
    torch.testing.assert_close(clip_training.encode_captions(clip, short), clip.encode_text(ids, normalize=True))


def test_the_box_of_a_thing_holds_what_is_drawn_of_it():
    """The images with and without the thing differ in the box, up to its edges, and nowhere else."""
    checked = 0
    for image_id in range(1, 26):
        scene, _ = demo_scene(SEED, image_id)
        image, boxes = draw_with_boxes(scene)
        assert image == draw_scene(scene) and set(boxes) == set(scene.things)
        for thing in scene.grounded():
            if scene.visitor_of(thing):  # it needs its host
                continue
            without = dataclasses.replace(scene, things=tuple(other for other in scene.things if other != thing))
            changed = np.abs(np.array(image, int) - np.array(draw_scene(without), int)).max(axis=-1) > 40
            rows, columns = np.nonzero(changed)
            inwards = np.array((columns.min(), rows.min(), -columns.max() - 1, -rows.max() - 1))
            inwards = inwards - np.array(boxes[thing]) * (1, 1, -1, -1)
            assert inwards.min() > -4 and inwards.max() < 10, thing  # the outline has a width; others may cover an edge
            checked += 1
    assert checked > 40
