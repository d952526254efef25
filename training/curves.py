"""loss_plot.png: the losses, validation scores and learning rates of every stage. No torch."""
import itertools

import numpy as np
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from common.plotting import ACCENT, HAIRLINE, INK, MUTED, PARTLY, RIGHT, new_figure

LINE_COLOURS = (INK, ACCENT, PARTLY, RIGHT)
LOSS_LINES = {"train_loss": {"label": "training", "color": MUTED, "linewidth": 1.2, "markersize": 4},
              "val_loss": {"label": "validation", "color": ACCENT, "linewidth": 2, "markersize": 5}}


def draw_curves(stages, path):
    """Write the curves of every stage side by side, on one scale, with the best epoch marked.

    stages: list of (name, rows). A row is a dict of one line of the training log: epoch, train_loss and val_loss (nats
    per word), other val_* columns (0 to 100) and learning_rate_* columns. The best epoch is the first one with the
    lowest val_loss. The loss axis is scaled to the trained epochs: a higher loss of epoch 0 is written at its edge.
    """
    logs = [pd.DataFrame(rows) for _, rows in stages]
    low, high = _loss_range(logs)
    top = high + 0.25 * (high - low)  # room for the legend and for the losses of epoch 0
    longest = max(len(rows) for _, rows in stages)
    widths = [max(4, longest / 3, len(rows)) for _, rows in stages]  # a short stage stays wide enough for its legend
    with new_figure(path, 9.2, 7.15) as figure:
        grid = figure.subplots(3, len(stages), sharey="row", squeeze=False,
                               gridspec_kw={"height_ratios": (3, 1.5, 1.5), "width_ratios": widths})
        figure.subplots_adjust(left=0.085, right=0.97, top=0.913, bottom=0.07, wspace=0.06, hspace=0.24)
        for column, (name, _) in enumerate(stages):
            _draw_stage(grid[:, column], name, logs[column], top)
        grid[0, 0].set_ylim(low - 0.05 * (high - low), top)
        for axes, label in zip(grid[:, 0], ("loss (nats per word)", "validation score", "learning rate"), strict=True):
            axes.set_ylabel(label)
        # opaque, so that the line of the best epoch does not cross the words
        grid[0, np.argmax(widths)].legend(loc="upper right", edgecolor="none", framealpha=1, labelcolor="linecolor",
                                          handlelength=1.4)
        if len(stages[0][1]) == 1:
            grid[-1, 0].set_ylim(1e-6, 1e-2)  # before the first step: matplotlib needs a range for an empty log axis
        for axes in grid[:, 1:].flat:
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", which="both", length=0)


def _loss_range(logs):
    """(lowest finite loss, highest finite loss of the trained epochs or, without any, of epoch 0), a tenth apart or more."""
    losses = pd.concat(logs).melt("epoch", list(LOSS_LINES))
    losses = losses[np.isfinite(losses["value"])]
    if losses.empty:
        return 0.0, 1.0
    trained = losses[losses["epoch"] >= 1]
    low, high = losses["value"].min(), (losses if trained.empty else trained)["value"].max()
    return low, max(high, 1.1 * low + 0.001)


def _draw_stage(column, name, log, top):
    """One stage (a DataFrame) in its column of axes: losses up to `top`, validation scores, learning rates."""
    losses, scores, rates = column
    losses.set_title(name, loc="left", weight="bold", size=11, pad=22)
    for y, (loss, style) in zip((0.97, 0.91), LOSS_LINES.items(), strict=True):
        first = log[loss].iloc[0]
        losses.plot(log["epoch"], log[loss].where(log[loss] <= top), marker=".", **style)
        if top < first < np.inf:
            losses.text(0, y, f"↑ epoch 0: {first:.2f}", color=style["color"], size=8.5, va="top",
                        transform=losses.get_xaxis_transform(), bbox={"color": "white", "pad": 1})
    finite = log[np.isfinite(log["val_loss"])]
    if len(finite):
        best = finite.loc[finite["val_loss"].idxmin()]
        losses.plot(best["epoch"], best["val_loss"], marker="o", markersize=8, markerfacecolor="white",
                    markeredgecolor=ACCENT, markeredgewidth=2, zorder=5)
        losses.text(0, 1.03, f"best: epoch {best['epoch']:g}, loss {best['val_loss']:.3f}", transform=losses.transAxes,
                    color=ACCENT, size=8.5)
        for axes in column:
            axes.axvline(best["epoch"], color=ACCENT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    _draw_lines(scores, log.drop(columns="val_loss"), "val_")
    _draw_lines(rates, log.replace(0.0, np.nan), "learning_rate_")  # the axis is logarithmic
    for axes in column:
        axes.set_xlim(-0.3, max(1, log["epoch"].iloc[-1]) + 0.3)
        # drawing ticks takes time, and curves are drawn often
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True) if axes is rates else NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.grid(True, color=HAIRLINE, linewidth=0.6)
    rates.set(yscale="log", xlabel="epoch")
    rates.yaxis.set_major_locator(LogLocator(numticks=5))
    rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-")))
    rates.yaxis.set_minor_locator(NullLocator())


def _draw_lines(axes, log, prefix):
    """One line for each column of the log that starts with `prefix`, equal ones drawn once; the legend is above the axes."""
    table = log.filter(regex=f"^{prefix}").astype(float)
    for colour, line in zip(itertools.cycle(LINE_COLOURS), table.T.drop_duplicates().index):
        names = [name.removeprefix(prefix).replace("_", " ") for name in table if table[name].equals(table[line])]
        axes.plot(log["epoch"], table[line], color=colour, linewidth=1.4, marker=".", markersize=3, label=", ".join(names))
    if len(table.columns):
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, labelcolor="linecolor",
                    handlelength=1.2, ncols=4, fontsize=8, borderaxespad=0)
