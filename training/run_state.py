"""The state of a training run and the files in its output folder: what is saved after an epoch, and how it is resumed."""
import contextlib
import csv
import itertools
import math
import time
from pathlib import Path

import pandas as pd

from common import distributed
from common.files import atomic_write, file_lock, remove_temporaries, write_json
from features.arrays import hash_of
from features.trained_model import KEYS, differences, load_weights, read_checkpoint
from training.checkpoint import save_checkpoint

# settings that may differ when a run is resumed; files are compared by their content
FREE_ON_RESUME = ("resume", "overwrite", "epochs", "patience", "workers", "device", "cache_dir", "output_dir", "data_dir",
                  "checkpoint", "clip_model", "clip_pretrained", "gpt2_model", "allow_outside", "allow_trained_images")
DRAW_EVERY = 5  # seconds between two drawings of the curves: one takes 0.3 s, a short epoch less


@contextlib.contextmanager
def lock_output_folder(cfg):
    """Create `cfg.output_dir` and hold its lock. A folder left empty is removed.

    Raises ValueError if another process writes there, or if the folder holds a run and neither `cfg.resume` nor
    `cfg.overwrite` is set. Raises FileNotFoundError if there is nothing to resume.
    """
    if distributed.get_rank() > 0:  # rank 0 holds it for all
        yield
        return
    folder = Path(cfg.output_dir)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(folder / ".lock", f"another run is writing to {folder}: wait for it, or choose another --output-dir"):
            check_output_folder(folder, cfg)
            remove_temporaries(folder)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in new_folders:
                path.rmdir()


def check_output_folder(folder, cfg):
    """Raise ValueError if a new run would replace one by mistake, FileNotFoundError if a file to resume from is missing."""
    last, best = folder / "last.pt", folder / "vqa_checkpoint.pt"
    if cfg.resume and not last.is_file():
        raise FileNotFoundError(f"nothing to resume: {last} not found; start without --resume")
    if cfg.resume and not best.is_file():  # a later epoch need not be better
        raise FileNotFoundError(f"the best weights are missing: copy {best} back, or replace the run with --overwrite")
    if not cfg.resume and not cfg.overwrite and (last.exists() or best.exists()):
        resume = "continue it with --resume, " if last.is_file() and best.is_file() else ""
        raise ValueError(f"{folder} holds a trained run: {resume}replace it with --overwrite, or take "
                         f"{another_folder(folder)}")


def another_folder(folder):
    """The flag that names the first free folder of `folder`_2, `folder`_3, ..."""
    return f"--output-dir {next(path for n in itertools.count(2) if not (path := Path(f'{folder}_{n}')).exists())}"


class Run:
    """A run's log and samples, and the files that hold them. All processes hold the same state; rank 0 writes.

    `log`: one dict per epoch, epoch 0 is the evaluation before training. `samples`: {"epoch N": answers to the
    sample rows}. `saved`: the epoch in last.pt, 0 if nothing is saved. `unsaved_best`: the checkpoint of the best epoch,
    until it is written. A run saves after every epoch, and an epoch's
    order and dropout follow from (seed, epoch): a resumed run therefore continues bit for bit (on a CPU). Epoch 0 is
    saved together with epoch 1: until then the files of a run that is overwritten stay as they are.
    """

    def __init__(self, output_dir, model, optimizer, scaler, header, earlier_stages, sample_rows):
        """`header`: checkpoint entries that stay the same during the run. `earlier_stages`: [(name, log)] for the curves.
        `sample_rows`: the rows (DataFrame) of samples.csv."""
        self.folder, self.model, self.optimizer, self.scaler = Path(output_dir), model, optimizer, scaler
        self.header = {**header, "processes": distributed.get_world_size()}
        self.earlier_stages = earlier_stages
        self.sample_rows = sample_rows[["question_id", "image_path", "question", "answer"]]
        self.log, self.samples, self.saved, self.unsaved_best, self.drawn_at = [], {}, 0, None, -math.inf

    def save_epoch(self, row, samples, finished):
        """Add the epoch's log row and its samples (list of str) and save everything."""
        improved = all(row["val_loss"] < earlier["val_loss"] for earlier in self.log)
        self.log.append(row)
        self.samples[f"epoch {row['epoch']}"] = samples
        if distributed.get_rank() == 0:
            print(f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f} "
                  f"(both without smoothing), val BLEU {row['val_bleu']:.1f}{' *' * improved}", flush=True)
            # the weights first: without the tables nothing is lost
            self.save_weights(row, improved)
            if row["epoch"] > 0:
                self.write_tables()
                if finished or time.monotonic() - self.drawn_at > DRAW_EVERY:
                    self.draw_curves()
        self.saved = row["epoch"]

    def save_weights(self, row, improved):
        """Write vqa_checkpoint.pt if the epoch improved, and last.pt. Epoch 0 is only remembered. OSError says what is lost."""
        weights = self.model.trainable_weights()
        content = {**self.header, "weights": weights, "epoch": row["epoch"], "val_loss": row["val_loss"]}
        if improved:
            self.unsaved_best = content
        if row["epoch"] == 0:  # training changes the weights in place
            content["weights"] = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
            return
        try:
            if not self.saved:  # last.pt of an earlier run does not fit this run's vqa_checkpoint.pt
                (self.folder / "last.pt").unlink(missing_ok=True)
            # The best checkpoint first: a kill between the two files repeats the epoch and writes the same one again.
            if self.unsaved_best:
                save_checkpoint(self.folder / "vqa_checkpoint.pt", self.unsaved_best)
            save_checkpoint(self.folder / "last.pt", {
                **content, "log": self.log, "samples": self.samples, "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict()})
        except OSError as error:
            raise OSError(f"{error}: epoch {row['epoch']} is lost; {self.how_to_continue()}") from error
        self.unsaved_best = None

    def how_to_continue(self):
        """The end of a message about an epoch that is lost."""
        if not self.saved:
            return "there is nothing to resume yet"
        flag = "--resume in place of --overwrite" if self.header["settings"]["overwrite"] else "--resume"
        return f"the epochs before it are saved: the same command with {flag} continues"

    def write_tables(self):
        """train_log.csv, samples.csv and config.json."""
        with warn_if_not_written():
            write_json(self.folder / "config.json", self.header["settings"])
        with warn_if_not_written(), atomic_write(self.folder / "train_log.csv") as temporary:
            pd.DataFrame(self.log).to_csv(temporary, index=False)
        with warn_if_not_written(), atomic_write(self.folder / "samples.csv") as temporary:
            samples = pd.concat([self.sample_rows.reset_index(drop=True), pd.DataFrame(self.samples)], axis=1)
            samples.to_csv(temporary, index=False, quoting=csv.QUOTE_ALL)

    def draw_curves(self):
        from training.curves import draw_curves  # importing matplotlib takes half a second
        with warn_if_not_written():
            draw_curves([*self.earlier_stages, (self.header["stage"], self.log)], self.folder / "loss_plot.png")
        self.drawn_at = time.monotonic()

    def resume(self):
        """Restore model, optimizer, scaler, log and samples from last.pt. Raises ValueError if the run is another one."""
        path, remedy = self.folder / "last.pt", f"replace the run with --overwrite, or take {another_folder(self.folder)}"
        try:
            last = read_checkpoint(path, (*KEYS, "data", "stage_one", "processes", "log", "samples", "optimizer", "scaler"))
        except ValueError as error:
            raise ValueError(f"{error}; {remedy}") from error
        try:
            changed = differences(comparable(last), comparable(self.header))
            if changed:
                text = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
                raise ValueError(f"{path} is of a run with other settings or data: {text}. Use the same settings and "
                                 f"data, or start a new run with {another_folder(self.folder)} and without --resume")
            settings, epochs_before = self.header["settings"], last["settings"]["epochs"]
            load_weights(self.model, last["weights"], path)
            self.optimizer.load_state_dict(last["optimizer"])
            if last["scaler"]:  # empty if the interrupted run was not in fp16
                self.scaler.load_state_dict(last["scaler"])
            self.log, self.samples = list(last["log"]), dict(last["samples"])
            self.saved = self.log[-1]["epoch"]
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.100}): {remedy}") from error
        if is_finished(self.log, settings["epochs"], settings["patience"]):
            print(f"this run has ended after epoch {self.saved}: with more --epochs or a larger --patience it goes on")
            self.header["settings"] = last["settings"]  # config.json keeps what the run was trained with
        else:
            print(f"resumed after epoch {self.saved}")
            if settings["epochs"] != epochs_before:
                print(f"epochs was {epochs_before}, is {settings['epochs']}: from epoch {self.saved + 1} on the learning rates "
                      f"follow the schedule of {settings['epochs']} epochs")
        if distributed.get_rank() == 0:
            self.write_tables()
            self.draw_curves()


@contextlib.contextmanager
def warn_if_not_written():
    """Print an OSError of the block instead of raising it."""
    try:
        yield
    except OSError as error:
        print(f"warning: {error}; the weights are saved, and training goes on", flush=True)


def comparable(content):
    """{name: value} of everything that must be equal for a run to continue as if it had not stopped.

    Files are compared by their content, wherever they are.
    """
    settings = {name: value for name, value in content["settings"].items() if name not in FREE_ON_RESUME}
    encoders = {f"fingerprint of --{name}-model": value for name, value in content["encoders"]["fingerprints"].items()}
    data = {f"{name} of --data-dir": value for name, value in content["data"].items()}
    return {**settings, **encoders, **content["model_config"], **content["trainable_blocks"], **data,
            "fingerprint of --checkpoint": content["stage_one"], "processes": content["processes"],
            "vocabulary": hash_of(content["vocab"])}


def is_finished(log, epochs, patience):
    """Whether a run with this log has ended: after `epochs`, or `patience` epochs without a lower validation loss."""
    losses = [row["val_loss"] for row in log]
    epochs_without_improvement = len(losses) - 1 - losses.index(min(losses))
    return log[-1]["epoch"] >= epochs or epochs_without_improvement >= patience
