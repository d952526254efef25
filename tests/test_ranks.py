"""Several processes by torchrun: the single process's losses, a shared cache, one writer."""
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch

ROOT = Path(__file__).parents[1]


def torchrun(script, *flags, processes=2, cwd, expect=0):
    """Run a script under torchrun on the CPU, one thread a process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port(),
               ROOT / script, *flags] if processes > 1 else [sys.executable, ROOT / script, *flags]
    result = subprocess.run(list(map(str, command)), cwd=cwd, text=True, capture_output=True, timeout=280,
                            env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    assert result.returncode == expect, result.stdout + result.stderr
    return result


def free_port():
    import socket
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def read_log(folder):
    with open(folder / "train_log.csv", newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory):
    """Pictures whose answers differ a good deal in length, and a number of rows that no batch divides."""
    folder = tmp_path_factory.mktemp("uneven") / "data"
    rows = tiny.write_data(folder, num_pictures=41)
    for number, row in enumerate(rows):
        row["answer"] = " ".join([row["answer"]] * (1 + number % 3))
        row["answers"] = [row["answer"]] * 10
    tiny.write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def without_dropout(encoder_flags, tmp_path_factory):
    """The tiny encoders' flags, but GPT-2's own dropout is off."""
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    shutil.copytree(encoder_flags[3], folder)
    config = json.loads((folder / "config.json").read_text())
    config.update({name: 0.0 for name in config if name.endswith("_pdrop")})
    (folder / "config.json").write_text(json.dumps(config))
    return [*encoder_flags[:3], folder]


def test_two_processes_give_the_single_processes_losses(uneven_data, without_dropout, tmp_path):
    """With dropout 0: the loss is a mean over all words of the global batch, whoever holds the long answers."""
    common = ["--data-dir", uneven_data, "--batch-size", 9, "--epochs", 3]
    logs = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        torchrun("train.py", *common, *without_dropout, "--dropout", 0, "--hidden-size", 24, processes=processes, cwd=folder)
        result = torchrun("fine_tune.py", *common, "--clip-layers", 1, "--gpt2-layers", 2, "--clip-learning-rate", 1e-3,
                          processes=processes, cwd=folder)
        assert ("2 processes work together" in result.stdout) == (processes == 2)
        assert result.stdout.count("epoch 1: train loss") == 1, "only the first process speaks"
        logs[processes] = [read_log(folder / "output" / stage) for stage in ("feature_extraction", "fine_tuning")]
    for single, double in zip(logs[1], logs[2], strict=True):
        assert len(single) == len(double) == 4
        for one, two in zip(single, double, strict=True):
            for name in ("train_loss", "val_loss"):
                assert float(one[name]) == pytest.approx(float(two[name]), abs=1e-5)
    # what two processes stored is what one stored
    caches = [{path.name: path.read_bytes() for path in (tmp_path / processes / "cache").iterdir()} for processes in "12"]
    assert caches[0].keys() == caches[1].keys()
    pixels = [name for name in caches[0] if name.startswith("pixels")]
    assert len(pixels) == 2 and all(caches[0][name] == caches[1][name] for name in pixels)


def test_two_processes_resume_and_refuse_another_number(uneven_data, encoder_flags, tmp_path):
    def run(folder, *more, **options):
        return torchrun("train.py", "--data-dir", uneven_data, "--batch-size", 9, *encoder_flags, "--hidden-size", 24,
                        "--epochs", 2, "--output-dir", folder, *more, cwd=tmp_path, **options)

    run("whole")
    run("again")
    one, two = (torch.load(tmp_path / name / "vqa_checkpoint.pt", weights_only=True)["weights"] for name in ("whole", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one), "dropout is drawn per process, seeded"
    assert "had finished" in run("whole", "--resume").stdout
    assert "processes was 2, is 1" in run("whole", "--resume", processes=1, expect=2).stderr


def test_two_processes_stop_at_a_term_signal_and_resume(uneven_data, encoder_flags, tmp_path):
    """torchrun passes the signal on and kills after half a minute: both processes have to agree on a step before that."""
    flags = ["--data-dir", uneven_data, "--batch-size", 9, *encoder_flags, "--hidden-size", 24, "--epochs", 4000,
             "--patience", 4000, "--output-dir", "run"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(),
               ROOT / "train.py", *flags]
    process = subprocess.Popen(list(map(str, command)), cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"})
    log = tmp_path / "run/train_log.csv"
    while process.poll() is None and not (log.is_file() and len(read_log(log.parent)) > 3):
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=25)
    assert "which is saved: the same command with --resume continues" in errors
    state = torch.load(tmp_path / "run/last.pt", weights_only=True)["state"]
    assert 3 <= state["epoch"] < 4000 and not state["finished"]
