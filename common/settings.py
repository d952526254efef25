"""The command line of every script: a settings dataclass becomes flags, an expected error becomes one line."""
import dataclasses
import os
import re
import signal
import sys

# OpenMP's threads wait for each other in a loop: this often, and then they give up their core. By itself OpenMP takes 300,000,
# and on a machine with other programs every step then waits for a thread that has no core (docs/machines.md). OpenMP reads the
# variable when torch is imported.
SPIN_COUNT = "3000"
if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"}:
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

# ranges of settings that several scripts have
COUNT, WORKERS = (1, 1_000_000), (0, 256)
POSITIVE = (1e-12, 1e6)
SEED = (0, 2 ** 31 - 1)  # numpy, torch and random all accept it
# control characters, line ends, marks that turn the direction of writing, and bytes that are no UTF-8
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# user:password@, with or without http:// before it; the limits keep the search fast in long texts
PASSWORD = re.compile(r"(?<=://)\S{0,300}@|[\w.%+-]{1,100}:(?!//)\S{0,300}@")


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
        print(f"{f'process {rank}: ' * (rank > 0)}error: {printable(str(error).strip())}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError as error:
        if os.environ.get("VQA_DEBUG") or "gloo/transport" not in str(error):  # a broken connection
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
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range: {lowest} <= {name} <= {highest}")
