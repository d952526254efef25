"""The names users pass, resolved without network: local folders, and a hub cache that the test fills itself."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from features.encoders import load_image_encoder, load_question_encoder

ROOT = Path(__file__).parents[1]


def hub_folder(cache, repository):
    """An empty snapshot of `repository` in a hub cache, as the hub's client lays it out."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    return snapshot


@pytest.fixture(scope="module")
def filled_hub(tmp_path_factory, encoder_flags):
    """A hub cache with the real architectures of the default names, filled with random weights."""
    import open_clip
    from safetensors.torch import save_file
    from transformers import GPT2Config, GPT2Model
    home = tmp_path_factory.mktemp("hf_home")
    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-B-32-quickgelu")
    weights = hub_folder(home / "hub", "timm/vit_base_patch32_clip_224.openai") / "open_clip_model.safetensors"
    save_file(clip.state_dict(), weights)
    gpt2 = hub_folder(home / "hub", "distilgpt2")
    GPT2Model(GPT2Config(n_layer=6)).save_pretrained(gpt2)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # the tiny tokenizer stands in for GPT-2's
        (gpt2 / name).write_bytes((Path(encoder_flags[3]) / name).read_bytes())
    return home


def run_python(code, home):
    env = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, text=True, capture_output=True, timeout=300)


REAL_SIZE = """
import torch, torch.nn.functional as F
from features.encoders import load_encoders
from training.checkpoint import build_model
encoders = load_encoders("ViT-B-32-quickgelu", "openai", "distilgpt2")
visual, gpt2 = encoders.image.visual, encoders.question.gpt2
print(sum(p.numel() for p in visual.parameters()), len(visual.transformer.resblocks), len(gpt2.h))
print(type(visual.transformer.resblocks[0].mlp.gelu).__name__, visual.training, gpt2.training)
model = build_model(encoders, 9, dict(hidden_size=16, num_layers=1, dropout=0.1, inputs="both", fusion="gated",
                                      image_pooling="pooled")).eval()
torch.manual_seed(0)
pixels = torch.randn(2, 3, 224, 224)
ids = torch.randint(200, (2, 7))
with torch.no_grad():
    image, question = F.normalize(visual(pixels), dim=-1), F.normalize(gpt2(ids).last_hidden_state.mean(1), dim=-1)
    for layers in (0, 1, 4, 6):
        model.unfreeze(2 * layers, layers)
        states = model.encode_question_frozen(ids, torch.ones_like(ids))
        print((model.encode_image(pixels)[0] - image).abs().max().item(),
              (model.encode_question_trainable(states, torch.ones_like(ids)) - question).abs().max().item())
"""


def test_default_names_are_the_real_architectures_and_stored_equals_live(filled_hub):
    result = run_python(REAL_SIZE, filled_hub)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "ViT-B-32-quickgelu: 87.8 M parameters, 12 blocks" in lines
    assert "QuickGELU False False" in lines
    size, image_blocks, question_blocks = next(line.split() for line in lines if line.startswith("878"))
    assert (size, image_blocks, question_blocks) == ("87849216", "12", "6")
    for line in lines[-4:]:
        assert all(float(difference) < 1e-5 for difference in line.split()), line


@pytest.mark.parametrize("code, model", [
    ('load_image_encoder("ViT-B-32-quickgelu", "openai")', "ViT-B-32-quickgelu"),
    ('load_question_encoder("distilgpt2")', "distilgpt2")])
def test_missing_weights_are_one_line_at_once(code, model, tmp_path):
    """Without network open_clip alone retries for most of a minute and ends in a page of warnings."""
    started = time.time()
    result = run_python("from encoders import *\ntry:\n    " + code + "\nexcept FileNotFoundError as e:\n    print('ERROR', e)",
                        tmp_path)
    assert f"ERROR the weights of {model}" in result.stdout, result.stderr
    assert str(tmp_path / "hub") in result.stdout and "to work offline" in result.stdout
    assert time.time() - started < 40


def test_missing_weights_without_network_fail_early(tmp_path):
    """The same with the network allowed but dead: a proxy on a closed port."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "HTTPS_PROXY": "http://127.0.0.1:9",
           "https_proxy": "http://127.0.0.1:9"}
    result = subprocess.run([sys.executable, ROOT / "train.py", "--data-dir", tmp_path / "none"], env=env, text=True,
                            capture_output=True, timeout=120, cwd=tmp_path)
    assert result.returncode == 2  # the data folder is looked at first
    code = ("from encoders import *\ntry:\n    load_question_encoder('distilgpt2')\n"
            "except FileNotFoundError as e:\n    print('ERROR', e)")
    result = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True, timeout=120, cwd=ROOT)
    assert "ERROR the weights of distilgpt2" in result.stdout, result.stderr


def test_plain_gelu_with_openais_weights_is_refused():
    with pytest.raises(ValueError, match="ViT-B-32-quickgelu"):
        load_image_encoder("ViT-B-32", "openai")


def test_a_local_folder_without_weights_is_an_error(encoder_flags, tmp_path):
    (tmp_path / "open_clip_config.json").write_bytes(
        (Path(encoder_flags[1].removeprefix("local-dir:")) / "open_clip_config.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no weights file"):
        load_image_encoder(f"local-dir:{tmp_path}", "")
    with pytest.raises(FileNotFoundError, match="no open_clip_config.json"):
        load_image_encoder(f"local-dir:{tmp_path}/nowhere", "")


def test_gpt2_with_a_missing_tensor_is_an_error(encoder_flags, tmp_path):
    """from_pretrained would fill the hole with random numbers and say nothing."""
    from safetensors.torch import load_file, save_file
    for source in Path(encoder_flags[3]).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["h.1.mlp.c_fc.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"h\.1\.mlp\.c_fc\.weight"):
        load_question_encoder(str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"needs config.json, model.safetensors"):
        load_question_encoder(str(tmp_path))


@pytest.mark.parametrize("name, damage, message", [
    ("config.json", lambda text: text.replace('"n_embd": ', '"n_embd": 2'), "whole and of one model"),
    ("config.json", lambda text: text.replace('"n_embd": ', '"n_embd": "x", "n_other": '), "whole and of one model"),
    ("config.json", lambda text: "[]", "whole and of one model"),
    ("config.json", lambda text: text.replace('"model_type": "gpt2"', '"model_type": "bert"'), "no GPT-2|whole and of one"),
    ("tokenizer.json", lambda text: "{}", "whole and of one model"),
    ("tokenizer.json", lambda text: text[:200], "whole and of one model"),
], ids=["another width", "a width of letters", "a list", "another model", "empty tokenizer", "half a tokenizer"])
def test_a_damaged_gpt2_folder_is_one_line(name, damage, message, encoder_flags, tmp_path):
    for source in Path(encoder_flags[3]).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    before = (tmp_path / name).read_text()
    (tmp_path / name).write_text(damage(before))
    assert damage(before) != before
    with pytest.raises((ValueError, FileNotFoundError), match=f"--gpt2-model .*({message})"):
        load_question_encoder(str(tmp_path))


@pytest.mark.parametrize("clip_model, clip_pretrained, message", [
    ("ViT-Z-99", "openai", "not a model of open_clip"), ("ViT-B-32-quickgelu", "nowhere.pt", "neither a weights file"),
    ("RN50-quickgelu", "nowhere", "neither a weights file")])
def test_wrong_names_are_one_clear_line(clip_model, clip_pretrained, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_image_encoder(clip_model, clip_pretrained)


def test_the_tokenizer_pads_on_the_right_with_the_end_of_text(encoders):
    tokenizer = encoders.question.tokenizer
    assert tokenizer.padding_side == "right" and tokenizer.pad_token == tokenizer.eos_token
    assert len(tokenizer) == encoders.question.gpt2.wte.num_embeddings  # nothing was added, nothing resized
    assert json.loads(tokenizer.backend_tokenizer.to_str())["model"]["type"] == "BPE"
