"""Stage 2: unfreeze the last N blocks of both encoders and train on, with one learning rate per parameter group.

Reads stage 1's checkpoint, which fixes encoders, vocabulary and model_config. Writes the same files as train.py into
its own `output_dir`. The blocks below the freeze boundary stay constant: training starts from their stored outputs.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from common import settings  # first: before torch

# isort: split
import pandas as pd
import torch

import train
from common import distributed
from common.device import Precision
from common.files import is_same
from features.overlap import count_trained, refuse_trained
from features.trained_model import CheckpointConfig, load_model
from preprocess import read_rows
from training.run_state import is_finished, lock_output_folder


@dataclass
class Config(CheckpointConfig, train.LoopConfig):
    checkpoint: str = "output/feature_extraction/vqa_checkpoint.pt"
    """stage 1's best checkpoint; hf:USER/REPO is the vqa_checkpoint.pt of a hub repository"""
    output_dir: str = "output/fine_tuning"
    """where checkpoints, log and curves go"""
    clip_layers: int = 4
    """last blocks of CLIP to train, with the final norm and the projection; 0 = none"""
    gpt2_layers: int = 4
    """last blocks of GPT-2 to train, with the final norm; 0 = none"""
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 3e-4
    """maximum for the head: below stage 1's, since the head is trained already"""
    clip_learning_rate: float = 1e-5
    """maximum for CLIP's blocks: fine-tuning CLIP takes 1e-5 to 3e-5 (Wortsman et al. 2022, WiSE-FT)"""
    gpt2_learning_rate: float = 5e-5
    """maximum for GPT-2's blocks: GPT was fine-tuned with 6.25e-5 (Radford et al. 2018)"""
    warmup_fraction: float = 0.1
    patience: int = 3
    allow_trained_images: bool = False
    """only warn if stage 1 was trained on validation or test images of this data"""


def check_settings(cfg):
    """Raise ValueError if a setting of stage 2 is out of range."""
    train.check_loop_settings(cfg)
    settings.check_ranges(cfg, clip_layers=(0, 1000), gpt2_layers=(0, 1000), clip_learning_rate=settings.POSITIVE,
                          gpt2_learning_rate=settings.POSITIVE)
    if is_same(cfg.output_dir, Path(cfg.checkpoint).parent):
        raise ValueError(f"--output-dir {cfg.output_dir} is stage 1's own folder: choose another one")


def load_stage_one(cfg):
    """Stage 1's TrainedModel; prints what is taken from it. Raises ValueError for a fine-tuned checkpoint."""
    path, stage_one = cfg.checkpoint, load_model(cfg.checkpoint, cfg)
    checkpoint = stage_one.checkpoint
    stage_one.encoders.print_sizes()
    if any(checkpoint["trainable_blocks"].values()):
        raise ValueError(f"{path} is a fine-tuned checkpoint; stage 2 starts from stage 1's, such as {Config.checkpoint}")
    taken = {**stage_one.encoders.names, **checkpoint["model_config"], "vocabulary": f"{len(checkpoint['vocab'])} words"}
    print(f"from {path} (epoch {checkpoint['epoch']}, validation loss {checkpoint['val_loss']:.4f}): "
          + ", ".join(f"{name} {value}" for name, value in taken.items()))
    return stage_one


def read_stage_one_log(checkpoint, folder):
    """[(stage, log)] of stage 1 for the curves: the rows that hold numbers, [] if there are none.

    Prints a note if the log cannot be read, or if stage 1 was interrupted.
    """
    path = folder / "train_log.csv"
    if not path.is_file():
        return []
    try:
        table = pd.read_csv(path).apply(pd.to_numeric, errors="coerce").replace([math.inf, -math.inf], math.nan)
        log = table.dropna(subset=["epoch", "train_loss", "val_loss"]).to_dict("records")
        finished = is_finished(log, checkpoint["settings"]["epochs"], checkpoint["settings"]["patience"])
    except (ValueError, LookupError, TypeError, OSError) as error:
        print(f"note: {path} cannot be read ({error!s:.100}): the curves show stage 2 alone")
        return []
    if not finished:
        print(f"note: stage 1 was interrupted after epoch {log[-1]['epoch']:g}; the same train.py command with --resume "
              f"finishes it (its settings are in {folder / 'config.json'})")
    return [(checkpoint["stage"], log)]


def main(cfg):
    check_settings(cfg)
    precision = Precision(cfg.device, cfg.amp)
    print(f"computing on {precision}")
    distributed.init_process_group(precision.device)
    stage_one = load_stage_one(cfg)
    encoder_names = stage_one.encoders.names
    train.check_output_dir(cfg, encoder_names["clip_model"], encoder_names["gpt2_model"])
    earlier_stages = read_stage_one_log(stage_one.checkpoint, stage_one.path.parent)
    model, encoders, vocab = stage_one.model, stage_one.encoders, stage_one.vocab
    with lock_output_folder(cfg):
        rows = read_rows(cfg.data_dir, allow_outside=cfg.allow_outside)
        torch.manual_seed(cfg.seed)
        model.unfreeze(cfg.clip_layers, cfg.gpt2_layers)
        answer_sampling = stage_one.checkpoint["settings"]["answer_sampling"]
        datasets = train.prepare(model, encoders, vocab, rows, cfg, precision, answer_sampling)
        unseen = rows[rows["split"] != "train"]
        counts = count_trained(unseen, datasets["train"].store.image_digests, stage_one.checkpoint["trained_on"])
        refuse_trained(counts, "validation and test", cfg.checkpoint, cfg.allow_trained_images)
        learning_rates = {"head": cfg.learning_rate, "clip": cfg.clip_learning_rate, "gpt2": cfg.gpt2_learning_rate}
        train.fit("fine tuning", model, encoders, datasets, learning_rates, cfg, precision, earlier_stages,
                  stage_one.checkpoint)


if __name__ == "__main__":
    settings.run(main, Config)
