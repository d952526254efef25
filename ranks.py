"""One process or several: what `torchrun --nproc-per-node=N` starts, and nothing of it where there is one process.

With one process every function here is free: rank 0 of 1, nothing to wait for, nothing to share.
"""
import atexit
import os

import torch
import torch.distributed as dist


def rank():
    """This process's number, 0 to world_size() - 1; rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join(device):
    """Meet the other processes that torchrun started, if it did: over NCCL on CUDA, over gloo on the CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        print(f"{world_size()} processes work together")


def share(value=None):
    """Rank 0's `value` (any picklable object) in every process; waits for all of them."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather(value):
    """The `value` of every process (any picklable object) in order of rank, in every process."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def add_up(tensor):
    """The sum of `tensor` over all processes, in place and returned."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wait():
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def part_of(rows):
    """This process's part of `rows` (a tensor): contiguous, as even as can be, so that a picture's rows stay together."""
    return rows.tensor_split(world_size())[rank()] if world_size() > 1 else rows


def any_of(flag):
    """Whether `flag` is true in any process."""
    return flag if world_size() == 1 else any(gather(bool(flag)))


def parallel(model):
    """The model as it is, or wrapped so that a backward pass averages the gradients of all processes."""
    if world_size() == 1:
        return model
    # a model that may not see the picture or the question leaves that side's projection without a gradient
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=model.inputs != "both")
