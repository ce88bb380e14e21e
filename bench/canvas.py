"""What the figures have in common: colours, panels, legend, and the SVG itself.

Text and axes are drawn in `currentColor`, so that a figure takes the colour of the text around it.
Colours are Okabe and Ito's, which the common forms of colour blindness keep apart (the blue a
little lighter, for the dark page); markers or hatches say the same thing again.
"""

import io
import math
import re
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, TypeVar

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

PALETTE = ("#1F7FBF", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
LINES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
T = TypeVar("T")

INK = "#010203"  # stands for currentColor until the SVG is written
WIDTH, HEIGHT = 9.2, 2.9  # inches, of a figure and of one row of panels
STYLE = {
    "svg.fonttype": "none",  # text stays text: selectable, searchable, in the page's own font
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "hatch.linewidth": 0.5,
}


def draw_panels(
    name: str,
    panels: dict[str, list[T]],
    draw: Callable[[Any, Sequence[T]], None],
    legend: Sequence[Any],
    *,
    height: float = HEIGHT,
    columns: int = 2,
    along: Literal["x", "y"] = "y",
) -> str | None:
    """Draw every panel's rows and one legend for all; None where there is no panel."""
    if not panels:
        return None
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    # The salt makes the ids, and with them the whole file, the same every time.
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height * lines + 0.35), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False).flatten()
        for axes, (title, part) in zip(grid, panels.items(), strict=False):
            axes.set_title(title)
            axes.set_axisbelow(True)
            axes.grid(axis=along, alpha=0.15)
            draw(axes, part)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        figure.legend(handles=legend, loc="outside upper left", ncols=min(len(legend), 6))
        return _inline(figure, name)


def _inline(figure: Figure, name: str) -> str:
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="([^"]*)"', rf' id="{name}-\1"', svg)  # ids are unique per page, not figure
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    svg = re.sub(r'(<svg [^>]*?)width="[^"]*"', rf'\1role="img" class="{name}"', svg, count=1)
    svg = re.sub(r'(<svg [^>]*?)height="[^"]*"', r"\1", svg, count=1)
    return svg.replace(INK, "currentColor")


def standalone(svg: str) -> str:
    """Make a figure a file of its own: with its name space, and a colour for currentColor."""
    style = "<style>svg{color:#1c1e21;background:#fff}</style>"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"<svg ([^>]*)>", rf"<svg {space} \1>{style}", svg, count=1) + "\n"


def bar_key(label: str, colour: str, hatch: str) -> Patch:
    """Legend entry of a bar."""
    return Patch(label=label, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.3)


def line_key(label: str, colour: str, marker: str, style: object = "-") -> Line2D:
    """Legend entry of a line."""
    return Line2D([], [], label=label, color=colour, marker=marker, linestyle=style, markersize=4)


def pick(cycle: Sequence[T], place: int) -> T:
    """Take from a cycle, over and over."""
    return cycle[place % len(cycle)]


def split(rows: Sequence[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    """Group rows by a key, in the order in which the keys first appear."""
    parts: dict[Any, list[T]] = {}
    for row in rows:
        parts.setdefault(key(row), []).append(row)
    return parts
