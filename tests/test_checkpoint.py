"""Checkpoint files that are damaged, foreign, dangerous, or do not fit the model are refused in one line."""
import math
import shutil

import pytest
import torch
from conftest import call_scripts
from test_encoders import hub_folder

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


def test_a_checkpoint_comes_from_the_hub_with_its_encoders_beside_it(stage_one, encoder_flags, data_dir, tmp_path, monkeypatch):
    snapshot = hub_folder(tmp_path / "hub", "me/model")
    shutil.copytree(encoder_flags[1].removeprefix("local-dir:"), snapshot / "own/clip")
    shutil.copytree(encoder_flags[3], snapshot / "own/gpt2")
    content = read_checkpoint(stage_one / "vqa_checkpoint.pt")
    content["encoders"].update(clip_model="local-dir:own/clip", gpt2_model="own/gpt2")
    save_checkpoint(snapshot / "vqa_checkpoint.pt", content)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    ask = ("--image", data_dir / "images/0000.png", "--question", "What?")
    data = ("--data-dir", data_dir, "--cache-dir", tmp_path / "cache")
    outputs = call_scripts(*(("test.py", "--checkpoint", name, *ask) for name in (
                               "hf:me/model", f"hf:me/model@{snapshot.name}", "hf:me/model@v2", "hf:me/other")),
                           ("fine_tune.py", "--checkpoint", "hf:me/model", *data, "--epochs", 1, "--output-dir", "two"),
                           ("test.py", "--checkpoint", "hf:me/model", *data), cwd=tmp_path)
    assert "answer: " in outputs[0] and outputs[0].split("answer: ")[1] == outputs[1].split("answer: ")[1]
    for name, line in zip(("hf:me/model@v2", "hf:me/other"), outputs[2:4], strict=True):
        assert f"the weights of {name} are not in the hub cache" in line and "--checkpoint FOLDER/vqa_checkpoint.pt" in line
    assert "from hf:me/model (epoch 1" in outputs[4] and "scores output/vqa_test_metrics.json" in outputs[5]
    assert read_checkpoint(tmp_path / "two/vqa_checkpoint.pt")["settings"]["checkpoint"] == "hf:me/model"


@pytest.mark.parametrize("name", ["", "model", "a/b/c@d", "../x", "http://host/a", "demo/vqa_checkpoint.pt", "a/b@"])
def test_a_name_that_is_no_hub_repository_is_no_missing_download(name):
    with pytest.raises(ValueError, match=f"^--checkpoint hf:{name} is no hf:USER/REPO or hf:USER/REPO@REVISION"):
        load_model(f"hf:{name}")


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
