"""Damaged and made-up input: every reader gives a right result or one clear error, never anything else.

Whatever a reader raises beyond ValueError and OSError would be a traceback for the user (settings.run).
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
from evaluation.report import join_results
from features.arrays import new_array, open_tensor
from preprocess import read_rows
from training.checkpoint import FORMAT, KEYS, read_checkpoint, save_checkpoint

CASES = 400  # of each reader


def damage(content, rng):
    """`content` (bytes) with one to three faults: bits flipped, cut, a piece lost, doubled, zeroed, or noise put in."""
    content = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 2, 8, 100, 1000)))
        fault = rng.randrange(6)
        if fault == 0:
            for position in range(at, end):
                content[position] ^= 1 << rng.randrange(8)
        elif fault == 1:
            del content[at:]
        elif fault == 2:
            del content[at:end]
        elif fault == 3:
            content[at:at] = content[at:end]
        elif fault == 4:
            content[at:end] = bytes(end - at)
        else:
            content[at:at] = rng.randbytes(rng.choice((1, 4, 40)))
    return bytes(content)


def fuzz(path, read, name, cases=CASES, refusals=(ValueError, OSError)):
    """Damage the valid file `path` in many ways; returns how many of them `read()` took, and (content, result) of those."""
    content, rng, taken = path.read_bytes(), random.Random(f"fuzz {name}"), []
    read()
    for _ in range(cases):
        damaged = damage(content, rng)
        path.write_bytes(damaged)
        try:
            taken.append((damaged, read()))
        except refusals as error:
            assert str(error).strip(), "an error without words"
    path.write_bytes(content)
    return taken


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "data"
    tiny.write_data(folder, num_pictures=6)
    return folder


def test_metadata_csv(small_data):
    for _, rows in fuzz(small_data / "metadata.csv", lambda: read_rows(small_data), "csv"):
        assert rows["question"].str.strip().all() and rows["question_id"].is_unique


def test_own_csv_without_json(small_data, tmp_path):
    (tmp_path / "own.csv").write_bytes((small_data / "metadata.csv").read_bytes())
    fuzz(tmp_path / "own.csv", lambda: read_rows(tmp_path / "own.csv"), "own csv")


def test_qa_pairs_json(small_data):
    for _, rows in fuzz(small_data / "qa_pairs.json", lambda: read_rows(small_data), "json"):
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
        return mini_vqa_v2.label_rows(mini_vqa_v2.read_official(cfg, "questions"),
                                      mini_vqa_v2.read_official(cfg, "annotations"), cfg)

    for _, rows in fuzz(tmp_path / names[kind], read, kind, CASES // 2):
        assert all(isinstance(row["answer"], str) and row["agreement"] >= 1 for row in rows)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".gif", ".webp", ".bmp", ".tif"])
def test_pictures(suffix, tmp_path):
    y, x = np.mgrid[:40, :50]
    Image.fromarray(np.stack([x * 5, y * 6, x + y], -1).astype(np.uint8)).save(tmp_path / f"a{suffix}")
    path = tmp_path / f"a{suffix}"
    for _, picture in fuzz(path, lambda: open_image(path), suffix, CASES // 4, UNREADABLE):
        assert picture.mode == "RGB"


def test_checkpoints(tmp_path):
    """A damaged weight must not go unnoticed: the model would answer, only worse."""
    content = {**dict.fromkeys(KEYS, "some text"), "format": FORMAT, "vocab": ["<pad>", "<start>", "<end>", "<unk>", "cat"],
               "sizes": {"hidden_size": 8, "num_layers": 1, "dropout": 0.3, "question_max_len": 8, "answer_max_len": 8,
                         "inputs": "both", "fusion": "gated", "image_pooling": "pooled", "answer_sampling": "majority",
                         "picture_decoder": "pillow"},
               "encoders": {"clip_model": "a", "clip_pretrained": "b", "gpt2_model": "c",
                            "fingerprints": {"clip": "0" * 32, "gpt2": "1" * 32}},
               "cut": {"clip_layers": 0, "gpt2_layers": 0}, "settings": {}, "epoch": 3, "val_loss": 1.5,
               "weights": {"decoder.embedding.weight": torch.randn(5, 8), "fusion.gate.bias": torch.randn(8)}}
    save_checkpoint(tmp_path / "c.pt", content)
    for _, found in fuzz(tmp_path / "c.pt", lambda: read_checkpoint(tmp_path / "c.pt"), "checkpoint"):
        assert found["vocab"] == content["vocab"] and found["sizes"] == content["sizes"]
        assert all(torch.equal(found["weights"][name], content["weights"][name]) for name in content["weights"])


def test_stored_arrays(tmp_path):
    with new_array(tmp_path / "states.npy", (30, 4), np.float32) as array:
        array[:] = np.arange(120).reshape(30, 4)
    for _, tensor in fuzz(tmp_path / "states.npy", lambda: open_tensor(tmp_path / "states.npy", 30), "array"):
        assert len(tensor) == 30


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
def test_any_text_in_a_csv_comes_back_as_it_was(tmp_path_factory, pairs, separator, byte_order_mark, line_end):
    """Line breaks, quotes, right-to-left text, emoji, formulas: text is text."""
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
