"""Scores with their floors and ceilings: from predictions to vqa_test_metrics.json and the printed tables."""
import pandas as pd

from evaluation.baselines import blind_floors, cross_validated_floors, human_ceiling_rows
from evaluation.bootstrap import by_type, paired_difference, summarise, verdict
from evaluation.metrics import NAMES, score_rows, signature

HEADLINE = NAMES[0]
LABELS = ("BLEU", "multi-ref", "BLEU-1", "BLEU-2", "chrF", "exact", "VQA acc.")  # of NAMES, as column heads
COMPARED = ("sentence_bleu", "exact_match", "vqa_accuracy", "confidence")  # columns of a results CSV
CHANGED_ROWS = 5  # shown at either end of a comparison


def evaluate_predictions(rows, train_rows, predictions, model_floors, spelled):
    """Scores of `predictions` for `rows` (dictionaries), with everything that stands beside them.

    `model_floors`: {FLOOR: predictions} of models that saw less than all; `spelled`: the labels as the
    vocabulary and the length can spell them. Returns ({NAME: (n,) scores per row}, metrics), where
    metrics is vqa_test_metrics.json but for the checkpoint and split.
    """
    answers, human_answers = [row["answer"] for row in rows], [row["answers"] for row in rows]
    groups = [row["image_id"] for row in rows]
    scores = score_rows(predictions, answers, human_answers)
    floors = {name: score_rows(floor, answers, human_answers)
              for name, floor in {**blind_floors(train_rows, rows), **model_floors}.items()}
    ceilings = {"human": human_ceiling_rows(answers, human_answers),
                "vocabulary": score_rows(spelled, answers, human_answers)}
    tables = {name: by_type(scores, [row[name] for row in rows], groups) for name in ("answer_type", "question_type")}
    judged = verdict(scores[HEADLINE], {name: floor[HEADLINE] for name, floor in floors.items()}, groups,
                     ceilings["human"][HEADLINE])
    return scores, {
        **about(rows), "verdict": judged, "scores": summarise(scores, groups),
        "floors": {name: summarise(floor, groups) for name, floor in floors.items()},
        "ceilings": {name: summarise(ceiling, groups) for name, ceiling in ceilings.items()},
        **{f"by_{name}": table for name, (table, _) in tables.items()},
        "hidden_types": {name: hidden for name, (_, hidden) in tables.items() if hidden},
    }


def evaluate_baselines(rows):
    """Metrics as above, but of floors and one human alone: all `rows` in five folds by picture."""
    answers, human_answers = [row["answer"] for row in rows], [row["answers"] for row in rows]
    groups = [row["image_id"] for row in rows]
    floors = {name: score_rows(floor, answers, human_answers) for name, floor in cross_validated_floors(rows).items()}
    return {**about(rows), "floors": {name: summarise(floor, groups) for name, floor in floors.items()},
            "ceilings": {"human": summarise(human_ceiling_rows(answers, human_answers), groups)}}


def about(rows):
    """What the scores are of."""
    counts = [len(row["answers"]) for row in rows]
    return {"num_questions": len(rows), "num_images": len({row["image_id"] for row in rows}), "signature": signature(),
            "humans_per_question": [min(counts), max(counts)]}


def print_table(metrics):
    """The scores with intervals, each floor and each ceiling, then the headline per type, then the verdict."""
    low, high = metrics["humans_per_question"]
    humans = f"{low} to {high} human answers" if low != high else f"{low} human answer{'s' * (low != 1)}"
    print(f"\n{metrics['num_questions']} questions on {metrics['num_images']} pictures, {humans} each; every score 0 to 100, "
          f"[95 % interval by picture]\nBLEU: {metrics['signature']}\n")
    lines = {"the model": metrics["scores"]} if "scores" in metrics else {}
    lines |= {f"floor: {name.replace('_', ' ')}": table for name, table in metrics["floors"].items()}
    lines |= {f"ceiling: {'one human' if name == 'human' else name}": table for name, table in metrics["ceilings"].items()}
    width = max(map(len, lines))
    print(" " * width + "".join(f"{label:>10}" for label in LABELS) + "   BLEU interval")
    for line, table in lines.items():
        low, high = table[HEADLINE]["ci95"]
        cells = "".join(f"{_cell(table[name]['value']):>10}" for name in NAMES)
        print(f"{line:<{width}}{cells}   [{_cell(low)}, {_cell(high)}]")
    if metrics["ceilings"]["human"][HEADLINE]["value"] is None:
        print("one human: unknown, since no question has a second human answer")
    for kind in ("answer_type", "question_type"):
        if f"by_{kind}" in metrics:
            print_types(kind, metrics[f"by_{kind}"], metrics["hidden_types"].get(kind, {}))
    if "verdict" in metrics:
        print(f"\nverdict: the model {metrics['verdict']}")


def print_types(kind, table, hidden):
    """The headline per answer type or question type."""
    parts = [f"{name} {entry[HEADLINE]['value']:.1f} (n={entry['n']})" for name, entry in table.items()]
    rest = f"; hidden, with fewer than 20 rows: {sum(hidden.values())} rows of {len(hidden)} types" if hidden else ""
    print(f"\nBLEU by {kind.replace('_', ' ')}: {', '.join(parts) or 'no type has 20 rows'}{rest}")


def print_comparison(path_a, path_b):
    """Print how B's scores differ from A's, paired by question, with intervals by picture, and the rows that changed most."""
    table = join_results(path_a, path_b)
    print(f"\n{len(table)} questions, B - A:  A = {path_a}, B = {path_b}")
    for name in COMPARED:
        a, b = (table[f"{name}_{side}"].astype(float) for side in "ab")
        difference, low, high = paired_difference(b.to_numpy(), a.to_numpy(), table["image_id_a"].tolist())
        print(f"  {name:<14} {a.mean():8.2f} -> {b.mean():8.2f}   {difference:+.2f} [{low:+.2f}, {high:+.2f}]")
    table["change"] = table["sentence_bleu_b"].astype(float) - table["sentence_bleu_a"].astype(float)
    changed = table[table["prediction_a"] != table["prediction_b"]].sort_values("change", kind="stable")
    better, worse = (changed["change"] > 0).sum(), (changed["change"] < 0).sum()
    print(f"  {len(changed)} answers changed, {better} for the better and {worse} for the worse in sentence BLEU")
    for title, rows in (("most improved", changed[::-1]), ("most worsened", changed)):
        print(f"\n{title}")
        for _, row in rows[:CHANGED_ROWS].iterrows():
            print(f"  {row['change']:+6.1f}  {row['question_a']}  label: {row['answer_a']}  A: {row['prediction_a']}  "
                  f"B: {row['prediction_b']}")


def join_results(path_a, path_b):
    """Two results CSVs side by side (columns with _a and _b). Raises ValueError where they answer different questions."""
    tables = []
    for path in (path_a, path_b):
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"--compare {path}: no such file") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"--compare {path} is not a results CSV of test.py: {error}") from error
        missing = {"question_id", "image_id", "question", "answer", "prediction", *COMPARED} - set(table.columns)
        if missing:
            raise ValueError(f"--compare {path} is not a results CSV of test.py: it lacks {', '.join(sorted(missing))}")
        tables.append(table)
    if len(tables[0]) == 0 or set(tables[0]["question_id"]) != set(tables[1]["question_id"]):
        raise ValueError(f"--compare: {path_a} ({len(tables[0])} rows) and {path_b} ({len(tables[1])} rows) answer different "
                         "questions; compare two runs of test.py on the same data and split")
    if (tables[0][list(COMPARED)] == "").any(axis=None) or (tables[1][list(COMPARED)] == "").any(axis=None):
        raise ValueError(f"--compare: {path_a} or {path_b} holds answers without scores")
    a, b = (table.add_suffix(suffix) for table, suffix in zip(tables, ("_a", "_b"), strict=True))
    joined = a.merge(b, left_on="question_id_a", right_on="question_id_b", validate="one_to_one")
    if (joined["answer_a"] != joined["answer_b"]).any():
        raise ValueError(f"--compare: {path_a} and {path_b} hold different labels for the same questions")
    return joined


def _cell(value):
    return "-" if value is None else f"{value:.1f}"
