"""CLIP's weights as OpenAI published them: TorchScript archives, which are read without running their code."""
import json
import shutil
import zipfile
from pathlib import Path

import pytest
import torch

from features.encoders import load_image_encoder


def as_modules(weights):
    """A module with parameters of these names, such as visual.ln_pre.bias, that can be scripted."""
    root = torch.nn.Identity()
    for name, tensor in weights.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Identity())
            module = getattr(module, parent)
        setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    return root


@pytest.fixture
def torchscript(encoder_flags, tmp_path):
    """Folder of the tiny CLIP as OpenAI published its models: a TorchScript archive in half precision."""
    from safetensors.torch import load_file
    source, folder = Path(encoder_flags[1].removeprefix("local-dir:")), tmp_path / "clip"
    folder.mkdir()
    config = json.loads((source / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = load_file(source / "open_clip_model.safetensors")
    torch.jit.script(as_modules(weights).half()).save(folder / "clip.pt")
    return folder


def test_openais_torchscript_archive_is_read(torchscript, encoders, monkeypatch):
    monkeypatch.setattr(torch.jit, "load", lambda *args, **kwargs: pytest.fail("it could run code"))
    visual, own = load_image_encoder(f"local-dir:{torchscript}", "").visual.state_dict(), encoders.image.visual.state_dict()
    assert visual.keys() == own.keys()
    assert all(torch.equal(visual[name], own[name].half().float()) for name in own)
    config = (torchscript / "open_clip_config.json").read_text()
    (torchscript / "open_clip_config.json").write_text(config.replace('"quick_gelu": true', '"quick_gelu": false'))
    with pytest.raises(ValueError, match='lacks QuickGELU, .*/clip.pt: use "quick_gelu": true in open_clip_config.json'):
        load_image_encoder(f"local-dir:{torchscript}", "")
    with pytest.raises(ValueError, match=r"lacks QuickGELU, .*/clip.pt: use --clip-model ViT-B-32-quickgelu"):
        load_image_encoder("ViT-B-32", str(torchscript / "clip.pt"))


@pytest.mark.parametrize("member, content", [
    ("data.pkl", b"cbuiltins\nopen\n(S'executed'\nS'w'\ntR."), ("data.pkl", b"cos\nsystem\n(S'touch executed'\ntRb."),
    ("data.pkl", b"I1\n."), ("data.pkl", b""), ("data/", b"short"), ("data/", None)])
def test_a_bad_torchscript_archive_is_one_line_and_runs_nothing(member, content, torchscript, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.move(torchscript / "clip.pt", "whole.pt")
    with zipfile.ZipFile("whole.pt") as whole, zipfile.ZipFile(torchscript / "clip.pt", "w") as changed:
        for name in whole.namelist():
            if f"/{member}" not in name:
                changed.writestr(name, whole.read(name))
            elif content is not None:
                changed.writestr(name, content)
    with pytest.raises(ValueError, match="--clip-model .* with weights .*clip.pt cannot be loaded: "):
        load_image_encoder(f"local-dir:{torchscript}", "")
    assert not Path("executed").exists()
