"""Tiny encoders with random weights and a small data set of drawn pictures, for tests."""
import csv
import json
import random
from pathlib import Path

import torch
from PIL import Image, ImageDraw

COLOURS = {"red": (200, 30, 30), "green": (20, 140, 40), "blue": (30, 60, 210), "yellow": (235, 200, 40)}
SHAPES = ("ball", "box", "roof")
QUESTIONS = ("What is on the left?", "What is on the right?", "What do you see in the picture?")
VISION = {"image_size": 32, "layers": 4, "width": 32, "head_width": 16, "patch_size": 8}


def write_encoders(folder, seed=0):
    """open_clip and transformers folders with random weights; returns the flags that name them."""
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


def write_data(folder, num_pictures=60, seed=0):
    """A data folder as mini_vqa_v2.py writes it: two coloured things per picture, three questions each."""
    folder, draw_from = Path(folder), random.Random(seed)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(num_pictures):
        things = [(draw_from.choice(sorted(COLOURS)), draw_from.choice(SHAPES)) for _ in range(2)]
        picture = Image.new("RGB", (48 + 4 * (number % 5), 40), "white")
        for side, (colour, shape) in enumerate(things):
            left = 2 + side * 24
            draw = ImageDraw.Draw(picture)
            box = (left, 10, left + 18, 28)
            {"ball": draw.ellipse, "box": draw.rectangle}.get(shape, draw.chord)(
                *((box, 180, 360) if shape == "roof" else (box,)), fill=COLOURS[colour])
        image_path = f"images/{number:04d}.png"
        picture.save(folder / image_path)
        phrases = [f"a {colour} {shape}" for colour, shape in things]
        answers = [*phrases, f"{phrases[0]} and {phrases[1]}"]
        split = "test" if number % 6 == 0 else "val" if number % 6 == 1 else "train"
        for index, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
            rows.append({"image_id": str(number), "question_id": str(number * 10 + index), "question": question,
                         "answer": answer, "image_path": image_path, "split": split,
                         "question_type": " ".join(question.lower().split()[:4]), "answer_type": "other",
                         "agreement": "8", "answers": [answer] * 8 + [answer.removeprefix("a "), "something else"]})
    write_rows(folder, rows)
    return rows


def write_rows(folder, rows):
    """metadata.csv and qa_pairs.json of `rows`."""
    columns = [name for name in rows[0] if name != "answers"]
    with open(Path(folder) / "metadata.csv", "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (Path(folder) / "qa_pairs.json").write_text(json.dumps(rows), encoding="utf-8")
