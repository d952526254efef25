"""How every script starts: `run(main, Config)` turns the dataclass into flags and errors into one line."""
import dataclasses
import os
import signal
import sys

MAX_SEED = 2 ** 31 - 1  # every generator takes it


def run(main, config_class):
    """Parse the flags of `config_class`, print the settings, call `main(cfg)`.

    A mistake of the user (ValueError, or an OSError such as a missing file or a full disk) ends in
    one line on stderr and exit status 2; Ctrl-C and a TERM signal end in one line and status 130. Set
    VQA_DEBUG=1 for the traceback.
    """
    import tyro
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cfg = tyro.cli(config_class, description=sys.modules[config_class.__module__].__doc__)
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:  # torchrun's other processes: the first one speaks for all, but for errors
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  open as long as the process
    print_settings(cfg)
    try:
        main(cfg)
    except (ValueError, OSError) as error:
        if os.environ.get("VQA_DEBUG"):
            raise
        print(f"{f'process {rank}: ' * (rank > 0)}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "interrupted", file=sys.stderr)
        sys.exit(130)


def print_settings(cfg):
    """Print the settings in one block, the changed ones marked, so that a log says what was run."""
    print("settings (* = not the default)")
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        mark = " " if value == field.default else "*"
        text = f"  {mark} {field.name} = {value}"
        print(text.encode("utf-8", "backslashreplace").decode())  # a flag may hold any bytes
    sys.stdout.flush()


def check_range(cfg, name, low=None, high=None, low_open=False):
    """Raise ValueError unless low <= cfg.name <= high (low < cfg.name with `low_open`); NaN never passes."""
    value = getattr(cfg, name)
    above = low is None or (value > low if low_open else value >= low)
    below = high is None or value <= high
    if not (above and below):
        left = "" if low is None else f"{low} {'<' if low_open else '<='} "
        right = "" if high is None else f" <= {high}"
        flag = name.replace("_", "-")
        raise ValueError(f"--{flag} {value} is out of range: {left}{name}{right}")
