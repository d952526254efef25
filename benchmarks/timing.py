"""Measures rates, operations and subprocesses, and describes the machine."""
import os
import platform
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
MEGABYTE = 1e6


def measure_rate(count, work, seconds):
    """`count` divided by the median seconds of a call of `work`. Calls it for at least `seconds`, after a warm-up."""
    timer = Timer("work()", globals={"work": work}, num_threads=torch.get_num_threads())
    return count / timer.blocked_autorange(min_run_time=seconds).median


def matrix_rate(device, dtype):
    """Floating-point operations per second of a large matrix product (2 n^3 for n x n); `dtype` None is float32."""
    size = MATRIX_SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return measure_rate(2 * size ** 3, lambda: left @ right, seconds=1)


def count_operations(work):
    """Floating-point operations of matrix products and convolutions in one call of `work`, forward and backward."""
    torch.backends.mha.set_fastpath_enabled(False)  # torch cannot count the operations of fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops()


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
