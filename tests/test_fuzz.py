"""Damaged input: every reader gives a right result or one clear error, never anything else.

The readers may raise ValueError and OSError. Any other exception would be a traceback for the user (settings.run).
"""
import csv
import io
import json
import random

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import mini_vqa_v2
from common.images import UNREADABLE, open_image
from evaluation.comparison import join_results
from features.arrays import new_array, open_tensor
from features.trained_model import FORMAT, load_model, read_checkpoint
from model import ModelConfig, VQAModel
from preprocess import read_rows
from training.checkpoint import describe_model, save_checkpoint
from vocab import Vocab

CASES = 400  # for each reader


def damage(content, rng):
    """`content` (bytes) with one to three faults: bits flipped, truncated, a piece lost, doubled or zeroed, noise inserted."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice((1, 2, 8, 100, 1000)))
        fault = rng.randrange(6)
        if fault == 0:
            for position in range(start, end):
                content[position] ^= 1 << rng.randrange(8)
        elif fault == 1:
            del content[start:]
        elif fault == 2:
            del content[start:end]
        elif fault == 3:
            content[start:start] = content[start:end]
        elif fault == 4:
            content[start:end] = bytes(end - start)
        else:
            content[start:start] = rng.randbytes(rng.choice((1, 4, 40)))
    return bytes(content)


def fuzz(path, read, name, cases=CASES, errors=(ValueError, OSError)):
    """Damage the valid file `path` in `cases` ways; returns what `read()` returned where it raised none of `errors`."""
    content, rng, accepted = path.read_bytes(), random.Random(f"fuzz {name}"), []
    read()
    for _ in range(cases):
        path.write_bytes(damage(content, rng))
        try:
            accepted.append(read())
        except errors as error:
            assert str(error).strip(), "an error without words"
    path.write_bytes(content)
    return accepted


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    tiny.write_data(folder, 6)
    return folder


def test_metadata_csv(small_data):
    for rows in fuzz(small_data / "metadata.csv", lambda: read_rows(small_data), "csv"):
        assert rows["question"].str.strip().all() and rows["question_id"].is_unique


def test_qa_pairs_json(small_data):
    for rows in fuzz(small_data / "qa_pairs.json", lambda: read_rows(small_data), "json"):
        assert all(isinstance(text, str) for texts in rows["answers"] for text in texts)


@pytest.mark.parametrize("kind", ["questions", "annotations"])
def test_official_json(kind, tmp_path):
    entries = {"questions": [{"question_id": n, "image_id": n, "question": f"What is {n}?"} for n in range(40)],
               "annotations": [{"question_id": n, "image_id": n, "question_type": "what", "answer_type": "other",
                                "multiple_choice_answer": "a red kite", "answers": [{"answer": "a red kite"}] * 10}
                               for n in range(40)]}
    names = {"questions": "v2_OpenEnded_mscoco_train2014_questions.json", "annotations": "v2_mscoco_train2014_annotations.json"}
    for part, content in entries.items():
        (tmp_path / names[part]).write_text(json.dumps({part: content}))
    cfg = mini_vqa_v2.Config(vqa_dir=str(tmp_path), pictures=False, base_url="http://127.0.0.1:9")

    def read():
        return mini_vqa_v2.read_rows(mini_vqa_v2.choose_parts(cfg))[0]

    for rows in fuzz(tmp_path / names[kind], read, kind, CASES // 2):
        assert all(isinstance(row["answer"], str) and row["agreement"] >= 1 for row in rows)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif", ".avif", ".heic"])
def test_images(suffix, tmp_path):
    path = tmp_path / f"a{suffix}"
    if suffix == ".heic":
        pytest.importorskip("pillow_heif").register_heif_opener()  # for writing
    y, x = np.mgrid[:40, :50]
    Image.fromarray(np.stack([x * 5, y * 6, x + y], -1).astype(np.uint8)).save(path)
    for image in fuzz(path, lambda: open_image(path), suffix, CASES // 4, UNREADABLE):
        assert image.mode == "RGB"


@pytest.fixture
def trained(loaded_encoders):
    """(model, content of its checkpoint)."""
    vocab = Vocab.build(["a red cat", "a dog"])
    model = VQAModel(loaded_encoders.image.visual, loaded_encoders.question.gpt2, len(vocab), ModelConfig(hidden_size=8))
    return model, {**describe_model(model, loaded_encoders, vocab), "stage": "feature extraction", "settings": {}, "epoch": 3,
                   "val_loss": 1.5, "trained_on": dict.fromkeys(("images", "questions"), torch.arange(3)),
                   "training_texts": {}, "weights": model.trainable_weights()}


def test_damaged_bytes_of_a_checkpoint(trained, tmp_path):
    """A damaged weight must not go unnoticed: the model would answer, only worse."""
    _, content = trained
    save_checkpoint(tmp_path / "c.pt", content)
    for found in fuzz(tmp_path / "c.pt", lambda: read_checkpoint(tmp_path / "c.pt"), "checkpoint"):
        assert found["vocab"] == content["vocab"] and found["model_config"] == content["model_config"]
        assert all(torch.equal(found["weights"][name], weight) for name, weight in content["weights"].items())


def exchange_entry(value, rng):
    """A copy of `value` in which one entry, at any depth, is missing, new, or has another value."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name, fault = rng.choice(sorted(value)), rng.randrange(4)
        if fault == 0:
            return {key: entry for key, entry in value.items() if key != name}
        if fault == 1:
            return {**value, "new": 1}
        return {**value, name: exchange_entry(value[name], rng)}
    return rng.choice([None, "x", "", -1, 0, 7, 1.5, float("nan"), [], [1], {}, {"a": 1}, torch.ones(2), torch.ones(())])


def test_exchanged_entries_of_a_checkpoint(trained, tmp_path, monkeypatch, loaded_encoders):
    """The bytes are valid, and `load_model` builds the model from what they say."""
    monkeypatch.setattr("features.trained_model.load_encoders", lambda *names: loaded_encoders)
    model, content = trained
    rng, loaded = random.Random("exchange"), 0
    for _ in range(CASES // 2):
        torch.save(exchange_entry({"format": FORMAT, **content}, rng), tmp_path / "c.pt")
        try:
            found = load_model(tmp_path / "c.pt")
        except (ValueError, OSError) as error:
            assert str(error).strip(), "an error without words"
        else:
            loaded += 1
            assert found.model.trainable_weights().keys() == content["weights"].keys()
    assert 0 < loaded < CASES // 4


def test_stored_arrays(tmp_path, monkeypatch):
    """A damaged number must not go unnoticed: the model would give other answers."""
    monkeypatch.setattr("features.arrays.version_of", lambda path: object())  # no file has been verified before
    with new_array(tmp_path / "states.npy", (30, 4), np.float32) as array:
        array[:] = np.arange(120).reshape(30, 4)
    for tensor in fuzz(tmp_path / "states.npy", lambda: open_tensor(tmp_path / "states.npy", 30).clone(), "array"):
        assert torch.equal(tensor.flatten(), torch.arange(120.0))


def test_results_csv(tmp_path):
    rows = [{"question_id": str(n), "image_id": str(n // 2), "question": "What?", "answer": "a cat", "prediction": "a dog",
             "sentence_bleu": "12.5", "exact_match": "0.0", "vqa_accuracy": "30.0", "confidence": "0.4"} for n in range(12)]
    for name in "ab":
        pd.DataFrame(rows).to_csv(tmp_path / f"{name}.csv", index=False, quoting=csv.QUOTE_NONNUMERIC)
    fuzz(tmp_path / "b.csv", lambda: join_results(tmp_path / "a.csv", tmp_path / "b.csv"), "results", CASES // 2)


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=8), st.sampled_from(",;\t"), st.booleans(),
       st.sampled_from(("\n", "\r\n")))
def test_any_text_in_a_csv_is_read_unchanged(tmp_path_factory, pairs, separator, byte_order_mark, line_end):
    """Line breaks, quotes, right-to-left text, emoji, formulas."""
    stream = io.StringIO(newline="")
    writer = csv.writer(stream, delimiter=separator, quoting=csv.QUOTE_ALL, lineterminator=line_end)
    writer.writerow(["image_path", "question", "answer"])
    writer.writerows([f"{number}.jpg", *pair] for number, pair in enumerate(pairs))
    path = tmp_path_factory.mktemp("text") / "own.csv"
    path.write_bytes((b"\xef\xbb\xbf" if byte_order_mark else b"") + stream.getvalue().encode())
    expected = [pair for pair in pairs if all(text.strip() for text in pair)]
    if not expected:
        with pytest.raises(ValueError, match="no row"):
            read_rows(path)
        return
    rows = read_rows(path)
    assert list(zip(rows["question"], rows["answer"], strict=True)) == expected
