"""Several processes, as `torchrun --nproc-per-node=N` starts them. With one process every function here does nothing.

The functions are named as in torch.distributed. Rank 0 prints and writes files.
"""
import atexit
import datetime
import os

import torch
import torch.distributed as dist

from common.settings import environment_number

MEETING_SECONDS = 120  # for all processes to start; importing torch may take half of it
REMEDY = "start all processes with torchrun, or unset WORLD_SIZE to train with one"


def init_process_group(device):
    """Connect to the other processes if torchrun started some: over NCCL on CUDA, over gloo on a CPU.

    Raises ValueError if torchrun's environment variables are incomplete, or if a process is missing.
    """
    world_size = environment_number("WORLD_SIZE", 1)
    if world_size <= 1:
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]:
        raise ValueError(f"the environment variable WORLD_SIZE is {world_size}, but {', '.join(missing)} not set: {REMEDY}")
    rank, address = environment_number("RANK", 0), f"{os.environ['MASTER_ADDR']}:{environment_number('MASTER_PORT', 0)}"
    if not 0 <= rank < world_size:
        raise ValueError(f"the environment variable RANK is {rank}, but WORLD_SIZE is {world_size}: {REMEDY}")
    try:
        store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=MEETING_SECONDS)))
    except RuntimeError as error:
        raise ValueError(f"the {world_size} processes of WORLD_SIZE did not meet at {address} within {MEETING_SECONDS} s "
                         f"({str(error).splitlines()[0]:.200}): {REMEDY}") from error
    store.set_timeout(dist.default_pg_timeout)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world_size)
    atexit.register(dist.destroy_process_group)
    print(f"{world_size} processes train together")


def get_rank():
    """The number of this process, 0 to get_world_size() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def get_world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def broadcast(value=None):
    """Rank 0's `value` (any picklable object), in every process."""
    values = [value]
    if get_world_size() > 1:
        dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather(value):
    """The `value` of every process (any picklable object), ordered by rank, in every process."""
    values = [value]
    if get_world_size() > 1:
        values = [None] * get_world_size()
        dist.all_gather_object(values, value)
    return values


def all_reduce(tensor):
    """The sum of `tensor` over all processes, in place and returned."""
    if get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def barrier():
    """Wait until every process has called this."""
    if get_world_size() > 1:
        dist.barrier()


def shard(rows):
    """This process's part of `rows` (a tensor): contiguous, so that the rows of one image stay together."""
    return rows.tensor_split(get_world_size())[get_rank()]


def data_parallel(model):
    """The model, wrapped to average gradients over the processes if there are several."""
    if get_world_size() == 1:
        return model
    # a model with one input leaves the projection of the other one without a gradient
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=model.config.inputs != "both")
