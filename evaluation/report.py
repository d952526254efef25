"""The metrics file and the printed table of an evaluation."""
import numpy as np
import regex

from common.settings import printable
from evaluation.baselines import display_name, one_annotator, progress
from evaluation.bootstrap import (
    MIN_IMAGES,
    MIN_TYPE_ROWS,
    brier_score,
    by_type,
    expected_calibration_error,
    interval_name,
    summarise,
    verdict,
)
from evaluation.metrics import HEADLINE, METRICS, score_rows, signature
from vocab import UNSPACED, normalise

TYPES = ("answer_type", "question_type")  # columns of the data set


def evaluate(rows, floors, predictions=None, ceilings=None, confidences=None, held_out=(), train_answers=()):
    """Score answers for `rows` (list of dicts): ({NAME: (n,)} of the predictions, the content of the metrics file).

    floors: {FLOOR: n texts}. predictions: n texts of the model; without them only floors and one annotator are scored.
    ceilings: {CEILING: n texts}; one of them may be "oracle". confidences: n numbers, 0 to 1, or None. held_out: entries of
    `preprocess.read_held_out`. train_answers: labels of the training rows.
    """
    labels, annotations, groups = ([row[name] for row in rows] for name in ("answer", "answers", "image_id"))
    counts = [len(texts) for texts in annotations]
    annotator, annotator_groups, optimistic = one_annotator(rows, held_out)
    metrics = {"num_questions": len(rows), "num_images": len(set(groups)), "interval": interval_name(len(set(groups))),
               "signature": signature(), "humans_per_question": [min(counts), max(counts)],
               "one_annotator": "optimistic" if optimistic else "held out"}
    report_unspaced_labels(labels, metrics["signature"])
    scores = None
    floors, ceilings = ({name: score_rows(texts, labels, annotations)
                         for name, texts in progress((answers or {}).items(), f"scoring {kind}")}
                        for kind, answers in (("floors", floors), ("ceilings", ceilings)))
    if predictions is not None:
        scores = score_rows(predictions, labels, annotations)
        headlines = {name: floor[HEADLINE] for name, floor in floors.items()}
        references = [("the oracle", ceilings["oracle"][HEADLINE], None)] if "oracle" in ceilings else []
        references += [("one annotator", annotator[HEADLINE], None if optimistic else annotator_groups)]
        metrics |= {"verdict": verdict(scores[HEADLINE], headlines, groups, references), "scores": summarise(scores, groups)}
    metrics |= {name: {key: summarise(table, groups) for key, table in tables.items()}
                for name, tables in (("floors", floors), ("ceilings", ceilings))}
    metrics["ceilings"]["human"] = summarise(annotator, annotator_groups)
    if predictions is not None:
        metrics |= model_details(rows, scores, predictions, confidences, train_answers)
    return scores, metrics


def report_unspaced_labels(labels, bleu_signature):
    """Print how many labels BLEU takes for one word, because their script has no spaces."""
    unspaced = sum(regex.search(UNSPACED, label) is not None for label in labels)
    if unspaced and "tok:13a" in bleu_signature:
        print(f"{unspaced} of {len(labels)} labels have no spaces between words, and BLEU takes them for one word: choose "
              "--bleu-tokenize zh, ja-mecab or char")


def model_details(rows, scores, predictions, confidences=None, train_answers=()):
    """The rest of the metrics file about the model: novel predictions, seen and unseen labels, calibration, types.

    A text counts as a training label if it equals one after `vocab.normalise`, as in `exact_match`.
    """
    groups, details = [row["image_id"] for row in rows], {}
    known = {normalise(text) for text in train_answers}
    if known:
        novel = np.array([100.0 * (normalise(text) not in known) for text in predictions])
        seen = ["seen" if normalise(row["answer"]) in known else "unseen" for row in rows]
        details["novel_predictions"] = summarise({"novel": novel}, groups)["novel"]
        details["by_training_label"], _ = by_type(scores, seen, groups, min_rows=1)
    if confidences is not None:
        correct = scores["exact_match"] == 100
        error, _ = expected_calibration_error(confidences, correct)
        details["calibration"] = {"expected_calibration_error": round(error, 4),
                                  "brier_score": round(brier_score(confidences, correct), 4)}
    tables = {kind: by_type(scores, [row[kind] for row in rows], groups) for kind in TYPES}
    details |= {f"by_{kind}": table for kind, (table, _) in tables.items()}
    return details | {"hidden_types": {kind: hidden for kind, (_, hidden) in tables.items() if hidden}}


def table_lines(metrics):
    """{line of the table: {NAME: {"value", "ci95", "n"}}}: the model, each floor, one annotator, each ceiling."""
    lines = {"the model": metrics["scores"]} if "scores" in metrics else {}
    lines |= {f"floor: {display_name(name)}": table for name, table in metrics["floors"].items()}
    ceilings = dict(metrics["ceilings"])
    lines[annotator_line(metrics)] = ceilings.pop("human")
    return lines | {f"ceiling: {display_name(name)}": table for name, table in ceilings.items()}


def annotator_line(metrics):
    """What tables call the score of one annotator."""
    return display_name("human") + " (optimistic)" * (metrics.get("one_annotator") == "optimistic")


def print_table(metrics):
    """Print the lines of `table_lines` with the headline's interval, the headline per type and the verdict."""
    import pandas as pd
    low, high = metrics["humans_per_question"]
    each = f"{low} to {high} annotations" if low != high else f"{low} annotation{'s' * (low != 1)}"
    print(f"\n{metrics['num_questions']} questions on {metrics['num_images']} images, {each} each; every score 0 to 100, "
          f"[{metrics['interval']}]\nBLEU: {metrics['signature']}\n")
    cells = {line: [*(_cell(table[metric.name]["value"]) for metric in METRICS),
                    f"  [{', '.join(map(_cell, table[HEADLINE]['ci95']))}]"] for line, table in table_lines(metrics).items()}
    heads = [*(metric.head for metric in METRICS), "BLEU interval"]
    print(pd.DataFrame.from_dict(cells, orient="index", columns=heads).to_string(col_space=9))
    if metrics["ceilings"]["human"][HEADLINE]["value"] is None:
        print("one annotator: unknown, since no question has a second annotation")
    elif metrics["one_annotator"] == "optimistic":
        print("optimistic: the label was chosen with this annotator's vote")
    if "scores" in metrics:
        for kind in TYPES:
            print_types(kind, metrics[f"by_{kind}"], metrics["hidden_types"].get(kind, {}))
        print_details(metrics)
        print(f"\nverdict: {verdict_sentence(metrics)}")
    if metrics["num_images"] < MIN_IMAGES:
        print(f"{metrics['num_images']} images are too few to tell models apart, {MIN_IMAGES} are the least: give more rows "
              "the split test, by the column split or by mini_vqa_v2.py --test-fraction")


def _cell(value):
    return "-" if value is None else f"{value:.1f}"


def print_types(kind, table, hidden):
    """The headline per answer type or question type, if there are several."""
    if len(table) == 1 and not hidden:
        return  # one type alone: the score is in the table above
    parts = [f"{printable(name)} {entry[HEADLINE]['value']:.1f} (n={entry['n']})" for name, entry in table.items()]
    line = f"\nBLEU by {kind.replace('_', ' ')}: {', '.join(parts) or f'no type has {MIN_TYPE_ROWS} rows'}"
    if hidden:
        line += f"; not shown: {len(hidden)} type{'s' * (len(hidden) > 1)} with fewer than {MIN_TYPE_ROWS} rows"
    print(line)


def print_details(metrics):
    """Predictions that are no training label, scores of labels seen and unseen in training, and the calibration."""
    if "novel_predictions" in metrics:
        novel = metrics["novel_predictions"]
        print(f"\npredictions that are no training label: {novel['value']:.1f} % [{', '.join(map(_cell, novel['ci95']))}] "
              f"(n={novel['n']})")
        parts = [f"{kind} {entry[HEADLINE]['value']:.1f}, exact match {entry['exact_match']['value']:.1f} (n={entry['n']})"
                 for kind, entry in metrics["by_training_label"].items()]
        print(f"BLEU by label, seen or unseen in training: {'; '.join(parts)}")
    if "calibration" in metrics:
        error, brier = metrics["calibration"]["expected_calibration_error"], metrics["calibration"]["brier_score"]
        print(f"calibration (0 is best): expected calibration error {error:.3f}, Brier score {brier:.3f} "
              f"(n={metrics['num_questions']})")


def verdict_sentence(metrics):
    """The verdict of `metrics` with the displayed name of the floor, and a warning if tested images were trained on."""
    sentence = f"The model {metrics['verdict'].replace('wrong_picture', 'wrong_image').replace('_', ' ')}."
    trained = metrics.get("trained_images", {"images": 0})
    if trained["images"]:
        sentence += f" Warning: it was trained on {trained['images']} of these {trained['of_images']} images."
    return sentence


def score_bars(metrics):
    """What scores.png and the gallery show of each metric: a list of dicts in the order of METRICS.

    name, head, label, value, ci95 (or None), floors (values), floor (the strongest of them, or None), annotator (the score
    of one annotator, or None), ends (texts that name floor and annotator). A metric without a value is left out.
    """
    bars = []
    for metric in METRICS:
        score, annotator = metrics["scores"][metric.name], metrics["ceilings"]["human"][metric.name]["value"]
        floors = {name: table[metric.name]["value"] for name, table in metrics["floors"].items()}
        floors = {name: value for name, value in floors.items() if value is not None}
        best = max(floors, key=floors.get, default=None)
        if score["value"] is not None:
            bars.append({
                "name": metric.name, "head": metric.head, "label": metric.label, "value": score["value"],
                "ci95": None if None in score["ci95"] else score["ci95"],
                "floors": list(floors.values()), "floor": floors.get(best), "annotator": annotator,
                "ends": [f"{display_name(best)} {floors[best]:.1f}" if floors else "no floor",
                         "one annotator unknown" if annotator is None else f"{annotator_line(metrics)} {annotator:.1f}"]})
    return bars
