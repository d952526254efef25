"""The look of all charts and drawn images: colours, matplotlib settings and how a figure is saved."""
import contextlib

import matplotlib

from common.files import atomic_write

INK, MUTED, HAIRLINE, BAND = "#1c1e21", "#656a72", "#dcdfe4", "#e6e9ef"
ACCENT, RIGHT, PARTLY, WRONG = "#2f5bd0", "#0f7a5a", "#9a5b00", "#b42318"
DPI = 120
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.labelcolor": MUTED,
    "axes.edgecolor": HAIRLINE, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "xtick.color": MUTED, "ytick.color": MUTED, "text.parse_math": False,
}


@contextlib.contextmanager
def new_figure(path, width, height):
    """Yield a figure of `width` x `height` inches in our style; the PNG is written to `path` when the block ends.

    The figure does not use pyplot, so it needs no display and changes no global setting.
    """
    from matplotlib.figure import Figure  # here: one question about one image needs no figure, but the colours above
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI)
        yield figure
        with atomic_write(path) as temporary:
            figure.savefig(temporary)
