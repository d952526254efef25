"""What an evaluation leaves: the results CSV, the gallery page, single pictures and charts.

Drawing libraries are imported where they are used: a run that draws nothing does not wait for them.
"""
import csv
import hashlib
import re
from pathlib import Path

import pandas as pd
import torch

from common.files import atomic_write

COLUMNS = ("question_id", "image_id", "image_path", "question", "answer", "prediction", "sentence_bleu", "exact_match",
           "vqa_accuracy", "confidence", "question_type", "answer_type")


def complete_rows(rows, predictions, confidences, gates, folder):
    """Add to each row what the model said and where its picture lies."""
    for row, prediction, confidence, gate in zip(rows, predictions, confidences, gates, strict=True):
        row.update(prediction=prediction, confidence=confidence, gate=gate, picture_file=folder / row["image_path"],
                   sentence_bleu=None, exact_match=None, vqa_accuracy=None)


def write_results(rows, path):
    """The results CSV; every text is quoted, since a lone carriage return would else end the row for many readers."""
    with atomic_write(path) as temporary:
        pd.DataFrame(rows, columns=COLUMNS).round(4).to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)


def draw_results(rows, metrics, cfg):
    """The gallery page, a seeded sample as single pictures and as a contact sheet, scores and calibration as charts."""
    from evaluation.bootstrap import expected_calibration_error
    from evaluation.charts import draw_calibration, draw_scores
    from evaluation.gallery import draw_overview, draw_prediction, write_gallery
    folder = Path(cfg.results_dir)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed))[:cfg.num_pictures]
    sample = [rows[number] for number in order.tolist()]
    names = [f"{file_name(row['question_id'])}.png" for row in sample]
    remove_earlier_samples(folder, names)
    for row, name in zip(sample, names, strict=True):
        draw_prediction(row, folder / name)
    if sample:
        draw_overview(sample, folder / "overview.png")
    if metrics is not None:
        draw_scores(metrics, folder / "scores.png")
        error, table = expected_calibration_error([row["confidence"] for row in rows],
                                                  [row["exact_match"] / 100 for row in rows])
        draw_calibration(table, error, folder / "calibration.png")
    write_gallery(rows, metrics, folder)


def remove_earlier_samples(folder, names):
    """Remove the single pictures that an earlier evaluation listed in samples.txt; list `names` there."""
    listed = folder / "samples.txt"
    earlier = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    for name in {Path(line).name for line in earlier if line.endswith(".png")} - set(names):
        (folder / name).unlink(missing_ok=True)
    with atomic_write(listed) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def file_name(text):
    """A text as a file name: what is not a letter, digit, point or dash becomes an underscore, 100 bytes at most.

    A name that had to be changed ends in a hash of the text, so that two texts never share one.
    """
    name = re.sub(r"[^\w.-]", "_", text).encode("utf-8", "replace")[:100].decode("utf-8", "ignore")
    return name if name == text else f"{name}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:8]}"
