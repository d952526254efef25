"""What a run leaves in its output folder after every epoch, and how an interrupted run goes on from there."""
import contextlib
import csv
import fcntl
from pathlib import Path

import pandas as pd
import torch

from checkpoint import FORMAT, KEYS, load_weights, read_checkpoint, save_checkpoint
from files import whole_file
from plots import draw_curves

# settings that may differ between an interrupted run and its --resume
FREE_ON_RESUME = ("resume", "workers", "device", "cache_dir")
WATCHED_QUESTIONS = 8  # in samples.csv


@contextlib.contextmanager
def only_run_in(output_dir):
    """Hold `output_dir` for this process; ValueError where another run holds it. The lock ends with its process."""
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {folder}: wait for it, or choose another --output-dir") from error
        yield


def save_epoch(model, optimizer, scaler, state, identity, output_dir, earlier_stages):
    """The best checkpoint first, then last.pt: a kill in between repeats the epoch and writes the same again."""
    weights = {name: tensor.cpu() for name, tensor in model.trainable_weights().items()}
    row = state["log"][-1]
    if state["stale"] == 0:
        save_checkpoint(output_dir / "vqa_checkpoint.pt", {
            "format": FORMAT, **identity, "weights": weights, "epoch": row["epoch"], "val_loss": row["val_loss"]})
    save_checkpoint(output_dir / "last.pt", {
        "format": FORMAT, **identity, "weights": weights, "epoch": row["epoch"], "val_loss": row["val_loss"],
        "state": state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
    write_log(state["log"], identity["stage"], output_dir, earlier_stages)
    mark = " *" if state["stale"] == 0 else ""
    print(f"epoch {row['epoch']}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}{mark}, "
          f"val BLEU {row['val_bleu']:.1f}", flush=True)


def write_log(log, stage, output_dir, earlier_stages):
    """train_log.csv and loss_plot.png, drawn anew."""
    with whole_file(output_dir / "train_log.csv") as temporary:
        pd.DataFrame(log).to_csv(temporary, index=False)
    draw_curves([*earlier_stages, (stage, log)], output_dir / "loss_plot.png")


def watched_rows(dataset, seed):
    """The rows of samples.csv: the same few questions after every epoch, so that one can watch the model learn."""
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))
    return order[:WATCHED_QUESTIONS].tolist()


def write_samples(rows, samples, output_dir):
    """samples.csv: one line per watched question, its label, and the answer after each epoch."""
    table = rows[["question_id", "image_path", "question", "answer"]].reset_index(drop=True)
    with whole_file(output_dir / "samples.csv") as temporary:
        pd.concat([table, pd.DataFrame(samples)], axis=1).to_csv(temporary, index=False, quoting=csv.QUOTE_ALL)


def load_last(path, model, optimizer, scaler, state, identity):
    """Put model, optimizer, scaler and state back to the end of the last whole epoch."""
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} not found; start without --resume")
    last = read_checkpoint(path, (*KEYS, "data", "state", "optimizer", "scaler"))
    changed = {**differences(last["settings"], identity["settings"]),
               **differences(last["encoders"], identity["encoders"]), **differences(last["sizes"], identity["sizes"]),
               **differences(last["data"], identity["data"]),
               **differences({"vocabulary": len(last["vocab"])}, {"vocabulary": len(identity["vocab"])})}
    if changed or last["vocab"] != identity["vocab"]:
        text = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items()) or "other training answers"
        raise ValueError(f"{path} is of a run with other settings: {text}. Set them back, or start without --resume")
    load_weights(model, last["weights"], path)
    optimizer.load_state_dict(last["optimizer"])
    if last["scaler"]:  # empty where the interrupted run was not in fp16
        scaler.load_state_dict(last["scaler"])
    state.update(last["state"])
    print(f"resumed after epoch {state['epoch']}" + (": the run had finished" if state["finished"] else ""))


def differences(old, new):
    """{name: (old, new)} of the settings that matter and differ."""
    return {name: (old.get(name), new.get(name)) for name in {**old, **new}
            if name not in FREE_ON_RESUME and old.get(name) != new.get(name)}
