"""One process or several: what `torchrun --nproc-per-node=N` starts, and nothing of it where there is one process.

With one process every function here is free: rank 0 of 1, nothing to wait for, nothing to share.
"""
import atexit
import os

import torch
import torch.distributed as dist


def get_rank():
    """This process's number, 0 to get_world_size() - 1; rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """How many processes work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def init_process_group(device):
    """Meet the other processes that torchrun started, if it did: over NCCL on CUDA, over gloo on the CPU."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(dist.destroy_process_group)
        print(f"{get_world_size()} processes work together")


def broadcast(value=None):
    """Rank 0's `value` (any picklable object) in every process; waits for all of them."""
    if get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def all_gather(value):
    """The `value` of every process (any picklable object) in order of rank, in every process."""
    if get_world_size() == 1:
        return [value]
    values = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce(tensor):
    """The sum of `tensor` over all processes, in place and returned."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Return when every process has come here."""
    if get_world_size() > 1:
        dist.barrier()


def shard(rows):
    """This process's part of `rows` (a tensor): contiguous, as even as can be, so that a picture's rows stay together."""
    return rows.tensor_split(get_world_size())[get_rank()] if get_world_size() > 1 else rows


def any_rank(flag):
    """Whether `flag` is true in any process."""
    return flag if get_world_size() == 1 else any(all_gather(bool(flag)))


def data_parallel(model):
    """The model as it is, or wrapped so that a backward pass averages the gradients of all processes."""
    if get_world_size() == 1:
        return model
    # a model that may not see the picture or the question leaves that side's projection without a gradient
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=model.inputs != "both")
