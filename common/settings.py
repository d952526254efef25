"""The command line of every script: a settings dataclass becomes flags, an expected error becomes one line."""
import argparse
import dataclasses
import os
import re
import shutil
import signal
import sys
from typing import Annotated

from common import terminal
from common.config_file import read_config
from common.files import is_same

terminal.replace_closed_streams()
terminal.announce_imports()
# Rounds of OpenMP's busy loop, in which its threads wait for each other, before a thread gives up its core. With OpenMP's own
# 300,000 every step waits for a thread that has no core, if other programs run (docs/machines.md). Read when torch is imported.
SPIN_COUNT = "1000"
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # without it C++ also logs the errors that it raises

# ranges of settings that several scripts have
COUNT, WORKERS = (1, 1_000_000), (0, 256)
POSITIVE = (1e-12, 1e6)
SEED = (0, 2 ** 31 - 1)  # numpy, torch and random all accept it
MIN_COLUMNS = 40  # of the terminal, for --help
# how torch, the threads of Python, and the operating system say that there is too little memory, or too many threads
NO_MEMORY = re.compile("can't allocate memory|cannot allocate memory|out of memory|can't start new thread|bad_alloc|"
                       "resource temporarily unavailable|failed to map segment", re.I)
# control characters, line ends, marks that turn the direction of writing, and bytes that are no UTF-8
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# user:password@ in an address: after ://, or where the value of --base-url or --image-url begins. A password may hold a
# slash, unless it looks like a port. The limits keep the search fast in long texts.
PASSWORD = re.compile(r"(?:(?<=://)|(?<=_url = )|(?<=-url '))(?:[^\s/]{0,300}|[^\s/:\[]{1,100}:(?!\d*/)\S{0,300})@")


def run(main, config_class):
    """Parse the flags of `config_class`, print the settings, call `main(cfg)`.

    ValueError and OSError (a wrong setting, a missing file, a full disk) and memory that runs out end in one line on
    stderr and exit status 2. Ctrl-C and a TERM signal end in one line and status 130. If another process of a torchrun
    ends, this one ends in one line and status 1. VQA_DEBUG=1 shows the traceback.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    terminal.imports_have_ended()
    terminal.protect_streams()
    process = ""
    try:
        if environment_number("WORLD_SIZE", 1) > 1:
            process = f"process {environment_number('RANK', 0)}: "
            if environment_number("RANK", 0) > 0:  # of torchrun's processes only the first one prints; all print errors
                sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as the process
        cfg = parse_flags(config_class)
        print_settings(cfg)
        main(cfg)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError, ImportError) as error:
        message, status = explain(error, config_class)
        if os.environ.get("VQA_DEBUG") or not message:
            raise
        print(f"{process}{printable(message.strip())}", file=sys.stderr)
        sys.exit(status)
    finally:
        sys.stdout.flush()  # a failed write is handled here, not at the exit of the interpreter


def explain(error, config_class):
    """(message, exit status) for an error that is no fault of the program, else ("", 1)."""
    text = str(error)
    if isinstance(error, MemoryError) or not isinstance(error, ValueError) and NO_MEMORY.search(text):
        fields = {field.name for field in dataclasses.fields(config_class)}
        flags = [f"--{name.replace('_', '-')}" for name in ("batch_size", "workers", "hidden_size") if name in fields]
        remedy = f"try a smaller {' or '.join(flags)}" if flags else "close other programs"
        return f"error: out of memory or threads ({(text or type(error).__name__):.200}): {remedy}", 2
    if isinstance(error, ValueError | OSError):
        return f"error: {text}", 2
    if "gloo/transport" in text:  # a broken connection
        return "stopped, because another process of this run ended", 1
    return "", 1


def environment_number(name, default):
    """The environment variable `name`, which torchrun sets, as an int. Raises ValueError if it is none."""
    value = os.environ.get(name, default)
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"the environment variable {name} is {value!r}, no number: unset it, or start with torchrun") from None


def parse_flags(config_class):
    """The settings: defaults, over them those of the file that --config names, over them the flags."""
    import tyro
    if shutil.get_terminal_size().columns < MIN_COLUMNS:  # tyro never ends on a very narrow terminal
        os.environ["COLUMNS"] = str(MIN_COLUMNS)
    config = Annotated[str | None, tyro.conf.arg(metavar="FILE", help=(
        "start from the settings of an earlier run, the config.json beside its checkpoint; other flags change them"))]
    flags_class = dataclasses.make_dataclass(config_class.__name__, [("config", config, None)], bases=(config_class,))
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", nargs="?")
    path = parser.parse_known_args()[0].config
    values = {} if path is None else read_config(path, config_class)
    flags = tyro.cli(flags_class, default=flags_class(**values), description=sys.modules[config_class.__module__].__doc__)
    cfg = config_class(**{field.name: getattr(flags, field.name) for field in dataclasses.fields(config_class)})
    for name, value in vars(cfg).items() if path is not None else ():
        if isinstance(value, str) and is_same(value, path):
            raise ValueError(f"--{name.replace('_', '-')} {value} would overwrite {path}, which --config names: choose another "
                             "one")
    return cfg


def print_settings(cfg):
    """Print all settings, the changed ones marked, so that a log says what was run."""
    print("settings (* = not the default)")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        mark = " " if value == field.default else "*"
        print(printable(f"  {mark} {field.name} = {value}"))
    sys.stdout.flush()


def printable(text):
    """`text` as one line for a terminal: what could control it is escaped, and passwords in addresses are hidden."""
    text = PASSWORD.sub("***@", UNPRINTABLE.sub(lambda match: ascii(match[0])[1:-1], text))
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def check_ranges(cfg, **ranges):
    """Raise ValueError unless each named setting lies in its range (lowest, highest). NaN lies in no range."""
    for name, (lowest, highest) in ranges.items():
        value = getattr(cfg, name)
        if not lowest <= value <= highest:
            raise ValueError(f"--{name.replace('_', '-')} {value!s:.40} is out of range: {lowest} <= {name} <= {highest}")
