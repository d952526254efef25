"""Pretrains the demo's two small encoders from random weights: a CLIP on drawn scenes, a GPT-2 on questions about scenes.

Reads nothing. Writes OUTPUT_DIR/clip (open_clip's `local-dir:` format), OUTPUT_DIR/gpt2 (transformers' format),
pretraining.png, and for each encoder its log (clip_log.csv) and its settings (settings_clip.json). No scene used here
belongs to the demo (demo/world.py: belongs_to_demo). Takes about 50 minutes for CLIP and one for GPT-2 on two free cores.
"""
import csv
import dataclasses
import multiprocessing
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository's root, for imports

from common import settings  # first: before torch

# isort: split
import torch
from tqdm.contrib.concurrent import process_map

from common.files import atomic_write, write_json
from demo.pretraining import captions, clip_training, gpt2_training

HELD_OUT_FAMILIES, HELD_OUT_TEXTS = 100, 200


@dataclass
class Config:
    output_dir: str = "demo/encoders"
    """folder for clip/, gpt2/ and the logs"""
    parts: Literal["both", "clip", "gpt2"] = "both"
    """which encoders to pretrain"""
    num_families: int = 30_000
    """scene families drawn for CLIP; a family is a scene and three changed copies"""
    clip_steps: int = 7000
    """optimizer steps of CLIP"""
    clip_batch_size: int = 64
    """images per step and process"""
    clip_learning_rate: float = 2e-3
    """maximum for CLIP's embeddings, norms and projections (AdamW); warm-up, then cosine"""
    muon_learning_rate: float = 0.02
    """maximum for the matrices in CLIP's blocks (Muon); the same schedule"""
    weight_decay: float = 0.05
    """of CLIP's matrices"""
    gpt2_steps: int = 500
    """optimizer steps of GPT-2"""
    gpt2_batch_size: int = 32
    """texts of four questions per step"""
    gpt2_learning_rate: float = 2e-3
    """maximum for GPT-2"""
    num_texts: int = 8000
    """texts for GPT-2, each of four questions about one scene"""
    workers: int = 2
    """processes that draw and train CLIP; each draws its own batches, so another number gives another model"""
    save_seconds: float = 240.0
    """seconds between two saves of CLIP"""
    seed: int = 7
    """another seed gives other scenes and weights"""


class Log:
    """A CSV file that grows by one row per call, with the seconds since the start."""

    def __init__(self, path):
        self.path, self.rows, self.start = path, [], time.monotonic()

    def __call__(self, row):
        self.rows.append({name: value if isinstance(value, int) else "" if value is None else f"{value:.5g}"
                          for name, value in row.items()} | {"seconds": round(time.monotonic() - self.start)})
        with atomic_write(self.path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)


def main(cfg):
    if not hasattr(torch.optim, "Muon"):
        raise ValueError(f"torch {torch.__version__} has no Muon optimizer: pretraining needs torch 2.9 or newer")
    settings.check_ranges(cfg, num_families=settings.COUNT, clip_steps=settings.COUNT, gpt2_steps=settings.COUNT,
                          num_texts=settings.COUNT, workers=(1, 256))
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for part, pretrain in (("gpt2", pretrain_gpt2), ("clip", pretrain_clip)):
        if cfg.parts in ("both", part):
            pretrain(cfg, folder)
            write_json(folder / f"settings_{part}.json", dataclasses.asdict(cfg))  # demo/make_scenes.py reads clip's
    draw_curves(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{size / 1e6:.1f} MB in {folder}")


def pretrain_gpt2(cfg, folder):
    """Train tokenizer and language model, and save both. The weights are saved in fp16."""
    texts = gpt2_training.question_texts(cfg.num_texts, cfg.seed)
    held_out = gpt2_training.question_texts(HELD_OUT_TEXTS, f"held out {cfg.seed}")
    model, tokenizer = gpt2_training.train_gpt2(texts, held_out, cfg, Log(folder / "gpt2_log.csv"))
    model.transformer.half().save_pretrained(folder / "gpt2")
    tokenizer.save_pretrained(folder / "gpt2")


def pretrain_clip(cfg, folder):
    """Draw the families, then train CLIP in `cfg.workers` processes."""
    draw = partial(clip_training.render_family, seed=cfg.seed)
    scenes = clip_training.Scenes(process_map(draw, range(cfg.num_families), max_workers=cfg.workers, chunksize=32,
                                              desc="families", unit=" families"))
    draw = partial(clip_training.render_family, seed=f"held out {cfg.seed}")
    held_out = clip_training.Scenes([draw(number) for number in range(HELD_OUT_FAMILIES)])
    print(f"{len(scenes)} images, {len(scenes.index)} statements; {len(held_out)} images held out")
    context = multiprocessing.get_context("fork")  # forked processes share the images in memory
    with tempfile.TemporaryDirectory() as temporary:
        arguments = (cfg, f"{temporary}/address", scenes, held_out, Log(folder / "clip_log.csv"),
                     partial(save_clip, folder=folder / "clip"))
        others = [context.Process(target=clip_training.train_clip, args=(rank, *arguments), daemon=True)
                  for rank in range(1, cfg.workers)]
        for process in others:
            process.start()
        clip_training.train_clip(0, *arguments)
        for process in others:
            process.join()


def save_clip(model, folder):
    """Write configuration, fp16 weights and the tokenizer of the captions as an open_clip `local-dir:` folder."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "open_clip_config.json",
               {"model_cfg": clip_training.MODEL, "preprocess_cfg": clip_training.PREPROCESS})
    words = {word: number for number, word in enumerate(captions.vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[(word, words[word]) for word in ("<start>", "<end>")])
    with atomic_write(folder / "tokenizer.json") as temporary:
        tokenizer.save(str(temporary))
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "bos_token": "<start>",
        "eos_token": "<end>", "clean_up_tokenization_spaces": False,
        "model_max_length": captions.CONTEXT_LENGTH})
    with atomic_write(folder / "open_clip_model.safetensors") as temporary:
        save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, temporary)


def draw_curves(folder):
    """Draw pretraining.png: both losses and the accuracies of CLIP, from the CSV logs in `folder`."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    panels = ((axes[0], "clip_log.csv", ("loss",), "CLIP: contrastive loss (nats)"),
              (axes[1], "clip_log.csv", ("batch_accuracy", "held_out_retrieval"), "CLIP: accuracy"),
              (axes[2], "gpt2_log.csv", ("loss", "held_out_loss"), "GPT-2: loss (nats per token)"))
    for axis, name, columns, title in panels:
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if not (folder / name).is_file():
            continue
        with open(folder / name, newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        for column in columns:
            points = [(int(row["step"]), float(row[column])) for row in rows if row[column]]
            axis.plot(*zip(*points, strict=True), label=column.replace("_", " "))
        axis.legend()
    with atomic_write(folder / "pretraining.png") as temporary:
        figure.savefig(temporary, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    settings.run(main, Config)
