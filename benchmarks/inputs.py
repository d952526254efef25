"""What is measured on: COCO-sized pictures, a mini data set, and encoders of real or tiny size with random weights.

All of it is drawn from a seed and written once; a later run that wants the same finds it there. Times do not depend on
what weights and words say, only on how many there are and how large the pictures' files are.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.files import atomic_write, write_json
from mini_vqa_v2 import write_dataset

QUESTIONS_PER_PICTURE = 9_500 / 8_300  # of the mini set of VQA v2
PICTURE_SIZES = ((640, 480), (640, 480), (640, 427), (480, 640))  # what most of COCO's pictures have
# with these a drawn picture's JPEG is about as large as COCO's, 160 kB, and takes as long to decode
SPECTRUM_SLOPE, CONTRASTS, JPEG_QUALITY = 1.2, (55, 14, 14), 90
QUESTION_WORDS, ANSWER_WORDS = (5, 12), (3, 6)
HUMANS = 10
QUESTION_STOCK, ANSWER_STOCK = 3_000, 2_000  # different words, as frequent as words are: the n-th has a share of 1 / n
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
TOKENS = 4_000  # that the tokenizer learns from as many questions, so that most words are one token, as for GPT-2
FEW_PICTURES = 4  # of the data set on which start-up is timed

# the text tower of a CLIP file is never read here: a small one makes the file whole
TEXT_TOWER = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 2, "layers": 1}
TINY_CLIP = {"embed_dim": 24, "quick_gelu": True,
             "vision_cfg": {"image_size": 32, "layers": 6, "width": 32, "head_width": 16, "patch_size": 8}}
TINY_GPT2 = {"vocab_size": TOKENS, "n_positions": 64, "n_embd": 32, "n_layer": 6, "n_head": 2}
DISTILGPT2 = {"n_layer": 6}  # the rest is GPT-2's own default


@dataclass
class Inputs:
    """Where the inputs lie, as the scripts' flags name them."""

    data_dir: Path  # metadata.csv, qa_pairs.json, images/
    few_dir: Path  # the same with FEW_PICTURES pictures and as many questions
    to_decode: list  # image paths in data_dir: the pictures that rows ask about, and where these are few some more
    clip_model: str
    gpt2_model: str
    bytes_per_picture: float
    answer_words: list  # all that answers are made of: a small data set shows few of them


def make_inputs(folder, num_pictures, num_decoded, tiny, seed):
    """The Inputs in `folder`, written where they are not there yet: questions about `num_pictures` pictures, and at
    least `num_decoded` pictures to decode."""
    folder, to_draw = Path(folder).resolve(), max(num_pictures, num_decoded)
    encoders, data_dir, few_dir = (folder / name for name in (
        f"{'tiny' if tiny else 'real'}_encoders_{seed}", f"{num_pictures}_of_{to_draw}_pictures_{seed}",
        f"few_pictures_{seed}"))
    for target, pictures, drawn in ((few_dir, FEW_PICTURES, FEW_PICTURES), (data_dir, num_pictures, to_draw)):
        names = [f"images/COCO_train2014_{number:012d}.jpg" for number in range(1, drawn + 1)]
        if not (target / "metadata.csv").is_file():  # written last
            write_pictures(target, names, seed)
            write_dataset(make_rows(names[:pictures], seed), target)
    write_encoders(encoders, tiny, seed)
    sizes = [(data_dir / name).stat().st_size for name in names]
    return Inputs(data_dir, few_dir, names, f"local-dir:{encoders / 'clip'}", str(encoders / "gpt2"), sum(sizes) / len(sizes),
                  word_stocks(seed)[1][0])


# ---- pictures


def write_pictures(folder, names, seed):
    """Draw the JPEGs `names` (paths in `folder`)."""
    def write(number):
        with atomic_write(folder / names[number], durable=False) as temporary:
            draw_photo(np.random.default_rng([seed, number])).save(temporary, "JPEG", quality=JPEG_QUALITY)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:  # numpy and Pillow let other threads run
        list(pool.map(write, range(len(names))))


def draw_photo(rng):
    """A Pillow picture with the spectrum of a photograph: the amplitude falls with the frequency."""
    width, height = PICTURE_SIZES[rng.integers(len(PICTURE_SIZES))]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no offset
    waves = rng.standard_normal((3, *frequency.shape, 2)).view(complex)[..., 0] / frequency ** SPECTRUM_SLOPE
    planes = np.fft.irfft2(waves, s=(height, width))
    planes *= np.array(CONTRASTS).reshape(3, 1, 1) / planes.std(axis=(1, 2), keepdims=True)
    planes = np.clip(128 + planes, 0, 255).astype(np.uint8)
    return Image.merge("YCbCr", [Image.fromarray(plane) for plane in planes])


# ---- questions and answers


def make_rows(names, seed):
    """Rows as mini_vqa_v2.py writes them: about 1.15 for each picture, a tenth of the pictures for validation and test."""
    rng, rows = np.random.default_rng([seed, len(names)]), []
    question_stock, answer_stock = word_stocks(seed)
    for number, name in enumerate(names):
        split = "test" if number % 10 == 2 else "val" if number % 10 == 3 else "train"
        for _ in range(int((number + 1) * QUESTIONS_PER_PICTURE) - int(number * QUESTIONS_PER_PICTURE)):
            question, label = draw_words(rng, question_stock, QUESTION_WORDS), draw_words(rng, answer_stock, ANSWER_WORDS)
            agreement = int(rng.integers(3, HUMANS + 1))
            others = [draw_words(rng, answer_stock, ANSWER_WORDS) for _ in range(HUMANS - agreement)]
            rows.append({
                "image_id": number + 1, "question_id": 1_000_000 + len(rows), "image_path": name, "split": split,
                "question": f"{question}?", "question_type": " ".join(question.split()[:3]), "answer_type": "other",
                "answer": label, "agreement": agreement, "answers": [label] * agreement + others})
    return rows


def word_stocks(seed):
    """The words of questions and those of answers, each as (words, share of each)."""
    rng = np.random.default_rng(seed)
    return draw_stock(rng, QUESTION_STOCK), draw_stock(rng, ANSWER_STOCK)


def draw_stock(rng, count):
    """`count` different made-up words of two to four syllables, and the share of each."""
    words = {}
    while len(words) < count:
        syllables = rng.integers(2, 5)
        letters = zip(rng.choice(list(CONSONANTS), syllables), rng.choice(list(VOWELS), syllables), strict=True)
        words["".join(map("".join, letters))] = None
    shares = 1 / np.arange(1, count + 1)
    return list(words), shares / shares.sum()


def draw_words(rng, stock, lengths):
    """A text of words from `stock`; `lengths`: the least and the greatest number of words."""
    words, shares = stock
    return " ".join(words[index] for index in rng.choice(len(words), rng.integers(lengths[0], lengths[1] + 1), p=shares))


# ---- encoders


def write_encoders(folder, tiny, seed):
    """CLIP ViT-B/32 with QuickGELU and distilgpt2, or tiny ones of as many trainable blocks, with random weights.

    Folders as open_clip (`local-dir:`) and transformers read them, written where they are not there yet.
    """
    torch.manual_seed(seed)
    if not (folder / "clip/open_clip_config.json").is_file():
        write_clip(folder / "clip", tiny)
    if not (folder / "gpt2/tokenizer.json").is_file():
        write_gpt2(folder / "gpt2", tiny, seed)


def write_clip(folder, tiny):
    """A CLIP with random weights as an open_clip folder."""
    import open_clip
    from safetensors.torch import save_file
    config = (TINY_CLIP if tiny else open_clip.get_model_config("ViT-B-32-quickgelu")) | {"text_cfg": TEXT_TOWER}
    with atomic_write(folder / "open_clip_model.safetensors") as temporary:
        save_file(open_clip.CLIP(**config).state_dict(), temporary)
    write_json(folder / "open_clip_config.json", {"model_cfg": config, "preprocess_cfg": {}})


def write_gpt2(folder, tiny, seed):
    """A GPT-2 with random weights, and a tokenizer of the words that questions have, as a transformers folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2Model, GPT2TokenizerFast
    rng, (stock, _) = np.random.default_rng(seed), word_stocks(seed)
    questions = [draw_words(rng, stock, QUESTION_WORDS) for _ in range(TOKENS)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(questions, trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    config = GPT2Config(bos_token_id=0, eos_token_id=0, **(TINY_GPT2 if tiny else DISTILGPT2))
    GPT2Model(config).save_pretrained(folder)
    GPT2TokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
