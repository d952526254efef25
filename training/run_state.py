"""What a run leaves in its output folder, and how an interrupted run goes on from there."""
import contextlib
import csv
import math
import signal
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from common import distributed
from common.files import atomic_write, file_lock, remove_temporaries, write_json
from training.checkpoint import FORMAT, KEYS, load_weights, read_checkpoint, save_checkpoint
from training.optimizer import load_optimizer, steps_taken

# settings that may differ between an interrupted run and its --resume
FREE_ON_RESUME = ("resume", "workers", "device", "cache_dir")
WATCHED_QUESTIONS = 8  # in samples.csv
MAX_OVERFLOWS = 50  # in a run: the scale starts at 2**16 and halves at each, so a few find it
STEPS_PER_OVERFLOW = 1000  # and it doubles after 2,000 good steps, so a long run meets some more
SAVING_SHARE = 0.05  # of the time may go into saving: what a kill costs is 20 times what a save takes


@contextlib.contextmanager
def only_run_in(output_dir):
    """Hold `output_dir` for this process; ValueError where another run holds it. The lock ends with its process."""
    if distributed.get_rank() > 0:  # rank 0 holds it for all
        yield
        return
    folder = Path(output_dir)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / ".lock", f"another run is writing to {folder}: wait for it, or choose another --output-dir"):
        remove_temporaries(folder)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # what failed before it wrote anything leaves nothing
                for path in new_folders:
                    path.rmdir()


class StopSignal:
    """Notes SIGINT and SIGTERM, so that a step is finished and saved; the second one interrupts at once."""

    def __enter__(self):
        self.noted = False
        self.before = {number: signal.signal(number, self.note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def note(self, number, frame):
        if self.noted:
            raise KeyboardInterrupt("stopped at once: the same command with --resume continues from the last save")
        self.noted = True
        print("\nfinishing the step, then saving; once more stops at once", file=sys.stderr)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class RunFolder:
    """The state of a training run, in memory and on the disk.

    `state` holds what a resumed run needs besides weights and optimizer: finished epochs, steps of the running one,
    the log and the samples, the random numbers' state. On the disk stand the best checkpoint, last.pt, train_log.csv,
    samples.csv, loss_plot.png and config.json: the two CSVs are written after every epoch, the others when they are due.
    All processes of a run hold the same state; rank 0 writes.
    """

    def __init__(self, output_dir, model, optimizer, scaler, identity, earlier_stages, watched):
        """`identity`: what a checkpoint says besides weights, epoch and loss. `earlier_stages`: logs that the curves
        show on the same scale. `watched`: the rows (DataFrame) of samples.csv."""
        self.folder, self.model, self.optimizer, self.scaler = Path(output_dir), model, optimizer, scaler
        self.identity, self.earlier_stages = {**identity, "processes": distributed.get_world_size()}, earlier_stages
        self.watched = watched[["question_id", "image_path", "question", "answer"]].reset_index(drop=True)
        self.state = {"epoch": 0, "step": 0, "best": math.inf, "stale": 0, "finished": False, "log": [], "samples": {},
                      "random": []}
        self.best = None  # a better model than the one on the disk
        self.saved_at, self.saving_took = time.monotonic(), 0.0

    def close_epoch(self, row, samples, epochs, patience):
        """Add the epoch's log `row` and its `samples` (list of str), decide whether it was the last, save what is due."""
        state = self.state
        state["log"].append(row)
        state["samples"][f"epoch {row['epoch']}"] = samples
        state["epoch"], state["step"], state["random"] = row["epoch"], 0, []
        improved = row["val_loss"] < state["best"]
        state["best"], state["stale"] = min(state["best"], row["val_loss"]), 0 if improved else state["stale"] + 1
        state["finished"] = state["epoch"] >= epochs or state["stale"] >= patience
        if improved:
            self.best = self.content({name: tensor.clone() for name, tensor in self.model.trainable_weights().items()})
        if distributed.get_rank() == 0:
            print(f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}"
                  f"{' *' * improved}, val BLEU {row['val_bleu']:.1f}", flush=True)
            self.write_tables()
        if state["finished"] or self.due():
            self.save()

    def overflows(self, steps):
        """How many of `steps`, counted since the run's start, overflowed in fp16 since the last epoch in the log."""
        return steps - steps_taken(self.optimizer) - sum(row["overflows"] for row in self.state["log"])

    def require_few_overflows(self, steps):
        """Raise ValueError where more of the `steps` since the run's start overflowed than finding the scale explains."""
        allowed, overflows = MAX_OVERFLOWS + steps // STEPS_PER_OVERFLOW, steps - steps_taken(self.optimizer)
        if self.scaler.is_enabled() and overflows > allowed:
            raise ValueError(f"{overflows} of {steps} steps overflowed in fp16, more than {allowed}, the last in epoch "
                             f"{self.state['epoch'] + 1}; the last good checkpoint is {self.folder / 'vqa_checkpoint.pt'}; use "
                             "--amp bf16 or --amp off, or a lower --learning-rate")

    def due(self):
        """Whether enough time has passed since the last save; the same answer in every process."""
        return distributed.broadcast(time.monotonic() - self.saved_at >= self.saving_took / SAVING_SHARE)

    def content(self, weights):
        """What a checkpoint file says of this moment."""
        last = self.state["log"][-1] if self.state["log"] else {"epoch": 0, "val_loss": math.inf}
        return {"format": FORMAT, **self.identity, "weights": weights, "epoch": last["epoch"], "val_loss": last["val_loss"]}

    def save(self):
        """The best checkpoint first, then last.pt: a kill in between repeats some steps and writes the same again."""
        started = time.monotonic()
        if self.state["step"]:
            self.state["random"] = distributed.all_gather(random_state(self.model))
        if distributed.get_rank() == 0:
            if self.best:
                save_checkpoint(self.folder / "vqa_checkpoint.pt", self.best)
            save_checkpoint(self.folder / "last.pt", {
                **self.content(self.model.trainable_weights()), "state": self.state,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()})
            self.write_settings_and_curves()
        self.best = None
        self.saved_at = time.monotonic()
        self.saving_took = self.saved_at - started

    def write_tables(self):
        """train_log.csv and samples.csv, anew."""
        with atomic_write(self.folder / "train_log.csv") as temporary:
            pd.DataFrame(self.state["log"]).to_csv(temporary, index=False)
        with atomic_write(self.folder / "samples.csv") as temporary:
            samples = pd.concat([self.watched, pd.DataFrame(self.state["samples"])], axis=1)
            samples.to_csv(temporary, index=False, quoting=csv.QUOTE_ALL)

    def write_settings_and_curves(self):
        """config.json and loss_plot.png, anew."""
        from evaluation.charts import draw_curves  # matplotlib takes half a second to import
        write_json(self.folder / "config.json", self.identity["settings"])
        draw_curves([*self.earlier_stages, (self.identity["stage"], self.state["log"])], self.folder / "loss_plot.png")

    def resume(self):
        """Put model, optimizer, scaler and state back to where last.pt left them."""
        path = self.folder / "last.pt"
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: {path} not found; start without --resume")
        last = read_checkpoint(path, (*KEYS, "data", "processes", "state", "optimizer", "scaler"))
        changed = differences(comparable(last), comparable(self.identity))
        if changed or last["vocab"] != self.identity["vocab"]:
            text = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
            raise ValueError(f"{path} is of a run with other settings: {text or 'other training answers'}. Set them back, "
                             "or start without --resume")
        load_weights(self.model, last["weights"], path)
        try:
            load_optimizer(self.optimizer, last["optimizer"])
            if last["scaler"]:  # empty where the interrupted run was not in fp16
                self.scaler.load_state_dict(last["scaler"])
            self.state = {name: last["state"][name] for name in self.state}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.100}): start without --resume") from error
        where = f"epoch {self.state['epoch']}" + (f" and {self.state['step']} steps" if self.state["step"] else "")
        print(f"resumed after {where}" + (": the run had finished" if self.state["finished"] else ""))
        if distributed.get_rank() == 0:
            self.write_tables()
            self.write_settings_and_curves()


def random_state(model):
    """The state of the random numbers that dropout draws: (CPU's, the device's or None)."""
    device = next(model.parameters()).device
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def restore_random_state(state, model):
    """Put back what `random_state` gave."""
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, next(model.parameters()).device)


def watched_rows(dataset, seed):
    """The rows of samples.csv: the same few questions after every epoch, so that one can watch the model learn."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return order[:WATCHED_QUESTIONS].tolist()


def comparable(content):
    """Everything in a checkpoint's content that must be the same for a run to go on as if it had not stopped."""
    return {**content["settings"], **content["encoders"], **content["sizes"], **content["data"],
            "processes": content["processes"], "vocabulary": len(content["vocab"])}


def differences(old, new):
    """{name: (old, new)} of the settings that matter and differ."""
    return {name: (old.get(name), new.get(name)) for name in {**old, **new}
            if name not in FREE_ON_RESUME and old.get(name) != new.get(name)}
