"""Several processes by torchrun: the losses of a single process, a shared cache, one writer, and no process that hangs."""
import json
import shutil
import socket
import time

import pytest
import tiny
import torch
import torch.distributed as dist
from conftest import ROOT, call_script, error_line, start

from common import distributed
from preprocess import VQADataset, read_rows
from training.step import answer_loss
from vocab import Vocab


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start_two(script, *flags, cwd):
    """Two processes of a script with the environment that torchrun gives them."""
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [start(ROOT / script, *flags, cwd=cwd, RANK=rank, **group) for rank in "01"]


def finish(process, seconds=280):
    """(exit status, stdout, stderr) when it has ended; fails if that takes more than `seconds`."""
    output, errors = process.communicate(timeout=seconds)
    return process.returncode, output, errors


def run_two(script, *flags, cwd):
    """What two processes print, which must succeed."""
    (status, output, errors), (other_status, other_output, other_errors) = map(finish, start_two(script, *flags, cwd=cwd))
    assert status == other_status == 0, output + errors + other_errors
    assert not other_output, "only the first process prints"
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
    for processes, run in ((1, call_script), (2, run_two)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        run("train.py", *common, *no_dropout_flags, "--dropout", 0, "--hidden-size", 24, cwd=folder)
        output = run("fine_tune.py", *common, "--clip-layers", 1, "--gpt2-layers", 2, "--clip-learning-rate", 1e-3, cwd=folder)
        assert ("2 processes train together" in output) == (processes == 2)
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
def command(uneven_data, encoder_flags):
    return ["train.py", "--data-dir", uneven_data, "--batch-size", 9, *encoder_flags, "--hidden-size", 24, "--epochs", 12,
            "--patience", 12, "--output-dir"]


def wait_for_epoch_one(process, folder):
    log = folder / "train_log.csv"
    while process.poll() is None and not (log.is_file() and len(tiny.read_csv(log)) > 1):
        time.sleep(0.05)


def test_two_processes_stop_at_a_term_signal_and_resume_bit_for_bit(command, tmp_path):
    """torchrun passes the signal on, and kills the processes that have not ended after 30 seconds."""
    script, *flags = command
    torchrun = start("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), ROOT / script, *flags,
                     "run", cwd=tmp_path)
    wait_for_epoch_one(torchrun, tmp_path / "run")
    torchrun.terminate()
    _, _, errors = finish(torchrun, seconds=25)
    assert "which is lost; the epochs before it are saved: the same command with --resume continues" in errors
    assert 1 <= torch.load(tmp_path / "run/last.pt", weights_only=True)["epoch"] < 12
    assert not list((tmp_path / "run").glob(".*"))
    assert "processes was 2, is 1" in call_script(*command, "run", "--resume", expect=2, cwd=tmp_path)
    run_two(*command, "run", "--resume", cwd=tmp_path)
    run_two(*command, "whole", cwd=tmp_path)
    tiny.check_equal_runs(tmp_path / "run", tmp_path / "whole")


def check_stopped(rank, processes):
    status, _, errors = finish(processes[rank], seconds=25)
    assert status == 1 and errors.splitlines()[-1] == f"process {rank}: stopped, because another process of this run ended"
    assert "Traceback" not in errors


@pytest.mark.parametrize("rank", [0, 1])
def test_if_one_process_is_killed_the_other_stops_in_one_line(rank, command, tmp_path):
    """It used to end in fifty lines of traceback through torch's internals."""
    processes = start_two(*command, "run", cwd=tmp_path)
    wait_for_epoch_one(processes[0], tmp_path / "run")
    processes[rank].kill()
    processes[rank].communicate()
    check_stopped(1 - rank, processes)


def test_an_error_of_one_process_stops_both(command, tmp_path):
    """Only the first process looks whether the folder holds a run."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/last.pt").touch()
    processes = start_two(*command, "run", cwd=tmp_path)
    status, _, errors = finish(processes[0], seconds=60)
    assert status == 2 and "--overwrite" in error_line(errors)
    check_stopped(1, processes)


@pytest.mark.parametrize("changes, message", [
    ({}, "the 2 processes of WORLD_SIZE did not meet at 127.0.0.1:{port} within 2 s (Timed out after "),
    ({"RANK": "1"}, "the 2 processes of WORLD_SIZE did not meet at 127.0.0.1:{port} within 2 s ("),
    ({"RANK": "2"}, "the environment variable RANK is 2, but WORLD_SIZE is 2"),
    ({"MASTER_ADDR": "", "MASTER_PORT": ""}, "WORLD_SIZE is 2, but MASTER_ADDR, MASTER_PORT not set")],
    ids=["the first alone", "the second alone", "a rank too many", "no address"])
def test_a_process_without_a_partner_is_one_line(changes, message, train_flags, tmp_path, monkeypatch):
    """Variables that another program left in the environment made it wait for half an hour."""
    monkeypatch.setattr(distributed, "MEETING_SECONDS", 2)
    port = str(free_port())
    for name, value in ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | changes).items():
        monkeypatch.setenv(name, value)
    error = call_script("train.py", *train_flags, "--output-dir", "run", expect=2, cwd=tmp_path)
    assert message.format(port=port) in error and "or unset WORLD_SIZE to train with one" in error
    assert not (tmp_path / "run").exists()


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
