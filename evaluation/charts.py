"""The figures: loss curves of both stages, scores between floor and ceiling, calibration.

Reads nothing; each function writes one PNG, whole or not at all, and the same input gives the same
bytes. Drawn with matplotlib's Agg renderer on figures of their own, without pyplot, so that no display
and no global state is needed. No torch.
"""
import itertools
import math
import textwrap

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from common.files import atomic_write

INK, MUTED, HAIRLINE, BAND = "#1c1e21", "#656a72", "#dcdfe4", "#e6e9ef"
ACCENT, RIGHT, PARTLY, WRONG = "#2f5bd0", "#0f7a5a", "#9a5b00", "#b42318"
GROUP_COLOURS = (INK, ACCENT, PARTLY, RIGHT)
DPI = 120
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED,
    "axes.edgecolor": HAIRLINE, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": False,
    "axes.axisbelow": True, "xtick.color": MUTED, "ytick.color": MUTED, "xtick.direction": "out",
    "ytick.direction": "out", "figure.facecolor": "white", "axes.facecolor": "white",
    "figure.autolayout": False, "figure.constrained_layout.use": False, "text.usetex": False,
    "text.parse_math": False, "savefig.bbox": "standard", "path.simplify": True,
}
SCORE_LABELS = {
    "mean_sentence_bleu": "Mean sentence BLEU", "multi_reference_bleu": "Multi-reference BLEU",
    "bleu_1": "BLEU-1", "bleu_2": "BLEU-2", "chrf": "chrF", "exact_match": "Exact match",
    "vqa_accuracy": "VQA accuracy",
}


def score_bars(metrics):
    """What is shown of each score in `metrics` (vqa_test_metrics.json): a list of dicts, in the file's order.

    name, label, value and ci95 (0 to 100; ci95 None without an interval), floors (list of (label, value)),
    floor (the strongest of them, or None), human and vocabulary (the ceilings, or None). A score without
    a value is left out: it could not be measured on these rows.
    """
    rows = []
    for name, entry in metrics["scores"].items():
        if _value(metrics["scores"], name) is None:
            continue
        floors = [(floor.replace("_", " "), _value(table, name)) for floor, table in metrics.get("floors", {}).items()]
        floors = [(floor, value) for floor, value in floors if value is not None]
        ceilings = metrics.get("ceilings", {})
        rows.append({
            "name": name, "label": SCORE_LABELS.get(name, name.replace("_", " ")), "value": entry["value"],
            "ci95": None if None in (entry.get("ci95") or [None]) else entry["ci95"],
            "floors": floors, "floor": max(floors, key=lambda f: f[1], default=None),
            "human": _value(ceilings.get("human"), name), "vocabulary": _value(ceilings.get("vocabulary"), name),
        })
    return rows


def _value(table, name):
    """The value of score `name` in one table of the metrics file, None where table, score or value is missing."""
    entry = (table or {}).get(name)
    return None if entry is None else entry["value"]


def verdict_sentence(metrics):
    """The verdict of `metrics` as a sentence of its own ("" without one): it is stored as what "the model" does."""
    verdict = (metrics.get("verdict") or "").replace("_", " ").rstrip(".")
    return f"The model {verdict}." if verdict[:1].islower() else f"{verdict}." if verdict else ""


def draw_scores(metrics, path):
    """Write the picture of every score (0 to 100) between its strongest floor and one human, with its 95 % interval."""
    rows = score_bars(metrics)
    verdict = textwrap.wrap(verdict_sentence(metrics), 100)
    head, foot, step = 0.62 + 0.2 * len(verdict), 0.72, 0.56
    height = head + foot + step * max(1, len(rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, height), dpi=DPI)
        axes = figure.add_axes((0.34, foot / height, 0.49, 1 - (head + foot) / height))
        for y, row in enumerate(rows):
            _draw_score(axes, y, row)
        axes.set(xlim=(0, 100), ylim=(max(1, len(rows)) - 0.5, -0.5), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.xaxis.grid(True, color=HAIRLINE, linewidth=0.6)
        axes.tick_params(axis="x", length=0)
        figure.text(0.025, 1 - 0.3 / height, "Scores between floor and ceiling", size=13, weight="bold", va="center")
        counts = f"{metrics['num_questions']:,} questions on {metrics['num_images']:,} pictures"
        figure.text(0.975, 1 - 0.3 / height, counts, color=MUTED, va="center", ha="right")
        figure.text(0.025, 1 - 0.5 / height, "\n".join(verdict), va="top", linespacing=1.4)
        legend = "light band: strongest floor to one human    bar: gained over the floor    line: 95 % interval"
        figure.text(0.34, 0.22 / height, legend, color=MUTED, size=8)
        _save(figure, path)


def _draw_score(axes, y, row):
    """One score on row `y`: names at the left, the bar from floor to score, the numbers at the right."""
    value, human = row["value"], row["human"]
    low = row["floor"][1] if row["floor"] else 0.0
    if human is not None:
        axes.barh(y, human - low, left=low, height=0.46, color=BAND)
        axes.plot([human, human], [y - 0.3, y + 0.3], color=INK, linewidth=1.2)
    axes.barh(y, value - low, left=low, height=0.2, color=ACCENT if value >= low else WRONG)
    if row["floor"]:
        axes.plot([low, low], [y - 0.3, y + 0.3], color=MUTED, linewidth=1.2)
    number = f"{value:.1f}"
    if row["ci95"]:
        axes.plot(row["ci95"], [y, y], color=INK, linewidth=1.2, marker="|", markersize=7, zorder=4)
        number += f"  [{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}]"
    axes.plot([value], [y], marker="o", markersize=4.5, color=INK, zorder=5)
    ends = [f"{row['floor'][0]} {low:.1f}"] if row["floor"] else ["no floor"]
    ends.append("no human ceiling" if human is None else f"one human {human:.1f}")
    at = axes.get_yaxis_transform()
    axes.text(-0.645, y - 0.17, row["label"], transform=at, va="center", weight="bold", size=9.5)
    axes.text(-0.645, y + 0.2, "  ·  ".join(ends), transform=at, va="center", color=MUTED, size=7.5)
    axes.text(1.03, y, number, transform=at, va="center", size=9)


def draw_calibration(table, ece, path):
    """Write confidence against correctness, with the number of answers in each bin below.

    table: dicts with low, high, confidence, accuracy (fractions 0 to 1; the last two None where n is 0)
    and n; ece: expected calibration error, a fraction.
    """
    filled = [row for row in table if row["n"]]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 6.4), dpi=DPI)
        upper = figure.add_axes((0.13, 0.29, 0.82, 0.54))
        lower = figure.add_axes((0.13, 0.1, 0.82, 0.14))
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for row in filled:
            width = row["high"] - row["low"]
            upper.bar(row["low"], row["accuracy"], width * 0.92, align="edge", color=BAND)
            gap = [row["confidence"]] * 2, [row["accuracy"], row["confidence"]]
            upper.plot(*gap, color=WRONG if row["confidence"] > row["accuracy"] else RIGHT, linewidth=1.6)
            lower.bar(row["low"], row["n"], width * 0.92, align="edge", color=HAIRLINE)
        upper.plot([row["confidence"] for row in filled], [row["accuracy"] for row in filled], color=ACCENT,
                   marker="o", markersize=6, markeredgecolor="white", linewidth=1.6)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="share that is right")
        lower.set(xlim=(0, 1), xlabel="confidence of the answer", ylabel="answers")
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        num_answers = sum(row["n"] for row in table)
        figure.text(0.03, 0.955, "Does confidence mean anything?", size=13, weight="bold", va="center")
        figure.text(0.03, 0.915, f"expected calibration error {ece:.3f} over {num_answers:,} answers", va="center")
        legend = "dashed: exactly as sure as right    below it, red: too sure    above it, green: too modest"
        figure.text(0.03, 0.88, legend, color=MUTED, size=8, va="center")
        _save(figure, path)


def draw_curves(stages, path):
    """Write the loss of every stage on one scale, the chosen epoch marked, learning rates below on a log axis.

    stages: list of (name, rows); rows are dicts of one training log with epoch, train_loss (nats per
    token, None at epoch 0), val_loss and learning_rate_* columns. Other val_* columns (0 to 100), where
    a log has them, get a panel of their own. The chosen epoch is the first with the lowest val_loss.
    """
    with_scores = any(_score_columns(rows) for _, rows in stages)
    heights = (3.0, 1.5, 1.5) if with_scores else (3.0, 1.5)
    longest = max(len(rows) for _, rows in stages)
    widths = [max(4, longest / 3, len(rows)) for _, rows in stages]  # so that the names of three groups of weights fit
    height = 1.15 + sum(heights)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.2, height), dpi=DPI)
        grid = figure.subplots(len(heights), len(stages), sharey="row", squeeze=False,
                               gridspec_kw={"height_ratios": heights, "width_ratios": widths})
        figure.subplots_adjust(left=0.085, right=0.97, top=1 - 0.62 / height, bottom=0.5 / height,
                               wspace=0.06, hspace=0.24)
        for column, (name, rows) in enumerate(stages):
            _draw_stage(grid[:, column], name, rows)
        grid[0, 0].set_ylabel("loss (nats per word)")
        # opaque, so that the line of the chosen epoch does not run through the words
        grid[0, 0].legend(loc="upper right", edgecolor="none", framealpha=1, labelcolor="linecolor", handlelength=1.4)
        if with_scores:
            grid[1, 0].set_ylabel("validation score")
        grid[-1, 0].set_ylabel("learning rate")
        if not any(row[name] for _, rows in stages for row in rows for name in _rate_columns(rows)):
            grid[-1, 0].set_ylim(1e-6, 1e-2)  # before the first step: a log axis without any value is an error
        for axes in grid[:, 1:].flat:
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", which="both", length=0)
        _save(figure, path)


def _score_columns(rows):
    """The log's columns of validation scores, in the log's order."""
    return [name for name in rows[0] if name.startswith("val_") and name != "val_loss"] if rows else []


def _rate_columns(rows):
    """The log's columns of learning rates, one per parameter group."""
    return [name for name in rows[0] if name.startswith("learning_rate")] if rows else []


def _points(rows, column):
    """The finite values of one column: (epochs, values). An empty cell or a diverged loss leaves a gap."""
    kept = [(row["epoch"], row[column]) for row in rows if row.get(column) is not None and math.isfinite(row[column])]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _draw_stage(column, name, rows):
    """One stage in its column of axes: losses, scores if any log has them, learning rates."""
    losses, rates = column[0], column[-1]
    losses.set_title(name, loc="left", weight="bold", size=11, pad=22)
    losses.plot(*_points(rows, "train_loss"), color=MUTED, linewidth=1.2, marker=".", markersize=4, label="training")
    epochs, values = _points(rows, "val_loss")
    losses.plot(epochs, values, color=ACCENT, linewidth=2, marker=".", markersize=5, label="validation")
    if values:
        best = epochs[values.index(min(values))]
        losses.plot([best], [min(values)], marker="o", markersize=8, markerfacecolor="white", markeredgecolor=ACCENT,
                    markeredgewidth=2, zorder=5)
        losses.text(0, 1.03, f"chosen: epoch {best:g}, loss {min(values):.3f}", transform=losses.transAxes,
                    color=ACCENT, size=8.5)
        for axes in column:
            axes.axvline(best, color=ACCENT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    if len(column) > 2:
        _draw_columns(column[1], rows, _score_columns(rows), "val_")
    # a rate of 0, before the first step or after the last, has no place on a log axis
    positive = [{name: value or None for name, value in row.items()} | {"epoch": row["epoch"]} for row in rows]
    _draw_columns(rates, positive, _rate_columns(rows), "learning_rate_")
    last = max(row["epoch"] for row in rows)
    for axes in column:
        axes.set_xlim(-0.3, max(1, last) + 0.3)
        # each tick costs drawing time, and this is drawn after every epoch
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True) if axes is rates else NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.grid(True, color=HAIRLINE, linewidth=0.6)
    rates.set(yscale="log", xlabel="epoch")
    rates.yaxis.set_major_locator(LogLocator(numticks=5))
    rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-")))
    rates.yaxis.set_minor_locator(NullLocator())


def _draw_columns(axes, rows, names, prefix):
    """One line for each named column of the log, named at its upper edge without `prefix`."""
    for colour, name in zip(itertools.cycle(GROUP_COLOURS), names):
        label = name.removeprefix(prefix).replace("_", " ")
        axes.plot(*_points(rows, name), color=colour, linewidth=1.4, marker=".", markersize=3, label=label)
    if names:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, labelcolor="linecolor",
                    handlelength=1.2, ncols=4, fontsize=8, borderaxespad=0)


def _save(figure, path):
    # the version of matplotlib, which is in the metadata by default, would change the bytes for nothing
    FigureCanvasAgg(figure)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, metadata={"Software": None})
