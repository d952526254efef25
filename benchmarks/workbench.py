"""The parts of the project that are measured, put together from the benchmark's inputs as the scripts put them together."""
import contextlib
import copy
import io
from dataclasses import dataclass
from pathlib import Path

import torch

import fine_tune
import train
from benchmarks.clock import Clock
from benchmarks.operations import times_fewer
from features.encoders import load_encoders
from features.pixels import cores, decode_images
from features.store import build_store
from preprocess import VQADataset, read_rows
from training.checkpoint import FIXED, build_model
from vocab import SPECIALS, Vocab

FAIR_BATCH = {"cpu": 32, "cuda": 256}  # at which the plain loop is compared batch for batch
MORE_BATCHES = {"cpu": {"stage 1": (64,), "stage 2": ()},
                "cuda": {"stage 1": (1024, 4096), "stage 2": (1024, 2048)}}
REPEAT_S = {"tiny": 0.1, "real": 0.5}  # that a measurement lasts at least


@dataclass
class Stage:
    """One of the two stages, at the cut and with the settings that its script has by default."""

    name: str
    published_batch: int  # of the implementation that the project is compared with
    loop: object  # the script's Config
    clip_layers: int
    gpt2_layers: int
    learning_rates: dict


STAGES = (
    Stage("stage 1", 16, train.Config(), 0, 0, {"head": train.Config.learning_rate}),
    Stage("stage 2", 8, fine_tune.Config(), fine_tune.Config.clip_layers, fine_tune.Config.gpt2_layers,
          {"head": fine_tune.Config.learning_rate, "clip": fine_tune.Config.clip_learning_rate,
           "gpt2": fine_tune.Config.gpt2_learning_rate}))


class Workbench:
    """Inputs, encoders and settings of a run, and the models and data sets made of them."""

    def __init__(self, inputs, precision, cfg, work):
        """`work`: a folder for what a run needs only while it runs."""
        self.inputs, self.precision, self.seed, self.work = inputs, precision, cfg.seed, Path(work)
        self.clock = Clock(precision.device, cfg.repeats, REPEAT_S["tiny" if cfg.tiny else "real"])
        self.device = precision.device.type
        self.workers, self.compile, self.tiny = cfg.workers or cores(), cfg.compile, cfg.tiny
        self.rows = read_rows(inputs.data_dir)
        self.encoders = load_encoders(inputs.clip_model, "", inputs.gpt2_model)
        self.vocab = Vocab([*SPECIALS, *inputs.answer_words])  # as large as the mini set's
        self.sizes = {name: getattr(train.Config, name) for name in FIXED}
        self.wanted_batches = {"stage 1": cfg.stage_1_batches, "stage 2": cfg.stage_2_batches}

    def batches(self, stage):
        """Batch sizes at which a stage is measured: the published one, the fair one, further ones that the rows fill."""
        further = self.wanted_batches[stage.name] or MORE_BATCHES[self.device][stage.name]
        sizes = sorted({stage.published_batch, FAIR_BATCH[self.device], *further})
        return [size for size in sizes if size <= len(self.rows)]

    def plain_batches(self, stage):
        """Batch sizes at which the plain loop is measured."""
        return [stage.published_batch, FAIR_BATCH[self.device]]

    def model(self, stage):
        """A fresh VQAModel at the stage's cut on the device, with encoders of its own."""
        torch.manual_seed(self.seed)
        model = build_model(copy.deepcopy(self.encoders), len(self.vocab), self.sizes)
        model.unfreeze(stage.clip_layers, stage.gpt2_layers)
        return model.to(self.precision.device)

    def decode(self, rows, cache_dir, decoder="pillow", data_dir=None):
        """The PixelStore of the rows' pictures, decoded unless `cache_dir` has it."""
        return decode_images(data_dir or self.inputs.data_dir, rows["image_path"], self.encoders.image, cache_dir,
                               self.workers, decoder)

    def dataset(self, model, rows=None, cache_dir=None, data_dir=None):
        """The VQADataset of `rows` (all of them by default) at the model's cut, through the cache."""
        rows = self.rows if rows is None else rows
        cache_dir = cache_dir or self.work / "cache"
        with contextlib.redirect_stdout(io.StringIO()):  # what train.py prints of lengths says nothing here
            pixels = self.decode(rows, cache_dir, data_dir=data_dir)
            store = build_store(model, self.encoders, pixels, rows["question"], self.sizes["question_max_len"], cache_dir,
                                self.precision)
        return VQADataset(rows, self.vocab, self.sizes["answer_max_len"], store)

    def times_fewer(self, model, epochs):
        """How many times fewer operations training on all rows from the cache needs, by count (operations.py)."""
        image = self.encoders.image.visual
        lengths = [len(ids) for ids in self.encoders.question.tokenizer(list(self.rows["question"]))["input_ids"]]
        return times_fewer(model, len(self.rows), self.rows["image_path"].nunique(), self.rows["question"].nunique(),
                           image.positional_embedding.shape[0], sum(lengths) / len(lengths), epochs)
