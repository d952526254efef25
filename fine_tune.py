"""Stage 2: unfreeze the last N blocks of both encoders and train on, with one learning rate per origin of the weights.

Reads stage 1's checkpoint, which fixes encoders, vocabulary, lengths and sizes; writes the same files
as train.py into its own `output_dir`. The blocks below the freeze boundary stay constant, so training
starts from their stored outputs and never sees a picture file twice.
"""
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch

import train
from common import distributed, settings
from common.device import Precision
from features.pixels import decode_images
from preprocess import data_folder, data_hashes
from training.checkpoint import read_checkpoint, restore_model
from training.run_state import only_run_in


@dataclass
class Config:
    checkpoint: str = "output/feature_extraction/vqa_checkpoint.pt"
    """stage 1's best checkpoint"""
    data_dir: str = train.Config.data_dir
    """folder with metadata.csv and pictures, or a CSV; the same as in stage 1"""
    output_dir: str = "output/fine_tuning"
    """where checkpoints, log and curves go"""
    clip_layers: int = 4
    """last blocks of CLIP to train, with the final norm and the projection; 0 = none"""
    gpt2_layers: int = 4
    """last blocks of GPT-2 to train, with the final norm; 0 = none"""
    epochs: int = 10
    """at most; early stopping may end sooner"""
    batch_size: int = 64
    """questions per step"""
    learning_rate: float = 3e-4
    """peak for the head: below stage 1's, since it is trained already"""
    clip_learning_rate: float = 1e-5
    """peak for CLIP's blocks: 1e-5 to 3e-5 is what fine-tuning CLIP takes (Wortsman et al. 2022, WiSE-FT)"""
    gpt2_learning_rate: float = 5e-5
    """peak for GPT-2's blocks: GPT was fine-tuned with 6.25e-5 (Radford et al. 2018)"""
    weight_decay: float = train.Config.weight_decay
    """AdamW, on matrices only"""
    warmup_fraction: float = 0.1
    """share of all steps in which the learning rates rise from 0; then a cosine to 0"""
    label_smoothing: float = train.Config.label_smoothing
    """in the training loss only; logged losses are without it"""
    max_grad_norm: float = train.Config.max_grad_norm
    """gradients are scaled down to this norm"""
    patience: int = 3
    """epochs without a better validation loss before training stops"""
    amp: str = "auto"
    """auto, bf16, fp16, off; auto is off on CPU"""
    capture: bool = False
    """replay the training step as a CUDA graph: pays where a step is short; not with fp16 or several processes"""
    compile: bool = False
    """compile the encoders' blocks (torch.compile): takes a minute, pays on long runs"""
    cache_dir: str = train.Config.cache_dir
    """stored outputs of the frozen blocks"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1"""
    workers: int = train.Config.workers
    """processes that decode pictures; 0 = one per core"""
    seed: int = 42
    """of order and dropout"""
    resume: bool = False
    """continue the interrupted run in output_dir"""


def check_settings(cfg):
    train.check_loop_settings(cfg)
    for name in ("clip_layers", "gpt2_layers"):
        settings.check_range(cfg, name, low=0)
    for name in ("clip_learning_rate", "gpt2_learning_rate"):
        settings.check_range(cfg, name, low=0, low_open=True, high=1e6)
    if Path(cfg.output_dir).resolve() == Path(cfg.checkpoint).parent.resolve():
        raise ValueError(f"--output-dir {cfg.output_dir} is stage 1's own folder: choose another one")


def read_stage_one(path):
    """Stage 1's checkpoint, and its log for the curves; prints what is taken from it and whether it had finished."""
    checkpoint = read_checkpoint(path)
    if any(checkpoint["cut"].values()):
        raise ValueError(f"{path} is a fine-tuned checkpoint; stage 2 starts from stage 1's, such as {Config.checkpoint}")
    taken = {**checkpoint["encoders"], **checkpoint["sizes"], "vocabulary": f"{len(checkpoint['vocab'])} words"}
    taken.pop("fingerprints")
    print(f"from {path} (epoch {checkpoint['epoch']}, validation loss {checkpoint['val_loss']:.4f}): "
          + ", ".join(f"{name} {value}" for name, value in taken.items()))
    folder = Path(path).parent
    if (folder / "last.pt").is_file():
        try:
            state = read_checkpoint(folder / "last.pt", ("format", "state"))["state"]
        except ValueError as error:  # stage 2 needs nothing of it
            print(f"note: whether stage 1 had finished is not known: {error}")
            state = {"finished": True}
        if not state["finished"]:
            print(f"note: stage 1 was interrupted after epoch {state['epoch']}; the same train.py command with --resume "
                  f"finishes it (its settings are in {folder / 'config.json'})")
    log_file = folder / "train_log.csv"
    log = pd.read_csv(log_file).to_dict("records") if log_file.is_file() else []
    return checkpoint, [(checkpoint["stage"], log)] if log else []


def main(cfg):
    check_settings(cfg)
    precision = Precision(cfg.device, cfg.amp, cfg.capture)
    print(f"computing on {precision}")
    distributed.init_process_group(precision.device)
    checkpoint, earlier_stages = read_stage_one(cfg.checkpoint)
    with only_run_in(cfg.output_dir):
        rows = train.read_trainable_rows(cfg.data_dir)
        _, encoders, vocab, model = restore_model(cfg.checkpoint, checkpoint)
        sizes = checkpoint["sizes"]
        torch.manual_seed(cfg.seed)
        model.unfreeze(cfg.clip_layers, cfg.gpt2_layers)
        model.to(precision.device)
        pixels = decode_images(data_folder(cfg.data_dir), rows["image_path"], encoders.image, cfg.cache_dir, cfg.workers,
                                 sizes["picture_decoder"])
        train_set, val_set = train.make_datasets(model, encoders, pixels, pixels.readable(rows), vocab, sizes, cfg, precision)
        identity = {
            "stage": "fine tuning", "vocab": vocab.words, "sizes": sizes, "settings": dataclasses.asdict(cfg),
            "data": data_hashes(train_set, val_set, pixels), "encoders": checkpoint["encoders"],
            "cut": {"clip_layers": cfg.clip_layers, "gpt2_layers": cfg.gpt2_layers}}
        learning_rates = {"head": cfg.learning_rate, "clip": cfg.clip_learning_rate, "gpt2": cfg.gpt2_learning_rate}
        train.fit(model, train_set, val_set, learning_rates, cfg, precision, identity, earlier_stages)


if __name__ == "__main__":
    settings.run(main, Config)
