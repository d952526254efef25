import contextlib
import copy
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tests share tiny.py
# also for the scripts that tests start: nothing from the hub, no proxy for the tests' own servers
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", OMP_NUM_THREADS="1", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it

ROOT = Path(__file__).parents[1]
MODEL_CONFIGS = pytest.mark.parametrize("config", [  # one for each way from the features to the words
    {}, {"decoder": "classifier"}, {"fusion": "concat"}, {"inputs": "question"}, {"inputs": "image"},
    {"clip_layers": 2, "gpt2_layers": 1}, {"image_pooling": "attention", "clip_layers": 1}], ids=str)


def call_script(script, *flags, expect=0, cwd):
    """Run a script in this process as its command line does. Returns what it printed, or its one error line.

    `expect`: its exit status, None if any.
    """
    module, output, errors, status = importlib.import_module(Path(script).stem), io.StringIO(), io.StringIO(), 0
    handler = signal.getsignal(signal.SIGTERM)
    with (contextlib.chdir(cwd), contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors),
          pytest.MonkeyPatch.context() as patch):
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            module.settings.run(module.main, module.Config)
        except SystemExit as stopped:
            status = stopped.code
        finally:
            signal.signal(signal.SIGTERM, handler)
    assert expect in (status, None), f"{script}: status {status}\n{output.getvalue()}\n{errors.getvalue()}"
    return error_line(errors.getvalue()) if status else output.getvalue()


def call_scripts(*commands, cwd, root=ROOT, prefix=()):
    """`call_script` for each (script, flag, ...) of `commands`, in one new process. Returns a list; errors are allowed.

    `root`: the folder of the scripts. `prefix`: a command that starts the process.
    """
    code = ("import json, sys; from conftest import call_script; "
            "print(json.dumps([call_script(*command, expect=None, cwd='.') for command in json.loads(sys.argv[1])]))")
    result = subprocess.run([*prefix, sys.executable, "-c", code, json.dumps(commands, default=str)], cwd=cwd, text=True,
                            env={**os.environ, "PYTHONPATH": f"{root}:{ROOT / 'tests'}"}, capture_output=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def start(*command, cwd, **environment):
    """A Python process in a process group of its own, as a terminal starts it: start(ROOT / "train.py", "--epochs", 1)."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True,
                            # a background job of a shell ignores SIGINT, and its children inherit that
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
                            env={**os.environ, "PYTHONPATH": str(ROOT), **environment})


def error_line(text):
    """The only line on stderr besides progress bars."""
    line, = [line for line in text.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]
    assert re.match(r"(process \d+: )?error: |stopped ", line), text
    return line


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
    """Run a script in a new process: run_script("train.py", "--epochs", 1) -> CompletedProcess."""
    def run(script, *flags, expect=0, cwd=ROOT, **environment):
        process = start(ROOT / script, *flags, cwd=cwd, **environment)
        output, errors = process.communicate(timeout=280)
        assert process.returncode == expect, f"{script}: status {process.returncode}\n{output}\n{errors}"
        return subprocess.CompletedProcess(process.args, expect, output, errors)
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


@pytest.fixture(scope="session")
def small_settings(encoder_flags, data_dir, session_cache):
    """Settings of train.py for a small stage 1."""
    return {"data_dir": str(data_dir), "clip_model": encoder_flags[1], "gpt2_model": encoder_flags[3],
            "cache_dir": str(session_cache), "hidden_size": 24, "epochs": 4, "batch_size": 16, "learning_rate": 3e-3,
            "answer_max_len": 8}


@pytest.fixture
def run_config(small_settings, tmp_path):
    """run_config(epochs=...) -> train.Config of the small stage 1, output to tmp_path / "run"."""
    import train
    return lambda **changes: train.Config(**{**small_settings, "output_dir": str(tmp_path / "run"), **changes})


@pytest.fixture(scope="session")
def train_flags(small_settings):
    """The flags of the small stage 1, but for one epoch."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in {**small_settings, "epochs": 1}.items()]


@pytest.fixture(scope="session")
def stage_one(train_flags, tmp_path_factory):
    """The folder `run` that train.py wrote with `train_flags`; tests must not change it."""
    folder = tmp_path_factory.mktemp("stage_one")
    call_script("train.py", *train_flags, "--output-dir", "run", cwd=folder)
    return folder / "run"


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
def make_answerer(encoders, make_model, data_dir):
    """make_answerer(**config) -> Answerer of a random model with clear preferences. config: of make_model."""
    from common.device import Precision
    from evaluation.generation import Answerer
    from features.trained_model import TrainedModel
    from preprocess import read_rows
    from vocab import Vocab

    def make(**config):
        vocab = Vocab.build(read_rows(data_dir)["answer"], whole_answers=config.get("decoder") == "classifier")
        model = make_model(len(vocab), answer_max_len=8, **config)
        for parameter in model.decoder.output.parameters():
            parameter.data *= 8
        return Answerer(TrainedModel(model, encoders, vocab, {}), Precision("cpu"))
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


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by selenium. Its log `performance` has the network's events."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed (requirements-dev.txt)")
    options, programs = webdriver.ChromeOptions(), [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("no chromium or no chromedriver on this machine (Debian: apt-get install chromium chromium-driver)")
    options.binary_location = programs[0]
    for flag in ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--no-proxy-server"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("no_proxy", "localhost")
        with webdriver.Chrome(options, webdriver.ChromeService(programs[1])) as driver:
            yield driver
