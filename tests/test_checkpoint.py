"""Checkpoint files that are damaged, foreign, dangerous, or do not fit the model are refused in one line."""
import math

import pytest
import torch

from features import trained_model
from features.trained_model import load_model, read_checkpoint
from training.checkpoint import save_checkpoint


@pytest.mark.parametrize("damage, message", [
    (lambda c: c.pop("vocab"), "lacks vocab"),
    (lambda c: c.update(format="generative-vqa checkpoint 1"), "has the format .* 1', this program reads .*: train again"),
    (lambda c: c.update(vocab=None), "another version of this program, or is damaged"),
    (lambda c: c["vocab"].append("one-more"), r"decoder.embedding.weight has the shape \(\d+, 24\) in the file"),
    (lambda c: c.update(encoders={}), "another version of this program, or is damaged"),
    (lambda c: c["encoders"]["fingerprints"].update(clip="0" * 32), "0{32}, the one found here has"),
    (lambda c: c["model_config"].update(hidden_size=28), r"has the shape .* in the file and .* in the model"),
    (lambda c: c["model_config"].update(hidden_size="abc"), "another version of this program, or is damaged"),
    (lambda c: c["model_config"].update(heads=4), "another version .*'heads'.*: train again"),
    (lambda c: c["model_config"].update(fusion="typo"), "the model's fusion 'typo' is none of gated, constant, concat"),
    (lambda c: c["model_config"].update(inputs="nothing"), "the model's inputs 'nothing' is none of both, question, image"),
    (lambda c: c["weights"].pop("decoder.output.bias"), r"decoder.output.bias has the shape None in the file"),
    (lambda c: c["weights"].update({"decoder.output.bias": [1.0]}), "another version of this program, or is damaged"),
    (lambda c: c["trained_on"].update(images=torch.ones(2)), "another version .*its trained_on holds no hashes"),
    (lambda c: c["weights"]["decoder.output.bias"].fill_(math.nan), "decoder.output.bias holds numbers that are not finite"),
])
def test_a_checkpoint_that_does_not_fit_is_refused(damage, message, stage_one, tmp_path):
    content = read_checkpoint(stage_one / "vqa_checkpoint.pt")
    damage(content)
    save_checkpoint(tmp_path / "bad.pt", content)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path / "bad.pt")


class RunsCode:
    def __reduce__(self):
        return print, ("executed",)


@pytest.mark.parametrize("content", [b"", b"hello", {"model": torch.ones(2)}, {"format": RunsCode()}],
                         ids=["empty", "text", "foreign", "code"])
def test_files_that_are_no_checkpoint_are_refused(content, tmp_path, capsys):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match="is not a checkpoint of this program"):
        read_checkpoint(path)
    assert "executed" not in capsys.readouterr().out


def test_a_truncated_checkpoint_and_a_flipped_byte_are_refused(tmp_path):
    save_checkpoint(tmp_path / "x.pt", {"weights": torch.ones(3000)})
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="is not a checkpoint of this program, or is damaged"):
        read_checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(whole[:6000] + bytes([whole[6000] ^ 1]) + whole[6001:])
    with pytest.raises(ValueError, match="does not match its checksum"):
        read_checkpoint(tmp_path / "x.pt")


def test_a_missing_checkpoint_names_one_that_exists(tmp_path, monkeypatch):
    """A newcomer had trained the demo only, and the message asked to train first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trained_model, "ROOT", tmp_path / "repository")
    for there, named in ((None, "or name one with --checkpoint"), ("repository/demo", "demo/vqa_checkpoint.pt is there"),
                         ("output/demo/fine_tuning", "output/demo/fine_tuning/vqa_checkpoint.pt is there"),
                         ("output/a", "output/a/vqa_checkpoint.pt is there")):
        if there:
            (tmp_path / there).mkdir(parents=True)
            (tmp_path / there / "vqa_checkpoint.pt").touch()
        with pytest.raises(FileNotFoundError, match=f"checkpoint x.pt not found: train first .*{named}$"):
            read_checkpoint("x.pt")
