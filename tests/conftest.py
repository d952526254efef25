import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share tiny.py
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask the hub

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def encoder_flags(tmp_path_factory):
    import tiny
    return tiny.write_encoders(tmp_path_factory.mktemp("encoders"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """A small data set; tests must not change it."""
    import tiny
    folder = tmp_path_factory.mktemp("data") / "mini"
    tiny.write_data(folder)
    return folder


@pytest.fixture(scope="session")
def run_script():
    """Run a script in a subprocess: run_script("train.py", "--epochs", 1) -> CompletedProcess. `root`: where the script is."""
    def run(script, *flags, expect=0, cwd=ROOT, root=ROOT, **environment):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **environment}
        result = subprocess.run([sys.executable, root / script, *map(str, flags)], cwd=cwd, env=env, text=True,
                                capture_output=True, timeout=300)
        assert result.returncode == expect, f"{script}: status {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result
    return run


@pytest.fixture(scope="session")
def loaded_encoders(encoder_flags):
    from features.encoders import load_encoders
    return load_encoders(encoder_flags[1], "", encoder_flags[3])


@pytest.fixture
def encoders(loaded_encoders):
    """The tiny encoders, a copy for each test: tests may train them."""
    return copy.deepcopy(loaded_encoders)


@pytest.fixture(scope="session")
def session_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def pixels(encoders, data_dir, session_cache):
    from features.pixels import decode_images
    from preprocess import read_rows
    return decode_images(data_dir, read_rows(data_dir)["image_path"], encoders.image, session_cache, 2)


@pytest.fixture
def folder(tmp_path):
    """A folder with twelve images of different sizes: images/00.png to images/11.png."""
    import numpy as np
    from PIL import Image

    (tmp_path / "images").mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        pixels = rng.integers(0, 255, (30 + number, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{number:02d}.png")
    return tmp_path


@pytest.fixture
def run_config(encoder_flags, data_dir, session_cache, tmp_path):
    """run_config(output_dir=..., epochs=...) -> settings of a small stage 1."""
    import train

    def make(**changes):
        return train.Config(**{"data_dir": str(data_dir), "output_dir": str(tmp_path / "run"), "clip_model": encoder_flags[1],
                               "gpt2_model": encoder_flags[3], "cache_dir": str(session_cache), "hidden_size": 24,
                               "epochs": 4, "batch_size": 16, "learning_rate": 3e-3, "answer_max_len": 8, **changes})
    return make


@pytest.fixture
def make_model(encoders):
    """make_model(vocab_size=9, clip_layers=0, gpt2_layers=0, **config) -> VQAModel in eval mode."""
    import torch

    from model import ModelConfig, VQAModel

    def make(vocab_size=9, clip_layers=0, gpt2_layers=0, **config):
        torch.manual_seed(0)
        config = ModelConfig(**{"hidden_size": 16, **config})
        model = VQAModel(encoders.image.visual, encoders.question.gpt2, vocab_size, config)
        model.unfreeze(clip_layers, gpt2_layers)
        return model.eval()
    return make


@pytest.fixture
def make_store(encoders, pixels, data_dir, session_cache):
    """make_store(model) -> FeatureStore of the small data set at the model's freeze boundary."""
    from common.device import Precision
    from features.store import build_store
    from preprocess import read_rows

    def make(model, cache_dir=session_cache):
        return build_store(model, encoders, pixels, read_rows(data_dir)["question"], cache_dir, Precision("cpu"))
    return make


@pytest.fixture
def feature_store(make_model, make_store):
    return make_store(make_model())
