"""The metrics file, the printed tables and the comparison of two results."""
import pandas as pd

from evaluation.baselines import annotator_ceiling, display_name
from evaluation.bootstrap import MIN_TYPE_ROWS, by_type, paired_difference, summarise, verdict
from evaluation.metrics import HEADLINE, METRICS, SCORE_COLUMNS, score_rows, signature

TYPES = ("answer_type", "question_type")  # columns of the data set
COMPARED = (*SCORE_COLUMNS, "confidence")  # columns of a results CSV
CHANGED_ROWS = 5  # shown at either end of a comparison


def evaluate(rows, floors, predictions=None, limited_labels=None):
    """Score answers for `rows` (list of dicts): ({NAME: (n,)} of the predictions, the content of the metrics file).

    floors: {FLOOR: n texts}. predictions: n texts of the model; without them only floors and one annotator are scored.
    limited_labels: n texts of `baselines.vocabulary_limited_labels`.
    """
    labels, annotations, groups = ([row[name] for row in rows] for name in ("answer", "answers", "image_id"))
    counts = [len(texts) for texts in annotations]
    metrics = {"num_questions": len(rows), "num_images": len(set(groups)), "signature": signature(),
               "humans_per_question": [min(counts), max(counts)]}
    scores, types = None, {}
    floors = {name: score_rows(texts, labels, annotations) for name, texts in floors.items()}
    ceilings = {"human": annotator_ceiling(labels, annotations)}
    if predictions is not None:
        scores = score_rows(predictions, labels, annotations)
        ceilings["vocabulary"] = score_rows(limited_labels, labels, annotations)
        headlines = {name: floor[HEADLINE] for name, floor in floors.items()}
        metrics["verdict"] = verdict(scores[HEADLINE], headlines, groups, ceilings["human"][HEADLINE])
        metrics["scores"] = summarise(scores, groups)
        tables = {kind: by_type(scores, [row[kind] for row in rows], groups) for kind in TYPES}
        types = {f"by_{kind}": table for kind, (table, _) in tables.items()}
        types["hidden_types"] = {kind: hidden for kind, (_, hidden) in tables.items() if hidden}
    for name, tables in (("floors", floors), ("ceilings", ceilings)):
        metrics[name] = {key: summarise(table, groups) for key, table in tables.items()}
    return scores, metrics | types


def table_lines(metrics):
    """{line of the table: {NAME: {"value", "ci95", "n"}}}: the model, each floor, each ceiling."""
    lines = {"the model": metrics["scores"]} if "scores" in metrics else {}
    lines |= {f"floor: {display_name(name)}": table for name, table in metrics["floors"].items()}
    return lines | {f"ceiling: {display_name(name)}": table for name, table in metrics["ceilings"].items()}


def print_table(metrics):
    """Print the lines of `table_lines` with the headline's interval, the headline per type and the verdict."""
    low, high = metrics["humans_per_question"]
    each = f"{low} to {high} annotations" if low != high else f"{low} annotation{'s' * (low != 1)}"
    print(f"\n{metrics['num_questions']} questions on {metrics['num_images']} images, {each} each; every score 0 to 100, "
          f"[95 % interval by image]\nBLEU: {metrics['signature']}\n")
    cells = {line: [*(_cell(table[metric.name]["value"]) for metric in METRICS),
                    f"  [{', '.join(map(_cell, table[HEADLINE]['ci95']))}]"] for line, table in table_lines(metrics).items()}
    heads = [*(metric.head for metric in METRICS), "BLEU interval"]
    print(pd.DataFrame.from_dict(cells, orient="index", columns=heads).to_string(col_space=9))
    if metrics["ceilings"]["human"][HEADLINE]["value"] is None:
        print("one annotator: unknown, since no question has a second annotation")
    if "scores" in metrics:
        for kind in TYPES:
            print_types(kind, metrics[f"by_{kind}"], metrics["hidden_types"].get(kind, {}))
        print(f"\nverdict: {verdict_sentence(metrics)}")


def _cell(value):
    return "-" if value is None else f"{value:.1f}"


def print_types(kind, table, hidden):
    """The headline per answer type or question type."""
    parts = [f"{name} {entry[HEADLINE]['value']:.1f} (n={entry['n']})" for name, entry in table.items()]
    line = f"\nBLEU by {kind.replace('_', ' ')}: {', '.join(parts) or f'no type has {MIN_TYPE_ROWS} rows'}"
    if hidden:
        line += f"; hidden, with fewer than {MIN_TYPE_ROWS} rows: {sum(hidden.values())} rows of {len(hidden)} types"
    print(line)


def verdict_sentence(metrics):
    """The verdict of `metrics` as a sentence of its own, with the displayed name of the floor."""
    return f"The model {metrics['verdict'].replace('wrong_picture', 'wrong_image').replace('_', ' ')}."


def score_bars(metrics):
    """What scores.png and the gallery show of each metric: a list of dicts in the order of METRICS.

    label, value, ci95 (or None), floors (values), floor (the strongest of them, or None), annotator (the score of one
    annotator, or None), ends (texts that name floor and annotator). A metric without a value is left out.
    """
    bars = []
    for metric in METRICS:
        score, annotator = metrics["scores"][metric.name], metrics["ceilings"]["human"][metric.name]["value"]
        floors = {name: table[metric.name]["value"] for name, table in metrics["floors"].items()}
        floors = {name: value for name, value in floors.items() if value is not None}
        best = max(floors, key=floors.get, default=None)
        if score["value"] is not None:
            bars.append({
                "name": metric.name, "label": metric.label, "value": score["value"],
                "ci95": None if None in score["ci95"] else score["ci95"],
                "floors": list(floors.values()), "floor": floors.get(best), "annotator": annotator,
                "ends": [f"{display_name(best)} {floors[best]:.1f}" if floors else "no floor",
                         "no annotator ceiling" if annotator is None else f"{display_name('human')} {annotator:.1f}"]})
    return bars


def print_comparison(path_a, path_b):
    """Print how the scores of B differ from those of A, paired by question, and the rows that changed most."""
    table = join_results(path_a, path_b)
    print(f"\n{len(table)} questions, B - A:  A = {path_a}, B = {path_b}")
    for name in COMPARED:
        a, b = table[f"{name}_a"], table[f"{name}_b"]
        difference, low, high = paired_difference(b, a, table["image_id_a"])
        print(f"  {name:<14} {a.mean():8.2f} -> {b.mean():8.2f}   {difference:+.2f} [{low:+.2f}, {high:+.2f}]")
    table["change"] = table["sentence_bleu_b"] - table["sentence_bleu_a"]
    changed = table[table["prediction_a"] != table["prediction_b"]].sort_values("change", kind="stable")
    better, worse = (changed["change"] > 0).sum(), (changed["change"] < 0).sum()
    print(f"  {len(changed)} answers changed, {better} for the better and {worse} for the worse in sentence BLEU")
    for title, rows in (("most improved", changed[::-1]), ("most worsened", changed)):
        print(f"\n{title}")
        for row in rows[:CHANGED_ROWS].itertuples():
            print(f"  {row.change:+6.1f}  {row.question_a}  label: {row.answer_a}  A: {row.prediction_a}  "
                  f"B: {row.prediction_b}")


def join_results(path_a, path_b):
    """Two results CSVs side by side, joined on question_id; all other columns end in _a or _b.

    Raises ValueError if they answer different questions.
    """
    a, b = (read_results(path) for path in (path_a, path_b))
    if len(a) == 0 or set(a["question_id"]) != set(b["question_id"]):
        raise ValueError(f"--compare: {path_a} ({len(a)} rows) and {path_b} ({len(b)} rows) answer different questions; "
                         "compare two runs of test.py on the same data and split")
    joined = a.merge(b, on="question_id", suffixes=("_a", "_b"), validate="one_to_one")
    if (joined["answer_a"] != joined["answer_b"]).any():
        raise ValueError(f"--compare: {path_a} and {path_b} hold different labels for the same questions")
    return joined


def read_results(path):
    """A results CSV of test.py: scores as numbers, the rest as text. Raises ValueError if `path` is none."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {path} is not a results CSV of test.py: {error}") from error
    missing = {"question_id", "image_id", "question", "answer", "prediction", *COMPARED} - set(table.columns)
    if missing:
        raise ValueError(f"--compare {path} is not a results CSV of test.py: it lacks {', '.join(sorted(missing))}")
    if (table[list(COMPARED)] == "").any(axis=None):
        raise ValueError(f"--compare: {path} holds answers without scores")
    return table.astype(dict.fromkeys(COMPARED, float))
