"""benchmarks/throughput.py: complete and plausible results, and a fair plain loop."""
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """(output, content of throughput.json, its folder) of the smallest run."""
    folder = tmp_path_factory.mktemp("throughput")
    flags = ["--tiny", "--images", "32", "--epochs", "1", "--seconds", "0.1", "--device", "cpu", "--output-dir", folder]
    result = subprocess.run([sys.executable, ROOT / "benchmarks/throughput.py", *map(str, flags)], cwd=folder, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads((folder / "throughput.json").read_text()), folder


def test_the_plain_loop_has_the_same_loss_as_the_cached_path(benchmark):
    trainings = benchmark[1]["trainings"]
    assert len(trainings) == 2
    for training in trainings:
        assert training["loss_ours"] == pytest.approx(training["loss_plain"], abs=1e-5)


def test_all_rows_are_measured_and_printed(benchmark):
    output, content, folder = benchmark
    names = [row["name"] for row in content["rows"]]
    for start in ("decode, ", "encode images", "encode questions", "stage 1, batch 8", "stage 1, batch 32", "stage 2, batch 8",
                  "stage 2, batch 32", "answer from the cache of stage 1", "answer from the cache of stage 2"):
        assert sum(name.startswith(start) for name in names) == 1, start
    assert all(name in output for name in names) and "start-up of train.py" in output
    assert f"--amp auto: {content['times_of_float32']:.2f} times as fast" in output and content["times_of_float32"] > 0
    numbers = [value for entry in (*content["rows"], *content["trainings"], content["start_up"]) for value in entry.values()
               if isinstance(value, float)]
    assert all(math.isfinite(value) and value > 0 for value in numbers)
    assert {path.name for path in folder.iterdir()} == {"throughput.json", "throughput.log"}


def test_images_have_the_file_size_of_coco(benchmark):
    assert 120_000 < benchmark[1]["inputs"]["bytes_per_image"] < 200_000


@pytest.mark.parametrize("flags, message", [
    ({"images": 8}, "--images 8 is out of range"), ({"epochs": -1}, "--epochs -1 is out of range"),
    ({"seconds": 0}, "--seconds 0 is out of range"), ({"device": "cuda:7"}, "--device cuda:7")])
def test_wrong_flags_are_refused_before_any_work(tmp_path, flags, message):
    from benchmarks.throughput import Config, main
    with pytest.raises(ValueError, match=message):
        main(Config(output_dir=str(tmp_path / "new"), **{"device": "cpu", **flags}))
    assert not (tmp_path / "new").exists()


def test_operations_of_attention_and_of_both_directions_are_counted(make_model):
    """A block of width W on T tokens: T (24 W^2 + 4 T W), in CLIP and GPT-2. Backward counts twice."""
    from benchmarks.timing import count_operations
    model = make_model(clip_layers=2, gpt2_layers=1).train()
    image, question = torch.randn(3, 17, 32, requires_grad=True), torch.randn(2, 9, 32, requires_grad=True)
    steps = {2 * 3 * 17: (17, lambda: model.encode_image_trainable(image)[0].sum().backward()),
             2 * 9: (9, lambda: model.encode_question_trainable(question, torch.ones(2, 9)).sum().backward())}
    for num_tokens, (length, step) in steps.items():
        assert count_operations(step) == pytest.approx(3 * num_tokens * (24 * 32 ** 2 + 4 * length * 32), rel=0.02)
    frozen = make_model().eval()
    with torch.no_grad():
        counted = count_operations(lambda: frozen.encode_image_frozen(torch.rand(1, 3, 32, 32)))
    assert counted == pytest.approx(4 * 17 * (24 * 32 ** 2 + 4 * 17 * 32) + 16 * 2 * 3 * 8 ** 2 * 32, rel=0.02)


def test_the_shared_machine_is_measured_alone_and_beside_a_process_that_ends(tmp_path, monkeypatch, capsys):
    from benchmarks import shared_machine
    processes, runs = [], []
    start = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command: processes.append(start(command)) or processes[-1])

    def train(work, script, output_dir, flags, spin_count=None):
        runs.append((script, spin_count, len([process for process in processes if process.poll() is None])))
        return 10.0 * len(runs)

    monkeypatch.setattr(shared_machine, "train", train)
    shared_machine.main(shared_machine.Config(output_dir=str(tmp_path), images=20, spin_counts=(0, 7)))
    assert runs == [("train.py", None, 0), ("fine_tune.py", 0, 0), ("fine_tune.py", 0, 1), ("fine_tune.py", 7, 0),
                    ("fine_tune.py", 7, 1)]
    assert all(process.poll() is not None for process in processes)
    assert json.loads((tmp_path / "shared_machine.json").read_text()) == {
        "0": {"alone": 20.0, "beside_one": 30.0}, "7": {"alone": 40.0, "beside_one": 50.0}}
    assert "             7      40.0        50.0" in capsys.readouterr().out
