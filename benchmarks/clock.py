"""How long something takes: synchronised, warmed up, the median of repeats; and what the machine can do at best."""
import gc
import math
import os
import platform
import resource
import statistics
import time

import torch

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
MEGABYTE = 1e6


class Clock:
    """Times work on one device.

    `repeats`: how many measurements a median is of; each calls the work so often that it lasts about `repeat_s` seconds.
    """

    def __init__(self, device, repeats, repeat_s):
        self.device, self.repeats, self.repeat_s = device, repeats, repeat_s

    def now(self):
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def once(self, work):
        """(seconds of one call of `work`, what it returned)."""
        started = self.now()
        result = work()
        return self.now() - started, result

    def seconds(self, work, warm_up=1):
        """Median seconds of one call of `work` after `warm_up` calls (at least one)."""
        for _ in range(warm_up):
            one_s, _ = self.once(work)
        if one_s < self.repeat_s:  # the very first call often does more than the others
            one_s, _ = self.once(work)
        calls = math.ceil(self.repeat_s / one_s)

        def repeat():
            for _ in range(calls):
                work()

        return statistics.median(self.once(repeat)[0] / calls for _ in range(self.repeats))

    def forget_peak(self):
        """Start to watch what tensors take on the device, without what earlier measurements left there."""
        if self.device.type == "cuda":
            gc.collect()  # a captured step refers to itself
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_mb(self):
        """Megabytes that tensors took on the device at most since `forget_peak`, or None on the CPU."""
        return torch.cuda.max_memory_allocated(self.device) / MEGABYTE if self.device.type == "cuda" else None


def matrix_rate(clock, dtype):
    """Operations per second (2 n^3 for n x n) of a large matrix product in `dtype`, None for float32."""
    size = MATRIX_SIZE[clock.device.type]
    left, right = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * size ** 3 / clock.seconds(lambda: torch.mm(left, right, out=product))


def own_peak_mb():
    """Megabytes of host memory that this process took at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MEGABYTE


def describe_machine(precision):
    """{what: value} of what the numbers of a run depend on."""
    on_cuda = precision.device.type == "cuda"
    return {"device": torch.cuda.get_device_name(precision.device) if on_cuda else "CPU", "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)), "threads": torch.get_num_threads(), "amp": precision.amp,
            "python": platform.python_version(), "torch": torch.__version__}


def processor_name():
    """The processor as Linux names it; elsewhere as Python does."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            return next((line.partition(":")[2].strip() for line in stream if line.startswith("model name")), "unknown")
    except FileNotFoundError:
        return platform.processor() or "unknown"
