"""Measures durations and subprocesses, and describes the machine."""
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


def time_once(work, device):
    """Seconds of one call of `work`, until the device has finished."""
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def time_median(work, device, repeats, repeat_s):
    """Median seconds per call of `work`: `repeats` measurements of at least `repeat_s` seconds, after one warm-up call."""
    time_once(work, device)
    calls = max(1, math.ceil(repeat_s / time_once(work, device)))

    def repeat():
        for _ in range(calls):
            work()

    return statistics.median(time_once(repeat, device) / calls for _ in range(repeats))


def matrix_rate(device, dtype):
    """Floating-point operations per second of a large matrix product (2 n^3 for n x n); `dtype` None is float32."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / time_median(lambda: left @ right, device, repeats=3, repeat_s=0.5)


@dataclass
class Finished:
    """A process that ran to its end."""

    seconds: float
    ready_s: float | None  # until the first line of output that starts with `ready`; None if there is none
    peak_mb: float  # of host memory, of its largest process; never below the memory of the process that started it


def run_process(command, folder, ready="\0"):
    """Run a command in `folder`. Raises ValueError with the last line of its messages if it fails."""
    command, log, ready_s, started = list(map(str, command)), Path(folder) / "stderr.log", None, time.perf_counter()
    with open(log, "wb") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors)
    with process.stdout:
        for line in process.stdout:
            if ready_s is None and line.startswith(ready.encode()):
                ready_s = time.perf_counter() - started
    _, status, usage = os.wait4(process.pid, 0)  # the usage of this process and its children alone
    seconds, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
    if process.returncode:
        last_line = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise ValueError(f"`{' '.join(command)}` ended with status {process.returncode}: {' '.join(last_line):.300}")
    return Finished(seconds, ready_s, usage.ru_maxrss * 1024 / MEGABYTE)


def describe_machine(precision):
    """{name: value} of the hardware and software that the numbers depend on."""
    device, processor = precision.device, platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {"device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU", "processor": processor,
            "threads": torch.get_num_threads(), "amp": precision.amp, "python": platform.python_version(),
            "torch": torch.__version__, "matrix_tflops": matrix_rate(device, precision.dtype) / 1e12}
