"""The table, the JSON and the plot of a run."""
from dataclasses import asdict, dataclass

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from common.files import atomic_write
from evaluation.charts import ACCENT, DPI, HAIRLINE, INK, MUTED, PARTLY, RIGHT, STYLE, WRONG


@dataclass
class Row:
    """One measured number, beside the plain loop's and the ceiling of the same run; None where there is no such thing."""

    name: str
    value: float
    unit: str  # a rate such as samples/s, of which more is better, or s or MB, of which less is better
    plain: float | None = None
    plain_is: str = ""
    ceiling: float | None = None
    ceiling_is: str = ""

    def entry(self):
        """The row as the JSON holds it: with `ratio`, how many times better than the plain loop, and `share` of the
        ceiling (0..1)."""
        return asdict(self) | {"ratio": self.times_better(self.plain), "share": self.times_better(self.ceiling)}

    def times_better(self, other):
        """How many times better `value` is than `other`, above 1 if it is better; None where there is no other."""
        if other is None:
            return None
        return self.value / other if self.unit.endswith("/s") else other / self.value


@dataclass
class Closing:
    """Training over all epochs with everything that is done once, against as many epochs of the plain loop."""

    name: str
    batch_size: int
    ours_s: float
    plain_s: float
    bound: float  # how many times fewer operations it does
    bound_is: str
    expected: float | None = None  # times, at least

    def entry(self):
        return asdict(self) | {"ratio": self.plain_s / self.ours_s}


def print_report(content):
    """The table on stdout. `content`: what throughput.json holds."""
    for part in ("machine", "inputs"):
        print(f"{part}: " + ", ".join(f"{name} {digits(value)}" for name, value in content[part].items()))
    print("ours, plain loop and ceiling were measured in this run; times: how many times better than the plain loop\n")
    width = max(len(row["name"]) for row in content["rows"])
    print(f"{'':{width}} {'ours':>9} {'':11} {'plain loop':>10} {'times':>7} {'ceiling':>9} {'share':>6}")
    for row in content["rows"]:
        notes = "; ".join(f"{what}: {row[f'{what}_is']}" for what in ("plain", "ceiling") if row[f"{what}_is"])
        print(f"{row['name']:{width}} {digits(row['value']):>9} {row['unit']:11} {digits(row['plain']):>10} "
              f"{digits(row['ratio']):>7} {digits(row['ceiling']):>9} {digits(row['share'], '.2f'):>6}  {notes}".rstrip())
    print()
    print("what is done once, as timed, and all epochs at the measured rate:")
    for item in content["closing"]:
        expected = f"at least {item['expected']:g} expected; " if item["expected"] else ""
        print(f"{item['name']}, batch {item['batch_size']}: {item['ratio']:.2f} times ({item['ours_s']:.4g} s against "
              f"{item['plain_s']:.4g} s); {expected}bound {item['bound']:.2f} ({item['bound_is']})")
    for name, losses in content["losses"].items():
        print(f"{name}, loss of the same rows: from the cache {losses['cached']:.7f}, plain loop {losses['plain']:.7f}")


def digits(number, form=None):
    """A number as the table shows it: a float with four digits or more, empty for None."""
    if number is None:
        return ""
    if not isinstance(number, float):
        return str(number)
    return format(number, form or (",.0f" if number >= 1000 else ".4g"))


def draw_growth(growth, epochs, path):
    """Write the plot of seconds against the number of questions, on two logarithmic axes.

    growth: dicts with questions, total_s, plain_s and the seconds of each part, for ever larger data sets.
    """
    lines = {"plain loop, from its rate": (MUTED, ["plain_s"]), "ours, all of it": (ACCENT, ["total_s"]),
             "decode once": (INK, ["decode_s"]), "encode once": (PARTLY, ["encode_s"]),
             "train": (RIGHT, ["stage_1_s", "stage_2_s"]), "answer": (WRONG, ["answer_s"])}
    questions = [point["questions"] for point in growth]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 5), dpi=DPI)
        axes = figure.add_axes((0.09, 0.11, 0.66, 0.74))
        for name, (colour, keys) in lines.items():
            axes.plot(questions, [sum(point[key] for key in keys) for point in growth], color=colour, marker="o", label=name,
                      markersize=4, linewidth=2 if colour in (MUTED, ACCENT) else 1)
        axes.set(xscale="log", yscale="log", xlabel="questions", ylabel="seconds")
        axes.set_xticks(questions, [f"{number:,}" for number in questions])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(True, color=HAIRLINE, linewidth=0.6)
        axes.legend(frameon=False, fontsize=8, labelcolor="linecolor", loc="upper left", bbox_to_anchor=(1.01, 1))
        figure.text(0.02, 0.95, "Time against the number of questions", size=13, weight="bold", va="center")
        figure.text(0.02, 0.895, f"decode, encode, {epochs} + {epochs} epochs, answers; every point from an empty cache",
                    color=MUTED, va="center")
        FigureCanvasAgg(figure)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, metadata={"Software": None})
