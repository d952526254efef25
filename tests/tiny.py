"""Tiny encoders with random weights, a small data set of drawn images, and helpers for output folders."""
import csv
import json
import random
from pathlib import Path

import pandas as pd
import torch
from PIL import Image, ImageDraw

COLOURS = {"red": (200, 30, 30), "green": (20, 140, 40), "blue": (30, 60, 210), "yellow": (235, 200, 40)}
SHAPES = ("ball", "box", "roof")
QUESTIONS = ("What is on the left?", "What is on the right?", "What do you see in the image?")
VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}


def write_encoders(folder, seed=0):
    """Folders of open_clip and transformers with random weights; returns the flags that name them."""
    import open_clip
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2Model, GPT2TokenizerFast
    clip, gpt2 = Path(folder) / "clip", Path(folder) / "gpt2"
    clip.mkdir(parents=True)
    torch.manual_seed(seed)
    config = {"embed_dim": 24, "vision_cfg": VISION,
              "text_cfg": {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}}
    save_file(open_clip.CLIP(**config).state_dict(), clip / "open_clip_model.safetensors")
    (clip / "open_clip_config.json").write_text(json.dumps(
        {"model_cfg": config, "preprocess_cfg": {"resize_mode": "squash"}}))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(QUESTIONS, trainer)
    GPT2TokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(gpt2)
    GPT2Model(GPT2Config(vocab_size=tokenizer.get_vocab_size(), n_positions=64, n_embd=32, n_layer=4,
                         n_head=2)).save_pretrained(gpt2)
    return ["--clip-model", f"local-dir:{clip}", "--gpt2-model", str(gpt2)]


def write_data(folder, num_images=60, seed=0):
    """A data folder as mini_vqa_v2.py writes it: two coloured objects per image, three questions each. Returns the rows."""
    folder, draw_from = Path(folder), random.Random(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(num_images):
        objects = [(draw_from.choice(sorted(COLOURS)), draw_from.choice(SHAPES)) for _ in range(2)]
        image_path = f"images/{number:04d}.png"
        draw_image(objects, 48 + 4 * (number % 5)).save(folder / image_path)
        phrases = [f"a {colour} {shape}" for colour, shape in objects]
        answers = [*phrases, f"{phrases[0]} and {phrases[1]}"]
        split = "test" if number % 6 == 0 else "val" if number % 6 == 1 else "train"
        for index, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
            rows.append({"image_id": str(number), "question_id": str(number * 10 + index), "question": question,
                         "answer": answer, "image_path": image_path, "split": split,
                         "question_type": " ".join(question.lower().split()[:4]), "answer_type": "other",
                         "agreement": "8", "answers": [answer] * 8 + [answer.removeprefix("a "), "something else"]})
    write_rows(folder, rows)
    return rows


def draw_image(objects, width):
    """An image of two (colour, shape), side by side."""
    image = Image.new("RGB", (width, 40), "white")
    draw = ImageDraw.Draw(image)
    for x, (colour, shape) in zip((2, 26), objects, strict=True):
        box, fill = (x, 10, x + 18, 28), COLOURS[colour]
        draw.rectangle(box, fill=fill) if shape == "box" else draw.chord(box, 180, 360 if shape == "roof" else 540, fill=fill)
    return image


def write_rows(folder, rows):
    """metadata.csv and qa_pairs.json of `rows`."""
    pd.DataFrame(rows).drop(columns="answers").to_csv(Path(folder) / "metadata.csv", index=False)
    (Path(folder) / "qa_pairs.json").write_text(json.dumps(rows), encoding="utf-8")


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def read_log(output_dir):
    """The rows of train_log.csv without the columns that measure time."""
    return [{name: value for name, value in row.items() if name not in ("seconds", "samples_per_s")}
            for row in read_csv(Path(output_dir) / "train_log.csv")]


def check_equal_runs(one, other):
    """Two output folders hold the same log (but for the times), the same samples and bit-identical weights."""
    assert read_log(one) == read_log(other)
    assert (one / "samples.csv").read_bytes() == (other / "samples.csv").read_bytes()
    for name in ("vqa_checkpoint.pt", "last.pt"):
        first, second = (torch.load(folder / name, weights_only=True) for folder in (one, other))
        assert first["epoch"] == second["epoch"] and first["val_loss"] == second["val_loss"]
        assert first["weights"].keys() == second["weights"].keys()
        assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in first["weights"])
