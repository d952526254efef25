"""A student adds a fusion: one class and one entry in model.py, and it trains, is saved, and is scored."""
import json
import shutil

import tiny
from conftest import ROOT, call_script, call_scripts
from test_imports import FOLDERS

from features.trained_model import read_checkpoint

MINE = '''
class MyFusion(nn.Module):
    """The product of image and question."""

    def __init__(self, hidden_size, dropout):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(hidden_size))

    def forward(self, image, question):
        return self.scale * image * question, torch.full_like(image, torch.nan)


FUSIONS = {"mine": MyFusion, '''


def test_a_new_fusion_is_one_class_and_one_entry(encoder_flags, data_dir, tmp_path):
    for path in [*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.*"))]:
        copy = tmp_path / "code" / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    text = (tmp_path / "code/model.py").read_text()
    assert text.count("\nFUSIONS = {") == 1
    (tmp_path / "code/model.py").write_text(text.replace("\nFUSIONS = {", MINE))
    score = ["test.py", "--data-dir", data_dir, "--checkpoint", "one/vqa_checkpoint.pt", "--num-pictures", 2]
    call_scripts(["train.py", *encoder_flags, "--data-dir", data_dir, "--fusion", "mine", "--hidden-size", 24, "--epochs", 2,
                  "--output-dir", "one"], score, root=tmp_path / "code", cwd=tmp_path)
    checkpoint = read_checkpoint(tmp_path / "one/vqa_checkpoint.pt")
    assert checkpoint["model_config"]["fusion"] == "mine"
    assert [name for name in checkpoint["weights"] if name.startswith("fusion.")] == ["fusion.scale"]
    assert (checkpoint["weights"]["fusion.scale"] != 1).any(), "it was trained"
    metrics = json.loads((tmp_path / "output/vqa_test_metrics.json").read_text())
    assert metrics["scores"]["mean_sentence_bleu"]["value"] > 0
    assert len(tiny.read_csv(tmp_path / "output/vqa_test_results.csv")) == 30
    # the unchanged repository names the choice that it lacks
    assert "the model's fusion 'mine' is none of gated, constant, concat" in call_script(*score, expect=2, cwd=tmp_path)
