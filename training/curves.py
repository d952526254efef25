"""loss_plot.png: the losses, validation scores and learning rates of every stage. No torch."""
import itertools
import math

from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from common.plotting import ACCENT, HAIRLINE, INK, MUTED, PARTLY, RIGHT, new_figure

LINE_COLOURS = (INK, ACCENT, PARTLY, RIGHT)


def draw_curves(stages, path):
    """Write the curves of every stage side by side, on one scale, with the best epoch marked.

    stages: list of (name, rows). A row is a dict of one line of the training log: epoch, train_loss (nats per token,
    may be None), val_loss and learning_rate_* columns. Other val_* columns (0 to 100) get a panel of their own. The
    best epoch is the first one with the lowest val_loss.
    """
    with_scores = any(_columns(rows, "val_") for _, rows in stages)
    heights = (3.0, 1.5, 1.5) if with_scores else (3.0, 1.5)
    longest = max(len(rows) for _, rows in stages)
    widths = [max(4, longest / 3, len(rows)) for _, rows in stages]  # a short stage stays wide enough for its legend
    height = 1.15 + sum(heights)
    with new_figure(path, 9.2, height) as figure:
        grid = figure.subplots(len(heights), len(stages), sharey="row", squeeze=False,
                               gridspec_kw={"height_ratios": heights, "width_ratios": widths})
        figure.subplots_adjust(left=0.085, right=0.97, top=1 - 0.62 / height, bottom=0.5 / height,
                               wspace=0.06, hspace=0.24)
        for column, (name, rows) in enumerate(stages):
            _draw_stage(grid[:, column], name, rows)
        grid[0, 0].set_ylabel("loss (nats per word)")
        # opaque, so that the line of the best epoch does not cross the words
        grid[0, 0].legend(loc="upper right", edgecolor="none", framealpha=1, labelcolor="linecolor", handlelength=1.4)
        if with_scores:
            grid[1, 0].set_ylabel("validation score")
        grid[-1, 0].set_ylabel("learning rate")
        if not any(row[name] for _, rows in stages for row in rows for name in _columns(rows, "learning_rate_")):
            grid[-1, 0].set_ylim(1e-6, 1e-2)  # before the first step: matplotlib needs a range for an empty log axis
        for axes in grid[:, 1:].flat:
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", which="both", length=0)


def _columns(rows, prefix):
    """The columns of the log that start with `prefix`, the loss excepted."""
    return [name for name in rows[0] if name.startswith(prefix) and name != "val_loss"]


def _points(rows, column):
    """(epochs, values) of one column without empty cells, infinite losses and learning rates of 0 (the axis is log)."""
    lowest = 1e-12 if column.startswith("learning_rate") else -math.inf
    kept = [(row["epoch"], row[column]) for row in rows
            if row[column] is not None and math.isfinite(row[column]) and row[column] > lowest]
    return [epoch for epoch, _ in kept], [value for _, value in kept]


def _draw_stage(column, name, rows):
    """One stage in its column of axes: losses, validation scores if any log has them, learning rates."""
    losses, rates = column[0], column[-1]
    losses.set_title(name, loc="left", weight="bold", size=11, pad=22)
    losses.plot(*_points(rows, "train_loss"), color=MUTED, linewidth=1.2, marker=".", markersize=4, label="training")
    epochs, values = _points(rows, "val_loss")
    losses.plot(epochs, values, color=ACCENT, linewidth=2, marker=".", markersize=5, label="validation")
    if values:
        lowest = min(values)
        best = epochs[values.index(lowest)]
        losses.plot([best], [lowest], marker="o", markersize=8, markerfacecolor="white", markeredgecolor=ACCENT,
                    markeredgewidth=2, zorder=5)
        losses.text(0, 1.03, f"best: epoch {best:g}, loss {lowest:.3f}", transform=losses.transAxes, color=ACCENT, size=8.5)
        for axes in column:
            axes.axvline(best, color=ACCENT, linewidth=0.8, linestyle=(0, (3, 3)), zorder=0)
    if len(column) > 2:
        _draw_lines(column[1], rows, "val_")
    _draw_lines(rates, rows, "learning_rate_")
    for axes in column:
        axes.set_xlim(-0.3, max(1, rows[-1]["epoch"]) + 0.3)
        # drawing ticks takes time, and curves are drawn often
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True) if axes is rates else NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.grid(True, color=HAIRLINE, linewidth=0.6)
    rates.set(yscale="log", xlabel="epoch")
    rates.yaxis.set_major_locator(LogLocator(numticks=5))
    rates.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.0e}".replace("e-0", "e-")))
    rates.yaxis.set_minor_locator(NullLocator())


def _draw_lines(axes, rows, prefix):
    """One line for each column of the log that starts with `prefix`, with a legend above the axes."""
    names = _columns(rows, prefix)
    for colour, name in zip(itertools.cycle(LINE_COLOURS), names):
        label = name.removeprefix(prefix).replace("_", " ")
        axes.plot(*_points(rows, name), color=colour, linewidth=1.4, marker=".", markersize=3, label=label)
    if names:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), frameon=False, labelcolor="linecolor",
                    handlelength=1.2, ncols=4, fontsize=8, borderaxespad=0)
