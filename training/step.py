"""The loss, its evaluation, and one training step."""
import torch
import torch.nn.functional as F

from common import distributed
from common.device import explain_out_of_memory
from vocab import PAD


def answer_loss(model, batch, label_smoothing=0.0):
    """Summed cross-entropy (nats) of the answer words, and how many words were scored."""
    inputs, targets = batch["answer_ids"][:, :-1], batch["answer_ids"][:, 1:]  # (B, A-1) each
    logits = model(batch, inputs)                                              # (B, A-1, V)
    loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(),
                           ignore_index=PAD, label_smoothing=label_smoothing, reduction="sum")
    return loss, (targets != PAD).sum()


@torch.no_grad()
def evaluate(model, dataset, batch_size, precision, order=None):
    """Mean loss in nats per answer word (<end> counts as one), in eval mode, without label smoothing.

    `order` (n,) selects rows, all by default. Batches are twice `batch_size`, since no gradients are kept.
    """
    model.eval()
    order = torch.arange(len(dataset)) if order is None else order
    totals = torch.zeros(2, device=precision.device, dtype=precision.sum_dtype)  # nats, words
    for rows in order.split(2 * batch_size)[distributed.get_rank()::distributed.get_world_size()]:
        with explain_out_of_memory(batch_size), precision.autocast():
            totals += torch.stack(answer_loss(model, dataset.batch(rows)))
    nats, words = distributed.all_reduce(totals).tolist()
    return nats / words


def train_step(model, batch, optimizer, scaler, precision, cfg, weight=1):
    """One optimizer step on `batch`; returns [summed loss, number of words] (2,), without synchronising the device.

    `weight` is 0 if this process has no rows in this step: it takes part, but does not count.
    """
    # forward
    with precision.autocast():
        loss, words = answer_loss(model, batch, cfg.label_smoothing)
    loss, words = loss * weight, words * weight
    # the mean over the words of all processes, whose gradients are averaged
    mean = loss * (distributed.get_world_size() / distributed.all_reduce(words.clone()))
    # backward, on the scaled loss: small fp16 gradients would become 0
    scaler.scale(mean).backward()
    # clip the true gradients, not the scaled ones
    scaler.unscale_(optimizer)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, cfg.max_grad_norm)
    # step, unless a gradient overflowed, and choose the next scale
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss.detach(), words.to(loss.dtype)])
