"""Timing: median of repeated measurements, one subprocess, and what the machine is and can do."""
import math
import os
import platform
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
MEGABYTE = 1e6


class Clock:
    """Measures durations on one device: the median of `repeats` measurements of at least `repeat_s` seconds each."""

    def __init__(self, device, repeats, repeat_s):
        self.device, self.repeats, self.repeat_s = device, repeats, repeat_s

    def once(self, work):
        """Seconds of one call of `work`."""
        self.wait()
        started = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - started

    def seconds(self, work, warm_up=1):
        """Median seconds of one call of `work`, after `warm_up` calls."""
        for _ in range(warm_up):
            one_s = self.once(work)
        calls = max(1, math.ceil(self.repeat_s / one_s))

        def repeat():
            for _ in range(calls):
                work()

        return statistics.median(self.once(repeat) / calls for _ in range(self.repeats))

    def wait(self):
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matrix_rate(clock, dtype):
    """Floating-point operations per second of a large matrix product (2 n^3 for n x n); `dtype` None is float32."""
    size = MATRIX_SIZE[clock.device.type]
    left, right = (torch.randn(size, size, device=clock.device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / clock.seconds(lambda: left @ right)


@dataclass
class Finished:
    """A process that ran to its end."""

    seconds: float
    ready_s: float | None  # until the first line of output that starts with `ready`; None if there is none
    peak_mb: float  # of host memory, of its largest process


def run_process(command, folder, ready="\0"):
    """Run a command in `folder`. Raises ValueError with the last line of its messages if it fails."""
    log, ready_s, started = Path(folder) / "stderr.log", None, time.perf_counter()
    with open(log, "wb") as errors:
        process = subprocess.Popen(list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=errors)
        with process.stdout:
            for line in process.stdout:
                if ready_s is None and line.startswith(ready.encode()):
                    ready_s = time.perf_counter() - started
        _, status, usage = os.wait4(process.pid, 0)  # the usage of this process and its children alone
    seconds, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
    if process.returncode:
        last_line = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"`{' '.join(map(str, command))}` ended with status {process.returncode}: {' '.join(last_line):.300}")
    return Finished(seconds, ready_s, usage.ru_maxrss * 1024 / MEGABYTE)


def describe_machine(precision):
    """{name: value} of the hardware and software that the numbers depend on."""
    on_cuda = precision.device.type == "cuda"
    processor = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {"device": torch.cuda.get_device_name(precision.device) if on_cuda else "CPU", "processor": processor,
            "threads": torch.get_num_threads(), "amp": precision.amp, "python": platform.python_version(),
            "torch": torch.__version__}
