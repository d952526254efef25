"""AdamW with one learning rate per origin of the weights, warm-up and cosine."""
import math

import torch


def make_optimizer(model, learning_rates, weight_decay, captured=False):
    """AdamW (Loshchilov and Hutter 2019) with one learning rate per origin of the weights.

    `learning_rates`: {"head": peak, ...}, one for each group of `model.parameter_groups()`. No decay on norms, biases
    and embeddings. `captured`: for a CUDA graph, in which a learning rate must be a tensor on the device.
    """
    device = model.decoder.embedding.weight.device
    groups = []
    for name, parameters in model.parameter_groups().items():
        matrices = [p for p in parameters if p.dim() >= 2 and p is not model.decoder.embedding.weight]
        chosen = set(map(id, matrices))
        rest = [p for p in parameters if id(p) not in chosen]
        for part, decay in ((matrices, weight_decay), (rest, 0.0)):
            groups.append({"params": part, "name": name, "peak": learning_rates[name], "weight_decay": decay,
                           "lr": torch.zeros((), device=device) if captured else 0.0})
    return torch.optim.AdamW(groups, lr=0.0, fused=True, capturable=captured)


def schedule(step, total_steps, warmup_steps):
    """Factor 0..1 on the peak learning rate: linear warm-up, then a cosine to 0 (Loshchilov and Hutter 2017)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))


def set_rates(optimizer, factor):
    """Set every group's learning rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(group["peak"] * factor)
        else:
            group["lr"] = group["peak"] * factor


def load_optimizer(optimizer, state):
    """Put back the `state_dict()` of an interrupted run; the learning rates stay what they are here, numbers or the
    tensors on the device that a captured step reads, since every step sets them anew."""
    rates = [group["lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def group_rates(optimizer, key="lr"):
    """{"learning_rate_head": value, ...}: what the groups hold under `key`, "lr" or "peak"."""
    return {f"learning_rate_{group['name']}": float(group[key]) for group in optimizer.param_groups}


def steps_taken(optimizer):
    """How many steps changed the weights: a step whose fp16 gradients overflowed does not count."""
    state = next((state for state in optimizer.state.values() if "step" in state), None)
    return int(state["step"]) if state else 0
