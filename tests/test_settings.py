"""The command line of every script: output that nobody can read, Ctrl-C at any time, memory that runs out."""
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Literal

import pytest
import tiny
from builder import many_entries, write_official
from conftest import ROOT, call_script, error_line, start

from common.config_file import has_type
from common.settings import check_ranges, printable

LATIN = "Übung"  # a folder whose name an ASCII terminal cannot show


@pytest.fixture(scope="module")
def vqa_dir(tmp_path_factory):
    return write_official(tmp_path_factory.mktemp("official") / "vqa", many_entries())


def shell(command, cwd, **environment):
    """Run a command line of bash, in which `python` is this one."""
    return subprocess.run(["bash", "-c", command.replace("python ", f"{sys.executable} ")], cwd=cwd, capture_output=True,
                          text=True, timeout=120, env={**os.environ, **environment})


@pytest.mark.parametrize("redirection, told", [
    (">&-", ""), ("2>&-", ""), (">&- 2>&- <&-", ""), ("2> /dev/full", ""), ("> /dev/full 2>&1", ""),
    ("> /dev/full", "standard output cannot be written (No space left on device): the run goes on without it\n")])
def test_a_run_goes_on_if_its_output_cannot_be_written(redirection, told, vqa_dir, tmp_path):
    """With standard output closed, the settings ended in a traceback, and the next file that was opened got its number."""
    result = shell(f"python {ROOT}/mini_vqa_v2.py --no-pictures --vqa-dir {vqa_dir} --output-dir out {redirection}", tmp_path)
    assert (result.returncode, result.stderr) == (0, told)
    assert len(tiny.read_csv(tmp_path / "out/metadata.csv")) == 240


def test_a_training_goes_on_if_its_output_cannot_be_written(train_flags, tmp_path):
    flags = " ".join(f"'{flag}'" for flag in train_flags)
    result = shell(f"python {ROOT}/train.py {flags} --output-dir run > /dev/full 2>&1", tmp_path, TQDM_DISABLE="")
    assert result.returncode == 0 and len(tiny.read_log(tmp_path / "run")) == 2


def test_a_training_goes_on_if_the_reader_of_its_output_ends(train_flags, tmp_path):
    """As in `nohup python train.py | tee log`, when the terminal is closed."""
    flags = " ".join(f"'{flag}'" for flag in train_flags)
    command = f"set -o pipefail; python {ROOT}/train.py {flags} --output-dir run | grep -m 1 'epoch 0'"
    result = shell(command, tmp_path)
    assert result.returncode == 0 and len(tiny.read_log(tmp_path / "run")) == 2
    assert "standard output cannot be written (Broken pipe): the run goes on without it" in result.stderr


@pytest.mark.parametrize("environment", [
    {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["ascii", "C locale"])
def test_a_terminal_that_lacks_letters_shows_their_numbers(environment, vqa_dir, tmp_path):
    flags = f"--no-pictures --vqa-dir {vqa_dir} --output-dir {LATIN}"
    result = shell(f"python {ROOT}/mini_vqa_v2.py {flags}", tmp_path, **environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.search(r"into (\\xdcbung|\\udcc3\\udc9cbung)$", result.stdout) and (tmp_path / LATIN / "metadata.csv").is_file()
    assert shell(f"python {ROOT}/mini_vqa_v2.py --help", tmp_path, **environment).returncode == 0


@pytest.mark.parametrize("flags", ["--help", "--no-pictures --output-dir out --vqa-dir"], ids=["help", "a run"])
def test_a_reader_that_has_ended_ends_the_script_quietly(flags, vqa_dir, tmp_path):
    """As in `python mini_vqa_v2.py | head -1`."""
    command = f"python {ROOT}/mini_vqa_v2.py {flags} {vqa_dir if flags != '--help' else ''}"
    result = shell(f"sleep 0.1 | ({command}; echo $? > status) | exec true", tmp_path)
    for _ in range(100):  # the shell does not wait for the left side of a pipe
        time.sleep(0.1)
        if (tmp_path / "status").is_file() and (tmp_path / "status").read_text():
            break
    assert (result.stderr, (tmp_path / "status").read_text()) == ("", "141\n")


@pytest.mark.parametrize("script", ["train.py", "fine_tune.py", "test.py", "mini_vqa_v2.py", "demo/app.py"])
def test_ctrl_c_during_the_imports_is_one_line(script, tmp_path):
    """A KeyboardInterrupt in torch's C++ code aborted the process, elsewhere it was a traceback of many lines."""
    slow = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(1)\nraise ImportError('not reached')\n"
    for name in ("torch", "pandas", "pooch"):
        (tmp_path / f"{name}.py").write_text(slow)
    process = start(ROOT / script, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    said = f"{(ROOT / script).name}: loading libraries\n"
    assert process.communicate(timeout=60) == (said, "interrupted\n") and process.returncode == 130


@pytest.mark.parametrize("flags, environment", [(("--help",), {}), ((), {"RANK": "1", "WORLD_SIZE": "2"})],
                         ids=["help", "rank 1"])
def test_help_and_further_processes_of_torchrun_do_not_announce_their_imports(flags, environment, tmp_path):
    process = start(ROOT / "mini_vqa_v2.py", *flags, "--vqa-dir=none", cwd=tmp_path, **environment)
    assert "loading libraries" not in process.communicate(timeout=60)[0]


@pytest.mark.parametrize("command, expected", [((ROOT / "train.py",), "train.py: loading libraries\nFalse\n"),
                                               (("-c", "import train"), "True\n")], ids=["script", "notebook"])
def test_a_script_does_not_collect_garbage_while_it_imports(command, expected, tmp_path):
    """It took a third of the time between command and answer. A notebook keeps its own setting."""
    (tmp_path / "torch.py").write_text("import gc, os\nprint(gc.isenabled(), flush=True)\nos._exit(0)")
    process = start(*command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert process.communicate(timeout=60)[0] == expected


def test_importing_the_package_leaves_ctrl_c_alone(tmp_path):
    """A notebook that imports `train` keeps its own handler."""
    code = "import signal; from common import settings; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    assert start("-c", code, cwd=tmp_path).communicate(timeout=60)[0] == "True\n"


TOY = """
from dataclasses import dataclass
from common import settings

@dataclass
class Config:
    batch_size: int = 4
    workers: int = 2
    name: str = "x"

def main(cfg):
    raise {error}

settings.run(main, Config)
"""


@pytest.mark.parametrize("error", [
    "MemoryError()", "MemoryError('Unable to allocate 8.00 GiB for an array')", "RuntimeError(\"can't start new thread\")",
    "RuntimeError(\"[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 "
    "bytes. Error code 12 (Cannot allocate memory)\")", "OSError(12, 'Cannot allocate memory')",
    "BlockingIOError(11, 'Resource temporarily unavailable')", "ImportError('x.so: failed to map segment from shared object')"])
def test_memory_or_threads_that_run_out_are_one_line(error, tmp_path):
    status, errors = run_toy(error, tmp_path)
    assert status == 2 and re.fullmatch("error: out of memory or threads.*: try a smaller --batch-size or --workers\n", errors)


def run_toy(error, folder, *flags, **environment):
    (folder / "toy.py").write_text(TOY.format(error=error))
    process = start("toy.py", *flags, cwd=folder, **environment)
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize("text", [
    "Is it 10:30@noon", "--image nofile:1@2x.jpg", "local-dir:/home/me@firm/enc", "C:a@b", "http://host:80/a@2x.jpg",
    "http://[::1]:80/a@b", "file:///home/me@firm/a", "see http://host: me@firm", "base_url = http://host/a@b"])
def test_text_with_at_signs_and_colons_is_printed_as_it_is(text):
    """Errors named `***@2x.jpg` in place of the file."""
    assert printable(text) == text


@pytest.mark.parametrize("text, expected", [
    ("http://user:se:c@ret@host/a@b", "http://***@host/a@b"), ("'http://user@host'", "'http://***@host'"),
    ("http://user:sec/ret@host", "http://***@host"), ("base_url = user:sec@ret@host", "base_url = ***@host"),
    ("--image-url 'user:sec/ret@host'", "--image-url '***@host'"), ("ftp://u:p@a http://u:p@b", "ftp://***@a http://***@b"),
    ("http://user:secret@", "http://***@")])
def test_passwords_in_addresses_are_hidden(text, expected):
    assert printable(text) == expected


def test_the_file_of_config_replaces_defaults_and_flags_replace_the_file(tmp_path):
    (tmp_path / "toy.py").write_text(TOY.format(error="ValueError"))
    (tmp_path / "config.json").write_text('{"batch_size": 8, "name": "y"}', encoding="utf-8-sig")  # as Notepad may save it
    process = start("toy.py", "--config", "config.json", "--name=z", cwd=tmp_path)
    assert process.communicate(timeout=60)[0].splitlines()[-3:] == ["  * batch_size = 8", "    workers = 2", "  * name = z"]


@pytest.mark.parametrize("content, message", [
    (None, "is no file that exists: train.py and fine_tune.py write config.json beside their checkpoint"),
    ('{"batch_size": 8', "is no JSON file with settings"),
    *((text, "is no JSON file with settings (at its top level is ") for text in ("[8]", "[]", '[["name", "y"]]', "null", "3")),
    ('{"batch_size": 8, "gpt2_layers": 4}', ": toy.py has no setting gpt2_layers; is it the file of another script?"),
    ('{"batch_size": "8"}', ": batch_size is '8', not int"), ('{"batch_size": true}', ": batch_size is True, not int"),
    *((f'{{"name": "{text}"}}', f": name is {value}, no valid text") for text, value in (
        (r"a\u0000b", r"'a\x00b'"), (r"\ud800", r"'\ud800'"))),
    ('{"batch_size": null}', ": batch_size is None, not int"), ('{"name": 8}', ": name is 8, not str")])
def test_a_file_of_config_that_does_not_fit_is_one_line(content, message, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    status, errors = run_toy("ValueError", tmp_path, "--config", "config.json")
    assert status == 2 and f"--config config.json{message if message[0] == ':' else ' ' + message}" in error_line(errors)


def test_a_number_out_of_range_is_not_printed_with_hundreds_of_digits():
    with pytest.raises(ValueError, match="^--batch-size 10{39} is out of range: 1 <= batch_size <= 9$"):
        check_ranges(SimpleNamespace(batch_size=10 ** 400), batch_size=(1, 9))


@pytest.mark.parametrize("value, kind, fits", [
    (1, float, True), (True, float, False), ("a", float, False), (1.0, int, False), ("bf16", Literal["bf16", "off"], True),
    ("no", Literal["bf16", "off"], False), ([1], Literal["bf16", "off"], False), (None, str | None, True),
    (1, str | None, False), (("a", "b"), tuple[str, ...] | None, True), (("a", 1), tuple[str, ...] | None, False),
    ("ab", tuple[str, ...], False)])
def test_types_of_settings(value, kind, fits):
    assert has_type(value, kind) == fits


def test_an_unexpected_error_keeps_its_traceback(tmp_path):
    status, errors = run_toy("RuntimeError('a fault of the program')", tmp_path)
    assert status == 1 and "Traceback" in errors and "a fault of the program" in errors


def test_a_model_larger_than_the_memory_is_one_line(train_flags, tmp_path):
    """It took 26 GB, and ended in torch's own error with a traceback."""
    code = ("import resource, train, open_clip; from pathlib import Path; from transformers import AutoTokenizer, GPT2Model\n"
            "pages = int(Path('/proc/self/statm').read_text().split()[0])\n"
            "resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (600 << 20),) * 2)\n"
            "train.settings.run(train.main, train.Config)")
    process = start("-c", code, *train_flags, "--hidden-size", 8192, "--num-layers", 16, "--output-dir", "run", cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    assert re.search("out of memory.*you tried to allocate.*--hidden-size$", error_line(errors))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_PORT"])
def test_a_variable_of_torchrun_that_is_no_number_is_one_line(name, train_flags, tmp_path, monkeypatch):
    group = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400", name: "abc"}
    for variable, value in group.items():
        monkeypatch.setenv(variable, value)
    message = f"the environment variable {name} is 'abc', no number: unset it, or start with torchrun"
    assert message in call_script("train.py", *train_flags, expect=2, cwd=tmp_path)


def test_help_on_a_terminal_of_one_column(tmp_path):
    """The parser tried for ever to put a letter and its frame into it."""
    result = shell(f"python {ROOT}/mini_vqa_v2.py --help", tmp_path, COLUMNS="1")
    assert result.returncode == 0 and "--output-dir" in result.stdout


def test_a_missing_process_is_one_line_without_the_log_of_torch(train_flags, tmp_path):
    code = ("import train; from common import distributed\n"
            "distributed.MEETING_SECONDS = 1; train.settings.run(train.main, train.Config)")
    process = start("-c", code, *train_flags, cwd=tmp_path, RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    assert "did not meet at 127.0.0.1:1 within 1 s" in error_line(process.communicate(timeout=120)[1])
