"""The command line of every script: a settings dataclass becomes flags, an expected error becomes one line."""
import dataclasses
import os
import signal
import sys

MAX_SEED = 2 ** 31 - 1  # numpy, torch and random all accept it


def run(main, config_class):
    """Parse the flags of `config_class`, print the settings, call `main(cfg)`.

    ValueError and OSError (a wrong setting, a missing file, a full disk) end in one line on stderr and
    exit status 2. Ctrl-C and a TERM signal end in one line and status 130. If another process of a torchrun ends,
    this one ends in one line and status 1. VQA_DEBUG=1 shows the traceback.
    """
    import tyro
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cfg = tyro.cli(config_class, description=sys.modules[config_class.__module__].__doc__)
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:  # of torchrun's processes only the first one prints; all print errors
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as the process
    print_settings(cfg)
    try:
        main(cfg)
    except (ValueError, OSError) as error:
        if os.environ.get("VQA_DEBUG"):
            raise
        print(f"{f'process {rank}: ' * (rank > 0)}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if os.environ.get("VQA_DEBUG") or "by peer" not in str(error):  # what gloo says if a connection breaks
            raise
        print(f"process {rank}: stopped, because another process of this run ended", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)


def print_settings(cfg):
    """Print all settings, the changed ones marked, so that a log says what was run."""
    print("settings (* = not the default)")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        mark = " " if value == field.default else "*"
        text = f"  {mark} {field.name} = {value}"
        print(text.encode("utf-8", "backslashreplace").decode())  # a flag may hold bytes that are no UTF-8
    sys.stdout.flush()


def check_range(cfg, name, low=None, high=None, low_open=False):
    """Raise ValueError unless low <= cfg.name <= high (low < cfg.name if `low_open`). NaN is out of range."""
    value = getattr(cfg, name)
    above = low is None or (value > low if low_open else value >= low)
    below = high is None or value <= high
    if not (above and below):
        left = "" if low is None else f"{low} {'<' if low_open else '<='} "
        right = "" if high is None else f" <= {high}"
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} {value} is out of range: {left}{name}{right}")
