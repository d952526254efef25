"""Standard output and error: text that cannot be shown ends no run, and Ctrl-C is one line from the first import on.

A script says at once that it has started: its libraries take seconds to load.
"""
import atexit
import gc
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPT_FOLDERS = (ROOT, ROOT / "demo", ROOT / "benchmarks")
BROKEN_PIPE = 141  # what a shell reports for other programs whose reader has ended


class Stream:
    """Standard output or error. If it cannot be written any longer (full disk, closed terminal), the run goes on without it.

    Only a pipe whose reader has ended, as in `python test.py | head -1`, ends the process, without a message.
    """

    ends_with_reader = True

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")  # for letters that the terminal's encoding lacks

    def write(self, text):
        self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, action, *arguments):
        try:
            action(*arguments)
        except OSError as error:
            with open(os.devnull, "wb") as nowhere:  # what is still in a buffer goes there too
                os.dup2(nowhere.fileno(), self.stream.fileno())
            if isinstance(error, BrokenPipeError) and self.ends_with_reader:
                sys.exit(BROKEN_PIPE)
            if self is sys.stdout:
                print(f"standard output cannot be written ({error.strerror}): the run goes on without it", file=sys.stderr)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def replace_closed_streams():
    """Open os.devnull for each standard stream that is closed: its number would go to the next file that is opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  open as long as the process


def protect_streams():
    """Make Streams of standard output and error, unless they are replaced already."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is getattr(sys, f"__{name}__"):
            setattr(sys, name, Stream(getattr(sys, name)))


def outlive_readers():
    """From now on no broken pipe ends the process: hours of training are worth more than `tee`."""
    Stream.ends_with_reader = False


def end_imports_at_once(number, frame):
    """The handler of Ctrl-C while torch and others are imported: their C++ code aborts at a KeyboardInterrupt."""
    os.write(2, b"interrupted\n")
    os._exit(130)


def announce_imports():
    """Say that libraries are loaded, which takes seconds, and set `end_imports_at_once`; but only in our own scripts.

    Until the imports have ended, and at the exit, garbage is not collected: it is searched for in all objects of the
    libraries, again and again, which took a third of the time. Nothing is said for --help, whose output may be piped, and
    in further processes of torchrun. If Ctrl-C is ignored, as in a background job, it stays ignored.
    """
    main_file = Path(getattr(sys.modules["__main__"], "__file__", None) or "nowhere/else").resolve()
    if main_file.parent not in SCRIPT_FOLDERS:
        return
    gc.disable()
    atexit.register(gc.freeze)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end_imports_at_once)
    if not {"-h", "--help"} & set(sys.argv) and os.environ.get("RANK", "0") == "0":
        protect_streams()
        print(f"{main_file.name}: loading libraries", flush=True)


def imports_have_ended():
    if not gc.isenabled():
        gc.freeze()
        gc.enable()
    if signal.getsignal(signal.SIGINT) is end_imports_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
