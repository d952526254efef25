"""Checkpoints: what they hold of the model, and how they are written. `features.trained_model` reads them."""
import dataclasses
import io

import torch

from common.files import atomic_write
from features.trained_model import FORMAT


def describe_model(model, encoders, vocab):
    """The part of a checkpoint that rebuilds the model around its trained weights."""
    return {"vocab": vocab.words, "model_config": dataclasses.asdict(model.config), "encoders": encoders.describe(),
            "trainable_blocks": {"clip_layers": model.clip_layers, "gpt2_layers": model.gpt2_layers}}


def save_checkpoint(path, content):
    """Write `content`, a dict of tensors and plain Python, atomically. Raises OSError if the disk is full.

    It is written through a buffer: then equal content gives equal bytes, whatever the file's name is.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **content}, buffer)
    with atomic_write(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())
