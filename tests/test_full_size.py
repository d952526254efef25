"""The whole of VQA v2, generated: its texts are read in bounded memory, its pictures' states are never held in it."""
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_full_training_set_fits(tmp_path):
    result = subprocess.run([sys.executable, ROOT / "benchmarks/full_size.py", "--tiny", "--output-dir", tmp_path],
                            text=True, capture_output=True, timeout=850, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stderr
    numbers = json.loads((tmp_path / "full_size.json").read_text())
    text, training = numbers["text"], numbers["training"]
    assert text["questions file, MB"] > 40 and text["annotations file, MB"] > 300
    for name in ("mini_vqa_v2.py, peak MB", "reading rows and human answers, peak MB"):
        assert text[name] < 3000, name
    grown = training["private memory at the end, MB"] - training["private memory after a tenth of the steps, MB"]
    assert training["rows"] > 300_000 and grown < 50, "memory that grows with the steps"
    assert [path.name for path in tmp_path.iterdir()] == ["full_size.json"]
