"""Generated inputs of the benchmarks: images of COCO's size, questions with answers, encoders with random weights.

Run times depend on the number and size of images, texts and weights, not on their content.
"""
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from common.files import write_json

ROOT = Path(__file__).resolve().parents[1]
SEED = 42  # of images, texts and weights
IMAGE_SIZES = ((640, 480), (640, 480), (640, 427), (480, 640))  # the most frequent sizes in COCO
GRAIN, JPEG_QUALITY = 4, 90  # give JPEG files of COCO's mean size, 160 kB, which take as long to decode

# each of these words is one token of the demo's tokenizer, as most words are one token of GPT-2's
WORDS = ("the here kite balloon left right middle picture color animal house umbrella small things boat tree weather "
         "beside under dog cat bird two kind this place ground located doing found").split()
ANSWER_WORDS = [f"word{number}" for number in range(2_000)]
QUESTIONS, ANSWERS = (WORDS, 5, 12), (ANSWER_WORDS, 3, 6)  # words, fewest and most of them in a text

DEMO_ENCODERS = ROOT / "demo" / "encoders"
# the project does not load the text tower, but the file's configuration must have one
TEXT_TOWER = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}


def write_data(folder, num_images):
    """Write `num_images` JPEG files and metadata.csv into `folder`, as train.py reads them. Returns the image paths."""
    (folder / "images").mkdir(parents=True)
    rng, rows = np.random.default_rng(SEED), []
    paths = [f"images/{number:06d}.jpg" for number in range(num_images)]
    for number, path in enumerate(paths):
        width, height = IMAGE_SIZES[number % len(IMAGE_SIZES)]
        noise = Image.fromarray(rng.integers(256, size=(height // GRAIN, width // GRAIN, 3), dtype=np.uint8))
        noise.resize((width, height), Image.Resampling.BICUBIC).save(folder / path, "JPEG", quality=JPEG_QUALITY)
        split = {2: "test", 3: "val"}.get(number % 10, "train")
        for _ in range(2 if number % 7 == 0 else 1):  # as many questions per image as mini_vqa_v2.py gives
            rows.append({"image_path": path, "split": split, "question": f"{draw_text(rng, *QUESTIONS)}?",
                         "answer": draw_text(rng, *ANSWERS)})
    pd.DataFrame(rows).to_csv(folder / "metadata.csv", index=False)
    return paths


def draw_text(rng, words, fewest, most):
    """A text of random words. The n-th word of `words` has a share proportional to 1 / n, as in natural language."""
    shares = 1 / np.arange(1, len(words) + 1)
    number = rng.integers(fewest, most + 1)
    return " ".join(words[index] for index in rng.choice(len(words), number, p=shares / shares.sum()))


def write_encoders(folder, tiny):
    """The flags (clip_model, gpt2_model) of the demo's encoders if `tiny`, else of CLIP ViT-B/32 and distilgpt2.

    The weights of the latter are random. They are written into `folder`, with the demo's tokenizer.
    """
    if tiny:
        return f"local-dir:{DEMO_ENCODERS / 'clip'}", str(DEMO_ENCODERS / "gpt2")
    import open_clip
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2Model
    clip, gpt2 = folder / "clip", folder / "gpt2"
    clip.mkdir(parents=True)
    torch.manual_seed(SEED)
    config = open_clip.get_model_config("ViT-B-32-quickgelu") | {"text_cfg": TEXT_TOWER}
    save_file(open_clip.CLIP(**config).state_dict(), clip / "open_clip_model.safetensors")
    write_json(clip / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})
    GPT2Model(GPT2Config(n_layer=6, bos_token_id=0, eos_token_id=0)).save_pretrained(gpt2)
    for path in (DEMO_ENCODERS / "gpt2").glob("tokenizer*"):
        shutil.copy(path, gpt2)
    return f"local-dir:{clip}", str(gpt2)
