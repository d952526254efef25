"""benchmarks/throughput.py from end to end at its smallest sizes: does it measure all it says, and is its plain loop fair?"""
import json
import math

import pytest


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """(CompletedProcess, content of throughput.json, its folder) of the smallest run."""
    import os
    import subprocess
    import sys

    from conftest import ROOT
    folder = tmp_path_factory.mktemp("throughput")
    flags = ["--tiny", "--pictures", "32", "--decoded", "32", "--epochs", "1", "--device", "cpu", "--output-dir", folder]
    result = subprocess.run([sys.executable, ROOT / "benchmarks/throughput.py", *map(str, flags)], cwd=folder, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, timeout=280)
    assert result.returncode == 0, result.stderr
    return result, json.loads((folder / "throughput.json").read_text()), folder


def test_the_plain_loop_computes_what_the_cached_path_computes(benchmark):
    """Else the ratio would compare two different things."""
    losses = benchmark[1]["losses"]
    assert set(losses) == {"stage 1", "stage 2"}
    for both in losses.values():
        assert both["cached"] == pytest.approx(both["plain"], abs=1e-5)


def test_every_number_is_there_and_sound(benchmark):
    content = benchmark[1]
    assert {"machine", "settings", "inputs", "rows", "closing", "growth", "losses"} == set(content)
    assert {"processor", "cores", "threads", "torch", "matrix_tflops"} <= set(content["machine"])
    rows = {row["name"]: row for row in content["rows"]}
    for name in ("decode, pillow, ", "decode, fast, ", "encode pictures to stage 1's cut", "encode pictures to stage 2's cut",
                 "decode (pillow) + encode", "encode questions to stage 1's cut", "stage 1, batch 32, eager",
                 "stage 2, batch 8, eager", "answer from the cache of stage 1", "answer from the cache of stage 2"):
        (row,) = (row for found, row in rows.items() if found.startswith(name))
        assert row["ratio"] and row["share"], name
    for script in ("train.py", "fine_tune.py", "test.py"):
        assert rows[f"cold mini run: {script}"]["ratio"] and rows[f"cold mini run: host memory of {script}"]["value"] > 100
        assert rows[f"{script} on a few cached rows, start to end"]["share"]
    for entry in (*rows.values(), *content["closing"], *content["growth"]):
        for name, value in entry.items():
            assert not isinstance(value, float) or math.isfinite(value) and value > 0, (entry, name)


def test_the_last_rows_and_the_plot(benchmark):
    result, content, folder = benchmark
    assert [item["name"].split(" over")[0] for item in content["closing"]] == ["cached stage 1", "cached stage 2"]
    assert all(item["ratio"] > 0 and item["bound"] > 1 for item in content["closing"])
    questions = [point["questions"] for point in content["growth"]]
    assert len(questions) == 4 and all(7 <= last / first <= 9 for first, last in [(questions[0], questions[-1])])
    assert (folder / "growth.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("work.*"))
    for row in content["rows"]:
        assert row["name"] in result.stdout


def test_the_inputs_are_like_the_mini_set(benchmark):
    _, content, folder = benchmark
    (data_dir,) = (folder / "inputs").glob("32_of_*")
    entries = json.loads((data_dir / "qa_pairs.json").read_text())
    assert len(entries) == int(32 * 9500 / 8300) and {entry["split"] for entry in entries} == {"train", "val", "test"}
    assert all(len(entry["answers"]) == 10 and 5 <= len(entry["question"].split()) <= 12 for entry in entries)
    assert all(3 <= len(entry["answer"].split()) <= 6 and entry["agreement"] >= 3 for entry in entries)
    assert 120_000 < content["inputs"]["bytes_per_picture"] < 200_000


@pytest.mark.parametrize("sizes, message", [
    ({"pictures": 8}, "--pictures 8 is out of range"), ({"epochs": -1}, "--epochs -1 is out of range"),
    ({"stage_2_batches": (5000,)}, "a batch of 5000 is out of range"), ({"workers": 300}, "--workers 300 is out of range")])
def test_a_wrong_size_is_refused(sizes, message):
    from benchmarks.throughput import Config, set_sizes
    with pytest.raises(ValueError, match=message):
        set_sizes(Config(**sizes), "cpu")


def test_a_mistake_is_one_line(run_script, tmp_path):
    result = run_script("benchmarks/throughput.py", "--output-dir", tmp_path, "--device", "cuda:7", expect=2)
    assert result.stderr.startswith("error: --device cuda:7") and result.stderr.count("\n") == 1


def test_operations_are_counted_like_torch_counts_them(make_model):
    """The share of the matrix rate and the bound rest on the count. On the CPU torch's counter leaves attention out."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.operations import encoder_operations, step_operations
    model = make_model(clip_layers=2, gpt2_layers=1).train()
    image, question = torch.randn(3, 17, 32), torch.randn(2, 9, 32)
    with FlopCounterMode(display=False) as counter:
        model.encode_image_trainable(image)[0].sum().backward()
        model.encode_question_trainable(question, torch.ones(2, 9)).sum().backward()
    attention = 4 * 32 * (3 * 2 * 17 ** 2 + 2 * 1 * 9 ** 2)
    counts = counter.get_flop_counts()["Global"].items()
    matrices = sum(number for name, number in counts if str(name) in ("aten.addmm", "aten.mm"))
    counted = step_operations(model, {"image_states": image, "question_states": question})
    assert matrices == pytest.approx(counted - 3 * attention, rel=0.01)
    everything = encoder_operations(model, 17, 9)
    assert sum(everything["question"]) == 4 * everything["question"][1]
    assert sum(everything["image"]) == 2 * everything["image"][1] + 16 * 2 * 3 * 8 ** 2 * 32  # its patches
