"""benchmarks/full_size.py: text is read in bounded memory, and stored states are never loaded into memory."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.parametrize("flags", [
    pytest.param(("--questions", "5000", "--images", "1000", "--steps", "40"), id="small"),
    pytest.param((), id="as large as VQA v2", marks=[pytest.mark.slow, pytest.mark.timeout(900)])])
def test_memory_is_bounded(tmp_path, flags):
    result = subprocess.run([sys.executable, ROOT / "benchmarks/full_size.py", "--tiny", "--output-dir", tmp_path, *flags],
                            text=True, capture_output=True, timeout=850, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "full_size.json").read_text())
    text, training = numbers["text"], numbers["training"]
    for name in ("mini_vqa_v2.py", "reading the data set"):
        assert text[f"{name}, peak MB"] < 3000, name
    growth = training["private memory at the end, MB"] - training["private memory after a tenth of the steps, MB"]
    assert growth < 50, "memory that grows with the steps"
    if not flags:
        assert text["questions file, MB"] > 40 and text["annotations file, MB"] > 300 and training["rows"] > 300_000
    assert [path.name for path in tmp_path.iterdir()] == ["full_size.json"]
