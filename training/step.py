"""The loss, how it is measured, and one training step: forward, scale, backward, unscale, clip, step, update."""
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from common import distributed
from common.device import fits_memory
from training.capture import CapturedStep
from training.optimizer import group_rates
from vocab import PAD


def answer_loss(model, batch, label_smoothing=0.0):
    """Summed cross-entropy (nats) of the answer words, and how many were scored."""
    inputs, targets = batch["answer_ids"][:, :-1], batch["answer_ids"][:, 1:]  # (B, A-1) each
    logits = model(batch, inputs)                                              # (B, A-1, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                           ignore_index=PAD, label_smoothing=label_smoothing, reduction="sum")
    return loss, (targets != PAD).sum()


@torch.no_grad()
def evaluate(model, dataset, batch_size, precision, order=None):
    """Mean loss in nats per answer word (the end counts as one), in eval mode, without smoothing.

    Takes twice `batch_size` rows at a time, as there are no gradients. ValueError where they do not fit the memory.
    """
    model.eval()
    order = torch.arange(len(dataset)) if order is None else order
    totals = torch.zeros(2, device=precision.device, dtype=torch.float64)  # nats, words
    for index in order.split(2 * batch_size)[distributed.get_rank()::distributed.get_world_size()]:
        with fits_memory(batch_size), precision.autocast():
            totals += torch.stack(answer_loss(model, dataset.batch(index)))
    nats, words = distributed.all_reduce(totals).tolist()
    return nats / words


class TrainingStep:
    """Call it with the rows of a batch: it trains the model on them. Several processes share the rows."""

    def __init__(self, model, dataset, optimizer, scaler, cfg, precision):
        self.model, self.dataset, self.optimizer, self.scaler = distributed.data_parallel(model), dataset, optimizer, scaler
        self.cfg, self.precision = cfg, precision
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.watch = LossWatch(precision.device)
        self.captured = CapturedStep(self.train_on, dataset, cfg.batch_size, precision) if cfg.capture else None

    def start_epoch(self, step, answer_index):
        """`step`: the number of the coming step; `answer_index` (N,): the answers that the epoch teaches."""
        self.model.train()
        self.watch.start(step)
        self.answer_index = answer_index
        if self.captured:
            self.captured.start_epoch(answer_index)

    def __call__(self, rows):
        """One step on `rows` (B,), a CPU tensor. ValueError where they do not fit the device's memory."""
        with fits_memory(self.cfg.batch_size):
            self.take(rows)

    def take(self, rows):
        """The step, captured or not, on this process's part of `rows`."""
        if self.captured and len(rows) == self.cfg.batch_size:
            self.captured(rows)
            return
        mine = distributed.shard(rows)
        batch = self.dataset.batch(mine if len(mine) else rows[:1], answer_index=self.answer_index)
        self.train_on(batch, weight=min(1, len(mine)))  # with fewer rows than processes some take part without a say

    def train_on(self, batch, weight=1):
        """The step itself; it never looks at the device. `weight` 0 takes the batch out of the mean."""
        with self.precision.autocast():
            loss, words = answer_loss(self.model, batch, self.cfg.label_smoothing)
        loss, words = loss * weight, words * weight
        # the mean over the words of all processes, whose gradients are averaged
        mean = loss * (distributed.get_world_size() / distributed.all_reduce(words.clone()))
        self.scaler.scale(mean).backward()
        self.scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.cfg.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.watch.add(loss.detach(), words)

    def look(self, epoch):
        """Mean training loss (nats per word, smoothed) since the epoch began; ValueError where a step's was not finite."""
        loss, bad_step = self.watch.look()
        if bad_step is not None:
            require_finite(math.nan, epoch, f"at step {bad_step}", group_rates(self.optimizer), self.cfg.output_dir)
        return loss


class LossWatch:
    """Sums up the loss on the device and notes there the first step at which it was not finite; a look waits for it."""

    def __init__(self, device):
        self.totals = torch.zeros(2, device=device)  # nats, words
        self.step, self.bad_step = torch.zeros(2, dtype=torch.long, device=device).unbind()

    def start(self, step):
        """A new epoch, whose coming step has the number `step`."""
        self.totals.zero_()
        self.step.fill_(step)
        self.bad_step.fill_(-1)

    def add(self, loss, words):
        """Note one step's summed loss and its number of words; nothing waits."""
        self.totals += torch.stack([loss, words.to(loss.dtype)])
        self.bad_step.copy_(torch.where((self.bad_step < 0) & ~loss.isfinite(), self.step, self.bad_step))
        self.step += 1

    def look(self):
        """(mean loss in nats per word, the first step whose loss was not finite or None)."""
        nats, words = self.totals.tolist()
        bad_step = int(self.bad_step)
        return nats / max(words, 1), bad_step if bad_step >= 0 else None


def require_finite(loss, epoch, where, rates, output_dir):
    """Raise ValueError that names epoch, place, learning rates and the last good checkpoint unless `loss` is finite."""
    if not math.isfinite(loss):
        rates = ", ".join(f"{name} {value:.3g}" for name, value in rates.items())
        raise ValueError(f"the loss became {loss} in epoch {epoch}, {where} ({rates}); the last good checkpoint is "
                         f"{Path(output_dir) / 'vqa_checkpoint.pt'}; try a lower --learning-rate")
