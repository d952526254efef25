"""Where to compute, and how precisely."""
import contextlib
import os

import torch

AMP_MODES = ("auto", "bf16", "fp16", "off")


@contextlib.contextmanager
def fits_memory(batch_size, flag="--batch-size"):
    """Running out of the device's memory becomes a ValueError that says which batch size to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"try {flag} {max(1, batch_size // 2)}" if batch_size > 1 else "one row alone is too much: use --device cpu"
        raise ValueError(f"{flag} {batch_size} does not fit the device's memory: {smaller}") from error


def within_memory(compute, rows, precision):
    """[`compute(rows)`] of a slice under autocast, or what its halves give where the device's memory is too small for it."""
    try:
        with precision.autocast():
            return [compute(rows)]
    except torch.OutOfMemoryError:
        if rows.stop - rows.start == 1:
            raise ValueError("one picture or question alone does not fit the device's memory: use --device cpu") from None
    middle = (rows.start + rows.stop) // 2
    return [part for half in (slice(rows.start, middle), slice(middle, rows.stop))
            for part in within_memory(compute, half, precision)]


def slices_of(count, size):
    """The slices of `size` that cover `count` rows; the last one is as long as it is."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


class Precision:
    """The device and the autocast dtype of a run: bf16 where the device has it, else fp16, off on CPU unless asked."""

    def __init__(self, device="auto", amp="auto", capture=False):
        """Raises ValueError for a device that is not there, a mode or a `capture` (capture.py) that it cannot do."""
        if amp not in AMP_MODES:
            raise ValueError(f"--amp {amp} is none of {', '.join(AMP_MODES)}")
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if name == "cuda":  # of several processes on one machine each takes its own card
            name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(name)
        except RuntimeError as error:
            raise ValueError(f"--device {device} is no device; use auto, cpu, cuda or cuda:1") from error
        if self.device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {device} is not supported; use auto, cpu, cuda or cuda:1")
        if self.device.type == "cuda" and (self.device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
        on_cuda = self.device.type == "cuda"
        if on_cuda:
            torch.cuda.set_device(self.device)
        if amp == "fp16" and not on_cuda:
            raise ValueError("--amp fp16 needs a CUDA device; on CPU use --amp off or --amp bf16")
        if amp == "auto" and on_cuda:
            # emulated bf16 is slower than fp16
            amp = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        elif amp == "auto":
            amp = "off"
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if capture and (not on_cuda or amp == "fp16" or processes > 1):
            raise ValueError("--capture needs a CUDA device, --amp bf16 or off and one process, and this run has "
                             f"{self.device.type}, {amp} and {processes}; use --no-capture")
        self.amp = amp
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def scaler(self):
        """A gradient scaler; disabled (every call a no-op) unless training in fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return f"{name}, {torch.get_num_threads()} threads, amp {self.amp}"
