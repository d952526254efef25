"""Several processes by torchrun: the losses of a single process, a shared cache, one writer, and no process that hangs."""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from conftest import ROOT

from preprocess import VQADataset, read_rows
from training.step import answer_loss
from vocab import Vocab


def start(script, *flags, processes, cwd):
    """A script under torchrun on the CPU, one thread per process."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", free_port()]
    command = [sys.executable, *(launcher if processes > 1 else []), ROOT / script, *flags]
    return subprocess.Popen(list(map(str, command)), cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def finish(process, seconds=280):
    """(exit status, stdout, stderr) when it has ended; fails if that takes more than `seconds`."""
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def run(script, *flags, processes, cwd):
    """The stdout of a script that must succeed."""
    status, output, errors = finish(start(script, *flags, processes=processes, cwd=cwd))
    assert status == 0, output + errors
    return output


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory):
    """Answers of very different lengths, and a number of rows that no batch size divides."""
    folder = tmp_path_factory.mktemp("uneven") / "data"
    rows = tiny.write_data(folder, num_images=41)
    for number, row in enumerate(rows):
        row["answer"] = " ".join([row["answer"]] * (1 + number % 3))
        row["answers"] = [row["answer"]] * 10
    tiny.write_rows(folder, rows)
    return folder


@pytest.fixture(scope="module")
def no_dropout_flags(encoder_flags, tmp_path_factory):
    """The flags of the tiny encoders with GPT-2's own dropout off."""
    folder = tmp_path_factory.mktemp("gpt2") / "gpt2"
    shutil.copytree(encoder_flags[3], folder)
    config = json.loads((folder / "config.json").read_text())
    config.update({name: 0.0 for name in config if name.endswith("_pdrop")})
    (folder / "config.json").write_text(json.dumps(config))
    return [*encoder_flags[:3], folder]


def test_two_processes_give_the_losses_of_a_single_one(uneven_data, no_dropout_flags, tmp_path):
    """With dropout 0. The loss is a mean over all words of the global batch, whichever process has the long answers."""
    common = ["--data-dir", uneven_data, "--batch-size", 9, "--epochs", 3]
    logs = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run("train.py", *common, *no_dropout_flags, "--dropout", 0, "--hidden-size", 24, processes=processes, cwd=folder)
        output = run("fine_tune.py", *common, "--clip-layers", 1, "--gpt2-layers", 2, "--clip-learning-rate", 1e-3,
                     processes=processes, cwd=folder)
        assert ("2 processes train together" in output) == (processes == 2)
        assert output.count("epoch 1: train loss") == 1, "only the first process prints"
        logs[processes] = [tiny.read_log(folder / "output" / stage) for stage in ("feature_extraction", "fine_tuning")]
    for single, double in zip(logs[1], logs[2], strict=True):
        assert len(single) == len(double) == 4
        for name in ("train_loss", "val_loss"):
            assert [float(row[name]) for row in single] == pytest.approx([float(row[name]) for row in double], abs=1e-5)
    caches = [{path.name: path.read_bytes() for path in (tmp_path / name / "cache").iterdir()} for name in "12"]
    assert caches[0].keys() == caches[1].keys()
    pixels = [name for name in caches[0] if name.startswith("pixels")]
    assert len(pixels) == 2 and all(caches[0][name] == caches[1][name] for name in pixels)


@pytest.fixture
def flags(uneven_data, encoder_flags):
    return ["--data-dir", uneven_data, "--batch-size", 9, *encoder_flags, "--hidden-size", 24, "--epochs", 40, "--patience", 40]


@pytest.fixture
def running(flags, tmp_path):
    """A run of two processes in `run`, in epoch 2 or a little later: (torchrun, {rank: process id})."""
    torchrun = start("train.py", *flags, "--output-dir", "run", processes=2, cwd=tmp_path)
    log = tmp_path / "run/train_log.csv"
    while torchrun.poll() is None and not (log.is_file() and len(tiny.read_csv(log)) > 1):
        time.sleep(0.05)
    workers = {}
    for number in Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split():
        environment = Path(f"/proc/{number}/environ").read_bytes().decode().split("\0")
        workers |= {int(value[5:]): int(number) for value in environment if value.startswith("RANK=")}
    yield torchrun, workers
    torchrun.kill()


def test_two_processes_stop_at_a_term_signal_and_resume_bit_for_bit(running, flags, tmp_path):
    """torchrun passes the signal on, and kills the processes that have not ended after 30 seconds."""
    torchrun, _ = running
    torchrun.terminate()
    _, _, errors = finish(torchrun, seconds=25)
    assert "which is lost; the epochs before it are saved: the same command with --resume continues" in errors
    assert 1 <= torch.load(tmp_path / "run/last.pt", weights_only=True)["epoch"] < 40
    assert not list((tmp_path / "run").glob(".*"))
    status, _, errors = finish(start("train.py", *flags, "--output-dir", "run", "--resume", processes=1, cwd=tmp_path))
    assert status == 2 and "processes was 2, is 1" in errors
    run("train.py", *flags, "--output-dir", "run", "--resume", processes=2, cwd=tmp_path)
    run("train.py", *flags, "--output-dir", "whole", processes=2, cwd=tmp_path)
    tiny.check_equal_runs(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_process_is_killed_the_other_stops_in_one_line(rank, running):
    """It used to end in fifty lines of traceback through torch's internals."""
    torchrun, workers = running
    os.kill(workers[rank], 9)
    status, _, errors = finish(torchrun, seconds=25)
    assert status == 1
    assert f"[rank{1 - rank}]" not in errors, "torchrun marks the traceback of a process with its rank"
    assert "another process of this run ended" in errors or "which is lost" in errors


def test_an_error_of_one_process_stops_both(flags, tmp_path):
    (tmp_path / "file").touch()
    status, _, errors = finish(start("train.py", *flags, "--output-dir", "file/run", processes=2, cwd=tmp_path), seconds=60)
    assert status == 1 and "error: " in errors and "file/run" in errors
    assert "[rank" not in errors


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_wrapped_model_keeps_frozen_parts_in_eval_mode(process_group, make_model, make_store, data_dir):
    """train_epoch calls train() on the wrapper of DistributedDataParallel, not on the model."""
    rows = read_rows(data_dir)
    vocab = Vocab.build(rows["answer"])
    model = make_model(len(vocab), clip_layers=1, gpt2_layers=1)
    dataset = VQADataset(rows, vocab, 8, make_store(model))
    parallel_model = torch.nn.parallel.DistributedDataParallel(model)
    parallel_model.train()
    assert not model.question_encoder.h[2].training and not model.question_encoder.drop.training
    assert not model.image_encoder.training and model.question_encoder.h[3].training and model.fusion.training
    answer_loss(parallel_model, dataset.batch(torch.arange(9)))[0].backward()
    assert all((parameter.grad is not None) == parameter.requires_grad for parameter in model.parameters())
