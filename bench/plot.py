"""Figures, one function each: rows in, one SVG out (None without rows), for light and dark pages.

name: of the figure; it prefixes every id, so that many figures can share a page.

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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from bench.record import VANILLA
from bench.results import CellRow, is_dense
from bench.stats import CostRow

PALETTE = ("#1F7FBF", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
MARKERS = ("o", "s", "^", "D", "v", "P")
HATCHES = ("", "//", "..", "xx", "\\\\", "++")
LINES: tuple[object, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 1.5, 1, 1.5)))
STAGES = {
    "share_draft_prefill": ("drafter's prefill", "#CC79A7", "xx"),
    "share_draft": ("draft", "#E69F00", "//"),
    "share_verify": ("verify", "#1F7FBF", ""),
    "share_commit": ("commit", "#009E73", ".."),
}
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


def speedup(rows: Sequence[CellRow], *, name: str) -> str | None:
    """Speed-up over vanilla of the same scheme, by scheme and method, with intervals."""
    shown = [r for r in rows if r.speedup is not None and r.method != VANILLA]
    return _bars(name, "speed-up", shown, lambda r: (r.speedup, r.speedup_low, r.speedup_high))


def acceptance_length(rows: Sequence[CellRow], *, name: str) -> str | None:
    """Tokens per step, by scheme and method, with intervals."""
    shown = [r for r in rows if r.acceptance_length is not None and r.method != VANILLA]
    return _bars(
        name,
        "tokens per step",
        shown,
        lambda r: (r.acceptance_length, r.acceptance_low, r.acceptance_high),
    )


def acceptance_at(rows: Sequence[CellRow], *, name: str) -> str | None:
    """Share of steps that kept at least i drafts; a colour per method, a dash per scheme."""
    shown = [r for r in rows if r.acceptance_at]
    arms, targets = sorted({r.arm for r in shown}), list(dict.fromkeys(r.target for r in shown))

    def draw(axes: Axes, part: Sequence[CellRow]) -> None:
        for row in part:
            place = arms.index(row.arm)
            axes.plot(
                range(1, len(row.acceptance_at) + 1),
                row.acceptance_at,
                color=_of(PALETTE, place),
                marker=_of(MARKERS, place),
                linestyle=_of(LINES, targets.index(row.target)),
                markersize=4,
                linewidth=1.3,
            )
        axes.set_xlabel("position in the draft, i")
        axes.set_ylabel("steps that kept at least i")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    legend = [_line_key(a, _of(PALETTE, i), _of(MARKERS, i)) for i, a in enumerate(arms)]
    legend += [_line_key(t, INK, "", _of(LINES, i)) for i, t in enumerate(targets)]
    panels = {_title(key): part for key, part in _split(shown, lambda r: r.group).items()}
    return _figure(name, panels, draw, legend)


def verify_cost(rows: Sequence[CostRow], *, name: str) -> str | None:
    """T_v(n) / T_1 per scheme: what it costs to read n tokens at once instead of one."""
    shown = [r for r in rows if r.what == "verify" and r.ratio is not None and r.batch == 1]
    targets = list(dict.fromkeys(_target(r) for r in shown))

    def draw(axes: Axes, part: Sequence[CostRow]) -> None:
        for place, target in enumerate(targets):
            line = sorted((r for r in part if _target(r) == target), key=lambda r: r.n or 0)
            colour, n = _of(PALETTE, place), [r.n or 0 for r in line]
            middle = [r.ratio or 0 for r in line]
            low = [r.ratio_low or r.ratio or 0 for r in line]
            high = [r.ratio_high or r.ratio or 0 for r in line]
            axes.fill_between(n, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(n, middle, color=colour, marker=_of(MARKERS, place), markersize=4)
        counts = sorted({r.n for r in part if r.n})
        ticks = [n for n in counts if n & (n - 1) == 0] or counts
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens read at once, n")
        axes.set_ylabel("T_v(n) / T_1")
        axes.set_ylim(bottom=0)
        _line_at_one(axes)

    legend = [_line_key(t, _of(PALETTE, i), _of(MARKERS, i)) for i, t in enumerate(targets)]
    parts = _split(shown, lambda r: (r.model, r.weights, r.device, r.dtype, r.context))
    panels = {
        f"{model} ({weights}), {device} {dtype}, context {context}": part
        for (model, weights, device, dtype, context), part in parts.items()
    }
    return _figure(name, panels, draw, legend)


def stage_shares(rows: Sequence[CellRow], *, name: str) -> str | None:
    """Share of the charged seconds per stage, one stacked bar per scheme and method."""
    shown = [r for r in rows if r.share_verify is not None and r.method != VANILLA]

    def draw(axes: Axes, part: Sequence[CellRow]) -> None:
        names = [f"{r.target}   {r.arm}" for r in part]
        left = [0.0] * len(part)
        for field, (_, colour, hatch) in STAGES.items():
            shares = [getattr(r, field) or 0.0 for r in part]
            style: dict[str, Any] = {
                "color": colour,
                "hatch": hatch,
                "edgecolor": "white",
                "linewidth": 0.3,
            }
            axes.barh(range(len(part)), shares, left=left, height=0.74, **style)
            left = [a + b for a, b in zip(left, shares, strict=True)]
        axes.set_yticks(range(len(part)), names)
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("share of the seconds charged to the method")

    legend = [_bar_key(label, colour, hatch) for label, colour, hatch in STAGES.values()]
    panels = {_title(key): part for key, part in _split(shown, lambda r: r.group).items()}
    most = max((len(part) for part in panels.values()), default=0)
    return _figure(name, panels, draw, legend, along="x", height=0.8 + 0.24 * most, columns=1)


def standalone(svg: str) -> str:
    """Make a figure a file of its own: with its name space, and a colour for currentColor."""
    style = "<style>svg{color:#1c1e21;background:#fff}</style>"
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return re.sub(r"<svg ([^>]*)>", rf"<svg {space} \1>{style}", svg, count=1) + "\n"


def _bars(
    name: str,
    label: str,
    rows: Sequence[CellRow],
    read: Callable[[CellRow], tuple[float | None, float | None, float | None]],
) -> str | None:
    """Bars grouped by scheme, a colour and a hatch per method in every panel, a line at 1."""
    arms = sorted({r.arm for r in rows})

    def draw(axes: Axes, part: Sequence[CellRow]) -> None:
        targets = list(dict.fromkeys(r.target for r in part))
        here = [a for a in arms if any(r.arm == a for r in part)]
        width = 0.8 / max(len(here), 3)
        for row in part:
            value, low, high = read(row)
            assert value is not None
            place = arms.index(row.arm)
            x = targets.index(row.target) + (here.index(row.arm) - (len(here) - 1) / 2) * width
            style: dict[str, Any] = {"color": _of(PALETTE, place), "hatch": _of(HATCHES, place)}
            axes.bar(x, value, width * 0.9, edgecolor="white", linewidth=0.3, **style)
            if low is not None and high is not None:
                spread = [[max(value - low, 0)], [max(high - value, 0)]]
                axes.errorbar(x, value, spread, color=INK, linewidth=1, capsize=2.5)
        axes.set_xticks(range(len(targets)), targets)
        axes.set_xlim(-0.6, len(targets) - 0.4)
        axes.set_ylabel(label)
        _line_at_one(axes)

    legend = [_bar_key(a, _of(PALETTE, i), _of(HATCHES, i)) for i, a in enumerate(arms)]
    panels = {_title(key): part for key, part in _split(rows, lambda r: r.group).items()}
    return _figure(name, panels, draw, legend)


def _figure(
    name: str,
    panels: dict[str, list[T]],
    draw: Callable[[Any, Sequence[T]], None],
    legend: Sequence[Any],
    *,
    height: float = HEIGHT,
    columns: int = 2,
    along: Literal["x", "y"] = "y",
) -> str | None:
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


def _line_at_one(axes: Axes) -> None:
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))


def _bar_key(label: str, colour: str, hatch: str) -> Patch:
    return Patch(label=label, facecolor=colour, hatch=hatch, edgecolor="white", linewidth=0.3)


def _line_key(label: str, colour: str, marker: str, style: object = "-") -> Line2D:
    return Line2D([], [], label=label, color=colour, marker=marker, linestyle=style, markersize=4)


def _of(cycle: Sequence[T], place: int) -> T:
    return cycle[place % len(cycle)]


def _split(rows: Sequence[T], key: Callable[[T], Hashable]) -> dict[Any, list[T]]:
    parts: dict[Any, list[T]] = {}
    for row in rows:
        parts.setdefault(key(row), []).append(row)
    return parts


def _target(row: CostRow) -> str:
    return row.scheme if is_dense(row.lm_head) else f"{row.scheme}, lm_head {row.lm_head}"


def _title(group: tuple[object, ...]) -> str:
    model, weights, task, device, dtype, temperature = group
    sampled = "" if temperature == 0 else f", temperature {temperature}"
    return f"{model} ({weights}), {task}, {device} {dtype}{sampled}"
