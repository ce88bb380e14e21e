"""Figures, one function each: rows in, one SVG out (None without rows), for light and dark pages.

name: of the figure; it prefixes every id, so that many figures can share a page.
"""

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from bench.canvas import (
    HATCHES,
    INK,
    LINES,
    MARKERS,
    PALETTE,
    bar_key,
    draw_panels,
    line_key,
    pick,
    split,
)
from bench.record import VANILLA
from bench.rows import CellRow, CostRow, QualityRow, is_dense

STAGES = {
    "share_draft_prefill": ("drafter's prefill", "#CC79A7", "xx"),
    "share_host": ("host", "#999999", "xx"),
    "share_draft": ("draft", "#E69F00", "//"),
    "share_verify": ("verify", "#1F7FBF", ""),
    "share_commit": ("commit", "#009E73", ".."),
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
                color=pick(PALETTE, place),
                marker=pick(MARKERS, place),
                linestyle=pick(LINES, targets.index(row.target)),
                markersize=4,
                linewidth=1.3,
            )
        axes.set_xlabel("position in the draft, i")
        axes.set_ylabel("steps that kept at least i")
        axes.set_ylim(0, 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    legend = [line_key(a, pick(PALETTE, i), pick(MARKERS, i)) for i, a in enumerate(arms)]
    legend += [line_key(t, INK, "", pick(LINES, i)) for i, t in enumerate(targets)]
    panels = {_title(key): part for key, part in split(shown, lambda r: r.group).items()}
    return draw_panels(name, panels, draw, legend)


def verify_cost(rows: Sequence[CostRow], *, name: str) -> str | None:
    """T_v(n) / T_1 per scheme: what it costs to read n tokens at once instead of one."""
    shown = [r for r in rows if r.what == "verify" and r.ratio is not None and r.batch == 1]
    targets = list(dict.fromkeys(r.target for r in shown))

    def draw(axes: Axes, part: Sequence[CostRow]) -> None:
        for place, target in enumerate(targets):
            line = sorted(
                (r for r in part if r.target == target),
                key=lambda r: r.n or 0,
            )
            colour, n = pick(PALETTE, place), [r.n or 0 for r in line]
            middle = [r.ratio or 0 for r in line]
            low = [r.ratio_low or r.ratio or 0 for r in line]
            high = [r.ratio_high or r.ratio or 0 for r in line]
            axes.fill_between(n, low, high, color=colour, alpha=0.2, linewidth=0)
            axes.plot(n, middle, color=colour, marker=pick(MARKERS, place), markersize=4)
        counts = sorted({r.n for r in part if r.n})
        ticks = [n for n in counts if n & (n - 1) == 0] or counts
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, [str(n) for n in ticks])
        axes.minorticks_off()
        axes.set_xlabel("tokens read at once, n")
        axes.set_ylabel("T_v(n) / T_1")
        axes.set_ylim(bottom=0)
        _line_at_one(axes)

    legend = [line_key(t, pick(PALETTE, i), pick(MARKERS, i)) for i, t in enumerate(targets)]
    parts = split(shown, lambda r: (r.model, r.weights, r.device, r.dtype, r.context))
    panels = {
        f"{model} ({weights}), {device} {dtype}, context {context}": part
        for (model, weights, device, dtype, context), part in parts.items()
    }
    return draw_panels(name, panels, draw, legend)


def quality(rows: Sequence[QualityRow], *, name: str) -> str | None:
    """Perplexity per scheme with its interval, a panel per model and text."""
    shown = [r for r in rows if r.perplexity is not None]

    def draw(axes: Axes, part: Sequence[QualityRow]) -> None:
        for x, row in enumerate(part):
            assert row.perplexity is not None
            low, high = row.perplexity_low, row.perplexity_high
            if low is not None and high is not None:
                axes.plot([x, x], [low, high], color=INK, linewidth=1)
            axes.plot(x, row.perplexity, color=PALETTE[0], marker=MARKERS[0], linestyle="")
            if is_dense(row.target):
                axes.axhline(row.perplexity, color=INK, linewidth=1, linestyle=(0, (4, 3)))
        axes.set_xticks(range(len(part)), [r.target for r in part])
        axes.set_xlim(-0.6, len(part) - 0.4)
        axes.set_ylabel("perplexity")

    legend = [line_key("perplexity of the target", PALETTE[0], MARKERS[0], "")]
    panels = {
        f"{model} ({weights}), {task}, {device} {dtype}": part
        for (model, weights, task, device, dtype), part in split(shown, lambda r: r.group).items()
    }
    return draw_panels(name, panels, draw, legend)


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

    legend = [bar_key(label, colour, hatch) for label, colour, hatch in STAGES.values()]
    panels = {_title(key): part for key, part in split(shown, lambda r: r.group).items()}
    most = max((len(part) for part in panels.values()), default=0)
    return draw_panels(name, panels, draw, legend, along="x", height=0.8 + 0.24 * most, columns=1)


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
            style: dict[str, Any] = {"color": pick(PALETTE, place), "hatch": pick(HATCHES, place)}
            axes.bar(x, value, width * 0.9, edgecolor="white", linewidth=0.3, **style)
            if low is not None and high is not None:
                spread = [[max(value - low, 0)], [max(high - value, 0)]]
                axes.errorbar(x, value, spread, color=INK, linewidth=1, capsize=2.5)
        axes.set_xticks(range(len(targets)), targets)
        axes.set_xlim(-0.6, len(targets) - 0.4)
        axes.set_ylabel(label)
        _line_at_one(axes)

    legend = [bar_key(a, pick(PALETTE, i), pick(HATCHES, i)) for i, a in enumerate(arms)]
    panels = {_title(key): part for key, part in split(rows, lambda r: r.group).items()}
    return draw_panels(name, panels, draw, legend)


def _line_at_one(axes: Axes) -> None:
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))


def _title(group: tuple[object, ...]) -> str:
    model, weights, task, device, dtype, exact, temperature = group
    sampled = "" if temperature == 0 else f", temperature {temperature}"
    return f"{model} ({weights}), {task}, {device} {dtype}{', exact' if exact else ''}{sampled}"
