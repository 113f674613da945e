"""Pictures as inline SVG in the page's own colours, light and dark, and in its own type.

matplotlib draws with marker colours, each of which stands for a CSS variable of the page; no picture brings
a style sheet, a font or a script.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# Marker colour -> the page's variable. Never seen as they are.
INK, MUTED, GRID, PAPER = "#010101", "#010102", "#010103", "#010104"
BLUE, ORANGE, GREEN, PINK, AMBER, SKY = (f"#02020{n}" for n in range(1, 7))
SERIES = (BLUE, ORANGE, GREEN, PINK, AMBER, SKY)
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    PAPER: "--paper",
    BLUE: "--blue",
    ORANGE: "--orange",
    GREEN: "--green",
    PINK: "--pink",
    AMBER: "--amber",
    SKY: "--sky",
}
# Where a line's colour is not enough to tell it from others.
DASHES = ("-", "--", "-.", ":")

WIDTH, WIDE = 4.7, 15.6
_HEIGHT = 3.2

# More rounds, or names, than fit into a column of the page.
MANY_ROUNDS, MANY_SITES = 40, 16

_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "consilium",
    # A site's name may hold a dollar sign.
    "text.parse_math": False,
    "font.size": 11.0,
    "axes.titlesize": 11.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3.0,
    "ytick.major.size": 0.0,
    "text.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 10.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.9,
    "lines.markersize": 4.5,
    "lines.solid_capstyle": "round",
    "path.simplify": True,
    "hatch.linewidth": 0.6,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture of the page. caption: what it shows, in plain words; alt: what it says, in numbers.

    svg: markup that is safe to put into HTML as it is. wide: it needs the page's whole width.
    """

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    wide: bool = False


class Canvas:
    """Axes to draw on, and what becomes of them."""

    def __init__(self, figure: Figure, axes: Axes) -> None:
        self.figure = figure
        self.axes = axes
        self.svg = ""


@contextmanager
def drawing(name: str, *, height: float = _HEIGHT, wide: bool = False) -> Iterator[Canvas]:
    """Give axes in the page's style; afterwards the canvas has its svg. name: unique on the page."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDE if wide else WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        canvas = Canvas(figure, figure.add_subplot())
        yield canvas
        out = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=nothing)
        canvas.svg = themed(out.getvalue(), name=name)


def themed(svg: str, *, name: str) -> str:
    """Return matplotlib's SVG file as an element of a page.

    Without prolog, style sheet, fixed size and font; with variables for colours, and ids of its own.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'\sid="([^"]+)"', rf' id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    for marker, variable in _VARIABLES.items():
        svg = svg.replace(marker, f"var({variable})")
    # Nobody looks at a group by its name; what refers to one is in <defs> and <clipPath>.
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    width, height = re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
    opened = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-labelledby="{name}-alt" '
        'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    )
    return re.sub(r"<svg [^>]*>", f"{opened}>", svg, count=1).rstrip()


def whole_rounds(axes: Axes, *, last: int) -> None:
    """Let the x axis count rounds from 1."""
    axes.set_xlabel("round")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    axes.set_xlim(0.6, max(last, 2) + 0.4)


def in_percent(axes: Axes) -> None:
    """Let the y axis count shares in percent."""
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))


def marker(count: int) -> str:
    """Points are marked while they can be told apart."""
    return "o" if count <= 30 else ""


def rows_height(rows: int) -> float:
    """Inches for so many names below each other."""
    return max(2.2, 1.05 + 0.25 * rows)
