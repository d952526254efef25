"""Two charts of an evaluation: scores.png, every score between the floors and one annotator, and calibration.png. No torch."""
import textwrap

import numpy as np

from common.plotting import ACCENT, BAND, HAIRLINE, INK, MUTED, RIGHT, WRONG, new_figure
from evaluation.report import score_bars, verdict_sentence

ENDS_LINE = 55  # letters that fit on one line left of the bars


def draw_scores(metrics, path):
    """Write every score (0 to 100) with its 95 % interval, between its strongest floor and one annotator."""
    bars = score_bars(metrics)
    verdict = textwrap.wrap(verdict_sentence(metrics), 100)
    head, foot, step = 0.62 + 0.2 * len(verdict), 0.72, 0.56  # inches
    height = head + foot + step * max(1, len(bars))
    with new_figure(path, 9.2, height) as figure:
        axes = figure.add_axes((0.37, foot / height, 0.46, 1 - (head + foot) / height))
        for y, bar in enumerate(bars):
            _draw_score(axes, y, bar)
        axes.set(xlim=(0, 100), ylim=(max(1, len(bars)) - 0.5, -0.5), yticks=[])
        axes.spines["left"].set_visible(False)
        axes.xaxis.grid(True, color=HAIRLINE, linewidth=0.6)
        axes.tick_params(axis="x", length=0)
        figure.text(0.025, 1 - 0.3 / height, "Scores between the floors and one annotator", size=13, weight="bold", va="center")
        counts = f"{metrics['num_questions']:,} questions on {metrics['num_images']:,} images"
        figure.text(0.975, 1 - 0.3 / height, counts, color=MUTED, va="center", ha="right")
        figure.text(0.025, 1 - 0.5 / height, "\n".join(verdict), va="top", linespacing=1.4)
        legend = f"light band: strongest floor to one annotator    bar: gained over the floor    line: {metrics['interval']}"
        figure.text(0.025, 0.22 / height, legend, color=MUTED, size=8)


def _draw_score(axes, y, bar):
    """One score on row `y`: names at the left, the bar from floor to score, the numbers at the right."""
    value, annotator, low = bar["value"], bar["annotator"], bar["floor"] or 0.0
    if annotator is not None:
        axes.barh(y, annotator - low, left=low, height=0.46, color=BAND)
        axes.plot([annotator, annotator], [y - 0.3, y + 0.3], color=INK, linewidth=1.2)
    axes.barh(y, value - low, left=low, height=0.2, color=ACCENT if value >= low else WRONG)
    if bar["floor"] is not None:
        axes.plot([low, low], [y - 0.3, y + 0.3], color=MUTED, linewidth=1.2)
    number = f"{value:.1f}"
    if bar["ci95"]:
        axes.plot(bar["ci95"], [y, y], color=INK, linewidth=1.2, marker="|", markersize=7, zorder=4)
        number += f"  [{bar['ci95'][0]:.1f}, {bar['ci95'][1]:.1f}]"
    axes.plot([value], [y], marker="o", markersize=4.5, color=INK, zorder=5)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center"}
    axes.text(-0.75, y - 0.2, bar["label"], weight="bold", size=9.5, **beside)
    separator = " · " if sum(map(len, bar["ends"])) <= ENDS_LINE else "\n"
    axes.text(-0.75, y + 0.05, separator.join(bar["ends"]), color=MUTED, size=7.5, **beside | {"va": "top"})
    axes.text(1.03, y, number, size=9, **beside)


def draw_calibration(table, error, brier, path):
    """Write confidence against accuracy and the answers per bin.

    table, error: as from `expected_calibration_error`. brier: the Brier score, 0 to 1.
    """
    from matplotlib.ticker import MaxNLocator
    with new_figure(path, 6, 6.4) as figure:
        upper = figure.add_axes((0.13, 0.29, 0.82, 0.54))
        lower = figure.add_axes((0.13, 0.1, 0.82, 0.14))
        upper.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        low, width = table["low"], 0.92 * (table["high"] - table["low"])
        accuracy, confidence = table["accuracy"], table["confidence"]
        upper.bar(low, accuracy, width, align="edge", color=BAND)
        lower.bar(low, table["n"], width, align="edge", color=HAIRLINE)
        upper.vlines(confidence, accuracy, confidence, colors=np.where(confidence > accuracy, WRONG, RIGHT), linewidth=1.6)
        upper.plot(confidence, accuracy, color=ACCENT, marker="o", markersize=6, markeredgecolor="white", linewidth=1.6)
        upper.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
        lower.set(xlim=(0, 1), xlabel="probability of the whole answer", ylabel="answers")
        lower.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        figure.text(0.03, 0.955, "Calibration", size=13, weight="bold", va="center")
        summary = f"expected calibration error {error:.3f}, Brier score {brier:.3f} over {table['n'].sum():,} answers"
        figure.text(0.03, 0.915, summary, va="center")
        legend = "dashed: perfectly calibrated    below it, red: over-confident    above it, green: under-confident"
        figure.text(0.03, 0.88, legend, color=MUTED, size=8, va="center")
