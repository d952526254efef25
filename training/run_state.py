"""The state of a training run and the files in its output folder: what is saved after an epoch, and how it is resumed."""
import contextlib
import csv
import math
import time
from pathlib import Path

import pandas as pd

from common import distributed
from common.files import atomic_write, file_lock, remove_temporaries, write_json
from features.arrays import hash_of
from training.checkpoint import KEYS, differences, load_weights, read_checkpoint, save_checkpoint

# settings that may differ between an interrupted run and its --resume
FREE_ON_RESUME = ("resume", "workers", "device", "cache_dir")
DRAW_EVERY = 5  # seconds between two drawings of the curves: one takes 0.3 s, a short epoch less


@contextlib.contextmanager
def lock_output_folder(output_dir):
    """Create `output_dir` and hold its lock. Raises ValueError if another run holds it. A folder left empty is removed."""
    if distributed.get_rank() > 0:  # rank 0 holds it for all
        yield
        return
    folder = Path(output_dir)
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with file_lock(folder / ".lock", f"another run is writing to {folder}: wait for it, or choose another --output-dir"):
            remove_temporaries(folder)
            yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in new_folders:
                path.rmdir()


class Run:
    """A run's log and samples, and the files that hold them. All processes hold the same state; rank 0 writes.

    `log`: one dict per epoch, epoch 0 is the evaluation before training. `samples`: {"epoch N": answers to the
    sample rows}. A run saves after every epoch, and an epoch's order and dropout follow from (seed, epoch): a resumed
    run therefore continues bit for bit (on a CPU).
    """

    def __init__(self, output_dir, model, optimizer, scaler, header, earlier_stages, sample_rows):
        """`header`: checkpoint entries that stay the same during the run. `earlier_stages`: [(name, log)] for the curves.
        `sample_rows`: the rows (DataFrame) of samples.csv."""
        self.folder, self.model, self.optimizer, self.scaler = Path(output_dir), model, optimizer, scaler
        self.header = {**header, "processes": distributed.get_world_size()}
        self.earlier_stages = earlier_stages
        self.sample_rows = sample_rows[["question_id", "image_path", "question", "answer"]]
        self.log, self.samples, self.drawn_at = [], {}, -math.inf

    def save_epoch(self, row, samples, finished):
        """Add the epoch's log row and its samples (list of str) and save everything."""
        improved = all(row["val_loss"] < earlier["val_loss"] for earlier in self.log)
        self.log.append(row)
        self.samples[f"epoch {row['epoch']}"] = samples
        if distributed.get_rank() > 0:
            return
        print(f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f} "
              f"(both without smoothing), val BLEU {row['val_bleu']:.1f}{' *' * improved}", flush=True)
        content = {**self.header, "weights": self.model.trainable_weights(), "epoch": row["epoch"], "val_loss": row["val_loss"]}
        if len(self.log) == 1:  # last.pt of an earlier run does not fit this run's vqa_checkpoint.pt
            (self.folder / "last.pt").unlink(missing_ok=True)
        # The best checkpoint first: a kill between the two files repeats the epoch and writes the same one again.
        if improved:
            save_checkpoint(self.folder / "vqa_checkpoint.pt", content)
        save_checkpoint(self.folder / "last.pt", {
            **content, "log": self.log, "samples": self.samples, "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict()})
        self.write_tables()
        if finished or time.monotonic() - self.drawn_at > DRAW_EVERY:
            self.draw_curves()

    def write_tables(self):
        """train_log.csv, samples.csv and config.json."""
        write_json(self.folder / "config.json", self.header["settings"])
        with atomic_write(self.folder / "train_log.csv") as temporary:
            pd.DataFrame(self.log).to_csv(temporary, index=False)
        with atomic_write(self.folder / "samples.csv") as temporary:
            samples = pd.concat([self.sample_rows.reset_index(drop=True), pd.DataFrame(self.samples)], axis=1)
            samples.to_csv(temporary, index=False, quoting=csv.QUOTE_ALL)

    def draw_curves(self):
        from training.curves import draw_curves  # importing matplotlib takes half a second
        draw_curves([*self.earlier_stages, (self.header["stage"], self.log)], self.folder / "loss_plot.png")
        self.drawn_at = time.monotonic()

    def resume(self):
        """Restore model, optimizer, scaler, log and samples from last.pt. Raises ValueError if the run is another one."""
        path = self.folder / "last.pt"
        if not path.is_file():
            raise FileNotFoundError(f"nothing to resume: {path} not found; start without --resume")
        last = read_checkpoint(path, (*KEYS, "data", "processes", "log", "samples", "optimizer", "scaler"))
        try:
            changed = differences(comparable(last), comparable(self.header))
            if changed:
                text = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items())
                raise ValueError(f"{path} is of a run with other settings: {text}. Set them back, or start without --resume")
            load_weights(self.model, last["weights"], path)
            self.optimizer.load_state_dict(last["optimizer"])
            if last["scaler"]:  # empty if the interrupted run was not in fp16
                self.scaler.load_state_dict(last["scaler"])
            self.log, self.samples = list(last["log"]), dict(last["samples"])
            print(f"resumed after epoch {self.log[-1]['epoch']}")
        except (LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} is damaged ({type(error).__name__}: {error!s:.100}): start without --resume") from error
        if distributed.get_rank() == 0:
            self.write_tables()
            self.draw_curves()


def comparable(content):
    """{name: value} of everything that must be equal for a run to continue as if it had not stopped."""
    settings = {name: value for name, value in content["settings"].items() if name not in FREE_ON_RESUME}
    return {**settings, **content["encoders"], **content["model_config"], **content["trainable_blocks"], **content["data"],
            "processes": content["processes"], "vocabulary": hash_of(content["vocab"])}


def is_finished(log, epochs, patience):
    """Whether a run with this log has ended: after `epochs`, or `patience` epochs without a lower validation loss."""
    losses = [row["val_loss"] for row in log]
    epochs_without_improvement = len(losses) - 1 - losses.index(min(losses))
    return log[-1]["epoch"] >= epochs or epochs_without_improvement >= patience
