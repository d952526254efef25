"""Other systems than Linux: what macOS and Windows lack is taken away, and the four scripts run. Metal: only the precision."""
import json

import pytest
import torch
from builder import NAMES, many_entries, write_official
from conftest import ROOT, call_scripts
from image_server import draw_jpeg
from test_imports import FILES, imported_modules

from common.device import BF16_WIDTH, Precision

# Python runs this file at its start. Without os.fork images are decoded in spawned processes, as on both systems.
LACKS = """
import os
for name in ("sched_getaffinity", "posix_fallocate", "sync", "fork"):
    delattr(os, name)
true_replace = os.replace

def replace(source, target):
    with open("/proc/self/maps") as stream:
        if str(source) in stream.read():
            raise PermissionError(13, "Windows renames no file that is mapped", str(source))
    true_replace(source, target)

os.replace = replace
"""
UNIX_MODULES = {"fcntl", "grp", "pwd", "resource", "termios"}


def test_the_four_scripts_run_without_what_other_systems_lack(encoder_flags, tmp_path):
    (tmp_path / "system").mkdir()
    (tmp_path / "system/sitecustomize.py").write_text(LACKS)
    (tmp_path / "coco").mkdir()
    for name in NAMES:
        (tmp_path / "coco" / name).write_bytes(draw_jpeg(name))
    write_official(tmp_path / "vqa", many_entries(per_image=1))
    loop = ["--epochs", 1, "--workers", 2, "--patience", 1]
    outputs = call_scripts(
        ["mini_vqa_v2.py", "--vqa-dir", "vqa", "--image-dir", "coco"],
        ["train.py", *encoder_flags, *loop, "--hidden-size", 24, "--min-word-freq", 1],
        ["fine_tune.py", *loop, "--clip-layers", 1, "--gpt2-layers", 1],
        ["test.py", "--num-pictures", 1], ["test.py", "--num-pictures", 1, "--device", "mps"],
        cwd=tmp_path, prefix=["env", f"PYTHONPATH={tmp_path / 'system'}:{ROOT}:{ROOT / 'tests'}"])
    assert not [output for output in outputs[:4] if output.startswith("error")], outputs
    assert "verdict:" in outputs[3] and "no Metal device" in outputs[4]
    assert json.loads((tmp_path / "output/vqa_test_metrics.json").read_text())["num_questions"] > 3


def test_no_module_of_unix_is_imported():
    assert not [path for path in FILES if UNIX_MODULES & set(imported_modules(path))]


def test_metal_computes_in_float32_without_mixed_precision(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    precision = Precision("mps")
    assert (precision.amp, precision.dtype, precision.sum_dtype) == ("off", None, torch.float32)
    assert str(precision).startswith("MPS, ") and not precision.scaler().is_enabled()
    with precision.autocast():
        assert torch.ones(2).sum().dtype == torch.float32
    for amp in ("bf16", "fp16"):
        with pytest.raises(ValueError, match=f"--amp {amp} is not supported on --device mps: use --amp off"):
            Precision("mps", amp)
    assert Precision("auto").device.type != "mps"


@pytest.mark.parametrize("supported, amp, width, dtype", [
    (True, "auto", BF16_WIDTH, torch.bfloat16), (True, "auto", BF16_WIDTH - 1, None), (True, "off", 768, None),
    (False, "auto", 768, None)])
def test_auto_uses_bf16_for_large_frozen_encoders_on_a_cpu_that_has_it(supported, amp, width, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: supported)
    precision = Precision("cpu", amp)
    assert precision.frozen_dtype(width) == dtype
    assert precision.dtype is None, "all that is trained stays in float32"
