"""A student adds a fusion: one class and one entry in model.py, and it trains, is saved, and is scored."""
import json
import shutil
import subprocess

import pytest
import tiny
from conftest import ROOT

from training.checkpoint import read_checkpoint

MINE = '''
class MyFusion(nn.Module):
    """The product of image and question."""

    def __init__(self, hidden_size, dropout):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def forward(self, image, question):
        return self.scale * image * question, torch.full_like(image, torch.nan)


FUSIONS = {"mine": MyFusion, '''


@pytest.fixture
def own_copy(tmp_path):
    """A copy of the repository's scripts and their folders."""
    listed = subprocess.run(["git", "ls-files", "*.py", "*.html"], cwd=ROOT, text=True, capture_output=True)
    if listed.returncode:
        pytest.skip("needs git and the repository's own .git folder")
    for name in listed.stdout.splitlines():
        if not name.startswith(("tests/", "demo/", "benchmarks/")) and (ROOT / name).is_file():
            (tmp_path / "code" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "code" / name)
    return tmp_path / "code"


def test_a_new_fusion_is_one_class_and_one_entry(own_copy, run_script, encoder_flags, data_dir, tmp_path):
    text = (own_copy / "model.py").read_text()
    assert text.count("\nFUSIONS = {") == 1
    (own_copy / "model.py").write_text(text.replace("\nFUSIONS = {", MINE))
    run_script("train.py", *encoder_flags, "--data-dir", data_dir, "--fusion", "mine", "--hidden-size", 24, "--epochs", 2,
               root=own_copy, cwd=tmp_path)
    checkpoint_path = "output/feature_extraction/vqa_checkpoint.pt"
    checkpoint = read_checkpoint(tmp_path / checkpoint_path)
    assert checkpoint["model_config"]["fusion"] == "mine"
    assert [name for name in checkpoint["weights"] if name.startswith("fusion.")] == ["fusion.scale"]
    assert (checkpoint["weights"]["fusion.scale"] != 1).any(), "it was trained"

    run_script("test.py", "--data-dir", data_dir, "--checkpoint", checkpoint_path, "--num-pictures", 2, root=own_copy,
               cwd=tmp_path)
    metrics = json.loads((tmp_path / "output/vqa_test_metrics.json").read_text())
    assert metrics["scores"]["mean_sentence_bleu"]["value"] > 0
    assert len(tiny.read_csv(tmp_path / "output/vqa_test_results.csv")) == 30
    # the unchanged repository names the choice that it lacks
    error = run_script("test.py", "--data-dir", data_dir, "--checkpoint", checkpoint_path, cwd=tmp_path, expect=2).stderr
    assert "the model's fusion 'mine' is none of gated, concat" in error and error.count("\n") == 1
