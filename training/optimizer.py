"""AdamW with one learning rate per parameter group, and the learning-rate schedule: warm-up, then cosine."""
import math

import torch


def make_optimizer(model, learning_rates, weight_decay):
    """AdamW (Loshchilov and Hutter 2019). No weight decay on norms, biases and embeddings.

    `learning_rates`: {"head": max_lr, ...}, one for each group of `model.parameter_groups()`.
    """
    embeddings = {id(module.weight) for module in model.decoder.modules() if isinstance(module, torch.nn.Embedding)}
    groups = []
    for name, parameters in model.parameter_groups().items():
        decayed = [p for p in parameters if p.dim() >= 2 and id(p) not in embeddings]
        others = [p for p in parameters if all(p is not d for d in decayed)]
        for part, decay in ((decayed, weight_decay), (others, 0.0)):
            groups.append({"params": part, "name": name, "max_lr": learning_rates[name], "weight_decay": decay})
    return torch.optim.AdamW(groups, lr=0.0, fused=True)


def schedule(step, total_steps, warmup_steps):
    """Factor 0..1 on the maximal learning rate: linear warm-up, then a cosine to 0 (Loshchilov and Hutter 2017)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_learning_rates(optimizer, factor):
    """Set every group's learning rate to `factor` times its maximum."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["max_lr"]


def learning_rates_of(optimizer, factor):
    """{"learning_rate_head": value, ...}: `factor` times the maximum of each group."""
    return {f"learning_rate_{group['name']}": factor * group["max_lr"] for group in optimizer.param_groups}


def steps_taken(optimizer):
    """The number of steps that changed the weights. A step whose fp16 gradients overflowed does not count."""
    state = next((state for state in optimizer.state.values() if "step" in state), None)
    return int(state["step"]) if state else 0
