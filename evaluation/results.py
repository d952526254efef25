"""What an evaluation writes beside the metrics file: results CSV, server's JSON, gallery page, single images and charts."""
import csv
import hashlib
import json
import re
from pathlib import Path

import torch
from tqdm import tqdm

from common.files import atomic_write
from evaluation.bootstrap import expected_calibration_error
from evaluation.charts import draw_calibration, draw_scores
from evaluation.drawing import draw_explanation, draw_overview, draw_prediction, drawn_texts
from evaluation.fonts import report_missing_characters
from evaluation.gallery import write_gallery
from evaluation.metrics import SCORE_COLUMNS
from evaluation.relevance import explain
from preprocess import csv_file, read_csv

COLUMNS = ("question_id", "image_id", "image_path", "question", "answer", "prediction", *SCORE_COLUMNS, "confidence",
           "question_type", "answer_type")
INTEGER = re.compile(r"0|-?[1-9]\d{0,17}", re.ASCII)  # below 2 ** 63, and one spelling for each
EXPLANATION = "_why"  # ends the name of the PNG with the explanation of an answer
CHARTS = ("overview", "scores", "calibration")  # PNGs beside the single images, which are named after their question_id


def result_rows(rows, answers, folder, scores=None):
    """The finished rows that CSV, gallery and charts read: a list of dicts, one per question.

    rows: list of dicts of the data set, whose image_path is relative to `folder`. answers: list of
    `generation.Answer`. scores: {NAME: (n,)}, or None without labels. Added to each row: prediction, confidence, gate,
    image_file (Path), and sentence_bleu, exact_match and vqa_accuracy (0 to 100, or None).
    """
    return [{**row, "prediction": answer.text, "confidence": answer.confidence, "gate": answer.gate,
             "image_file": Path(folder) / row["image_path"],
             **{column: None if scores is None else float(scores[name][number]) for column, name in SCORE_COLUMNS.items()}}
            for number, (row, answer) in enumerate(zip(rows, answers, strict=True))]


def write_csv(rows, path):
    """The results CSV. Every text is quoted: many readers take a carriage return without quotes as the end of a row."""
    import pandas as pd
    with atomic_write(path) as temporary:
        pd.DataFrame(rows, columns=COLUMNS).round(4).to_csv(temporary, index=False, quoting=csv.QUOTE_NONNUMERIC)


def read_question_ids(cfg):
    """All question ids (list of int) for --results-json, also of rows that cannot be answered; None without the flag.

    Raises ValueError if one is no integer: the evaluation server takes no other ids.
    """
    if cfg.results_json is None:
        return None
    csv_path, use_split = csv_file(cfg.data_dir), cfg.test_csv is None and cfg.data_csv is None
    rows = read_csv(csv_path, need_answers=False, use_split=use_split)  # without use_split all are in the split test
    if "question_id" not in rows:
        raise ValueError(f"--results-json needs the evaluation server's question ids: {csv_path} has no column question_id")
    ids = rows.loc[rows["split"] == cfg.split, "question_id"]
    if wrong := [text for text in ids if not INTEGER.fullmatch(text)]:
        raise ValueError(f"--results-json needs integers of at most 18 digits as question ids: {csv_path} has {wrong[0]!r:.60}")
    return [int(text) for text in ids]


def write_results_json(question_ids, rows, training_answers, cfg):
    """--results-json: a list of {"question_id": int, "answer": str}, a line for each of `read_question_ids`.

    A question without a row, since its image is unreadable, gets the empty answer; such questions are counted.
    training_answers: the labels that the model was trained on. A note says if all of them are longer than usual answers.
    """
    if question_ids is None:
        return
    predictions = {int(row["question_id"]): row["prediction"] for row in rows}
    lines = [json.dumps({"question_id": number, "answer": predictions.get(number, "")}) for number in question_ids]
    with atomic_write(cfg.results_json) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    print(f"for the evaluation server: {len(lines)} answers in {cfg.results_json}, {len(lines) - len(predictions)} of them "
          "empty, since the image is unreadable or the row is left out")
    fewest = min(len(answer.split()) for answer in training_answers)
    if fewest > 1:  # the shares of docs/data.md
        print(f"note: every label in training had {fewest} or more words. Such a model cannot score well there, since 94 % of "
              "VQA v2's majority answers have one word and 2 % three or more: build the data set with `mini_vqa_v2.py "
              "--min-answer-words 1 --min-agreement 1` and train again")


def write_results(rows, metrics, cfg, answerer):
    """The results CSV, gallery page, a random sample as single images and as overview; the charts if there are `metrics`.

    answerer: the `generation.Answerer` that explains the answers of the sample. Their rows get the key `explanation`: the name
    of a PNG in the results folder.
    """
    write_csv(rows, cfg.results_csv)
    folder = Path(cfg.results_dir)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(cfg.seed))[:cfg.num_pictures]
    sample = {file_name(rows[number]["question_id"]): rows[number] for number in order.tolist()}
    charts = [name for name in CHARTS if (sample if name == "overview" else metrics is not None)]
    remove_earlier_images(folder, [*(f"{name}{kind}.png" for name in sample for kind in ("", EXPLANATION)),
                                   *(f"{name}.png" for name in charts)])
    report_missing_characters(drawn_texts(sample.values()))
    for name, row in tqdm(sample.items(), "explaining sample images", unit=" images", delay=1):
        draw_prediction(row, folder / f"{name}.png")
        row["explanation"] = f"{name}{EXPLANATION}.png"
        write_explanation(answerer, row["image_file"], row["question"], cfg.beam_size, folder / row["explanation"])
    if sample:
        draw_overview(list(sample.values()), folder / "overview.png")
    if metrics is not None:
        draw_scores(metrics, folder / "scores.png")
        correct = [row["exact_match"] == 100 for row in rows]
        error, table = expected_calibration_error([row["confidence"] for row in rows], correct)
        draw_calibration(table, error, metrics["calibration"]["brier_score"], folder / "calibration.png")
    write_gallery(rows, metrics, folder)


def write_explanation(answerer, image, question, beam_size, path):
    """Answer a question and write a PNG of what the answer depends on. Returns the Answer."""
    explanation = explain(answerer, image, question, beam_size)
    with atomic_write(path) as temporary:
        draw_explanation(explanation).save(temporary)
    return explanation.answer


def remove_earlier_images(folder, names):
    """Remove the images that an earlier evaluation listed in samples.txt; write `names` there."""
    listed = folder / "samples.txt"
    earlier = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    for name in {Path(line).name for line in earlier if line.endswith(".png")} - set(names):
        (folder / name).unlink(missing_ok=True)
    with atomic_write(listed) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")


def file_name(text):
    """`text` as a file name of at most 100 bytes: any character but letters, digits, points and dashes becomes "_".

    A changed name ends in a hash of the text, so that two texts never share a name. So do names of charts and explanations.
    """
    name = re.sub(r"[^\w.-]", "_", text).encode("utf-8", "replace")[:100].decode("utf-8", "ignore")
    taken = name.lower() in CHARTS or name.lower().endswith(EXPLANATION)
    return name if name == text and not taken else f"{name}-{short_hash(text)}"


def answer_name(image, question, kind):
    """The file name of a drawn answer. Images of one name in two folders, or two questions about one image, do not share it."""
    return f"{file_name(Path(image).stem)}_{kind}_{short_hash(f'{Path(image).absolute()} {question}')}.png"


def short_hash(text):
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
