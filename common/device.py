"""The device, the numeric precision, and what to do if memory runs out."""
import contextlib

import torch

from common.settings import environment_number

DEVICES = "auto, cpu, cuda, cuda:1 or mps"
# Width of an encoder from which its frozen blocks compute in bf16, on a CPU with AMX (matrix instructions). From here on bf16
# is 1.5 to 3 times as fast; the demo's encoders (160 and 128) gain little, and so answer alike on every CPU. Without AMX bf16
# is slower than float32 (docs/speed.md).
BF16_WIDTH = 384


class Precision:
    """The device and the autocast dtype of a run. `auto`: bf16 if the GPU has it, else fp16; off on a CPU.

    On a CPU with AMX, `auto` lets frozen blocks of large encoders compute in bf16 (`frozen_dtype`).
    Training and all else stays in float32.
    """

    def __init__(self, device="auto", amp="auto"):
        """Raises ValueError if this machine lacks the device, or the device cannot do the mode."""
        # auto is never mps, on which this program has not been run
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        if name == "cuda":  # each process on this machine takes its own GPU
            name = f"cuda:{environment_number('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(name)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"--device {device} is no device; use {DEVICES}") from error
        on_cuda, on_mps = self.device.type == "cuda", self.device.type == "mps"
        if not (on_cuda or on_mps or self.device.type == "cpu"):
            raise ValueError(f"--device {device} is not supported; use {DEVICES}")
        if on_mps and not torch.backends.mps.is_available():
            raise ValueError(f"--device {device}: this machine has no Metal device that torch can use; use --device cpu")
        if on_mps and amp not in ("auto", "off"):
            raise ValueError(f"--amp {amp} is not supported on --device mps: use --amp off")
        if on_cuda and (self.device.index or 0) >= torch.cuda.device_count():
            raise ValueError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu")
        if amp == "fp16" and not on_cuda:
            raise ValueError("--amp fp16 needs a CUDA device; on CPU use --amp off or --amp bf16")
        if on_cuda:
            torch.cuda.set_device(self.device)
        self.bf16_frozen = amp == "auto" and self.device.type == "cpu" and torch.cpu._is_amx_tile_supported()
        if amp == "auto":  # emulated bf16 is slower than fp16
            bf16 = on_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
            amp = "off" if not on_cuda else "bf16" if bf16 else "fp16"
        self.amp = amp
        self.sum_dtype = torch.float32 if on_mps else torch.float64  # of sums over many batches: mps has no float64
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def frozen_dtype(self, width):
        """The dtype of the frozen blocks of an encoder of this width. None: float32, or that of autocast."""
        return torch.bfloat16 if self.bf16_frozen and width >= BF16_WIDTH else None

    def scaler(self):
        """A gradient scaler. It is disabled (every call does nothing) unless the dtype is fp16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def __str__(self):
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type.upper()
        frozen = f" (frozen blocks of width {BF16_WIDTH} or more: bf16)" if self.bf16_frozen else ""
        return f"{name}, {torch.get_num_threads()} threads, amp {self.amp}{frozen}"


@contextlib.contextmanager
def explain_out_of_memory(batch_size):
    """Turn running out of device memory into a ValueError that says which batch size to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = f"try --batch-size {batch_size // 2}" if batch_size > 1 else "one row alone is too much: use --device cpu"
        raise ValueError(f"--batch-size {batch_size} does not fit the device's memory: {smaller}") from error


def compute_in_slices(compute, rows, precision):
    """[`compute(rows)`] under autocast; `rows` is a slice. If memory runs out, split it in two and try again."""
    try:
        with precision.autocast():
            return [compute(rows)]
    except torch.OutOfMemoryError:
        if rows.stop - rows.start == 1:
            raise ValueError("one image or question alone does not fit the device's memory: use --device cpu") from None
    middle = (rows.start + rows.stop) // 2
    return [part for half in (slice(rows.start, middle), slice(middle, rows.stop))
            for part in compute_in_slices(compute, half, precision)]


def slices_of(count, size):
    """The slices of `size` that cover `count` rows. The last one may be shorter."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]
