"""What a terminal shows: the main table, and the price of every scheme."""

from collections.abc import Mapping, Sequence
from typing import Any

from bench.page import Group, number
from bench.record import VANILLA
from bench.rows import CellRow, CostRow, QualityRow

CELL_HEAD = ["scheme", "method", "tok/s", "speed-up", "tau", "same tokens", "status"]
JOULES_HEAD = ["J/token", "energy ratio"]
QUALITY_HEAD = ["scheme", "perplexity", "over dense", "KL nats", "same top-1", "status"]

HELD = ("mJ", "ms", "W")  # of one forward or proposal

ERRORS = ("weight_error", "output_error")  # of a layer; the latter by calibrated rounding only


def cell_table(rows: Sequence[CellRow]) -> str:
    """Give a heading per model and task, one line per cell; accuracy and joules where known."""
    lines = []
    for key in dict.fromkeys(r.group for r in rows):
        group = Group(rows=[r for r in rows if r.group == key])
        table = [CELL_HEAD, *(_cell(r) for r in group.rows)]
        right = [2, 4]
        if any(r.accuracy is not None for r in group.rows):
            table = _with(table, [["correct"], *([_correct(r)] for r in group.rows)])
        if any(r.joules_per_token is not None for r in group.rows):
            right += [len(table[0]) - 1, len(table[0])]  # where the status stood
            table = _with(table, [JOULES_HEAD, *(_joules(r) for r in group.rows)])
        lines += [f"{group.title}: {group.facts}", *_aligned(table, right=right), ""]
    return "\n".join(lines)


def quality_table(rows: Sequence[QualityRow]) -> str:
    """Give a heading per model and text, one line per scheme."""
    lines = []
    for key in dict.fromkeys(r.group for r in rows):
        group = [r for r in rows if r.group == key]
        first = group[0]
        tokens = max(r.num_tokens for r in group)
        lines.append(
            f"{first.model} reading {first.task}: {first.weights} weights, {first.device}, "
            f"{first.dtype}, up to {tokens} tokens"
        )
        lines += [*_aligned([QUALITY_HEAD, *(_quality(r) for r in group)]), ""]
    return "\n".join(lines)


def cost_table(rows: Sequence[CostRow]) -> str:
    """Give a table per context and batch: reading n tokens, and proposing, over reading one.

    Then what these take when they are held, where they were.
    """
    timed = [r for r in rows if r.median_s is not None]
    lines = []
    for context, batch in dict.fromkeys((r.context, r.batch) for r in timed):
        here = [r for r in timed if (r.context, r.batch) == (context, batch)]
        reads = [r for r in here if r.what == "verify"]
        widths = sorted({r.n for r in reads if r.n is not None})
        table = [["scheme", "T_1", *map(str, widths)]]
        for cell in dict.fromkeys(r.cell for r in reads):
            own = {r.n: r for r in reads if r.cell == cell}
            once = _milliseconds(own[1]) if 1 in own else ""
            first = next(iter(own.values()))
            table.append([first.target, once, *(_times(own.get(n)) for n in widths)])
        if reads:
            lines.append(f"T_v(n) / T_1 of n tokens after {context}, batch {batch}:")
            lines += [*_aligned(table, right=range(1, len(table[0]))), ""]
        if any(r.energy_mj is not None for r in reads):
            lines.append(f"Held, a read of n tokens after {context}, batch {batch}:")
            lines += [*_held_reads(reads, widths), ""]
        drafts = [r for r in here if r.what == "draft"]
        table = [["scheme", "method", "n", "T_draft", "T_draft / T_1"]]
        table += [[r.target, r.arm, f"{r.n}", _milliseconds(r), _times(r)] for r in drafts]
        if any(r.energy_mj is not None for r in drafts):
            held = [[f"{unit} held" for unit in HELD], *map(_held, drafts)]
            table = [line + more for line, more in zip(table, held, strict=True)]
        if drafts:
            lines.append(f"A proposal of n tokens after {context}:")
            lines += [*_aligned(table, right=range(2, len(table[0]))), ""]
    return "".join(f"{line}\n" for line in lines)


def quality_report(report: Mapping[str, Any]) -> str:
    """Give what a quantisation reports: every layer's errors, then perplexity."""
    rows = report["layers"]
    kinds = [key for key in ERRORS if any(row[key] is not None for row in rows)]
    lines = [f"{'layer':<24}" + "".join(f"{key.replace('_', ' '):>14}" for key in kinds)]
    for row in rows:
        errors = (row[key] for key in kinds)
        shown = "".join(f"{'' if e is None else f'{e:.3e}':>14}" for e in errors)
        lines.append(f"{row['layer']:<24}{shown}")
    if "perplexity" in report:
        lines.append(
            f"perplexity {report['perplexity']:.4f}, dense {report['dense_perplexity']:.4f} "
            f"({report['tokens']} tokens of task={report['text']})"
        )
    if report.get("kl_nats_per_token") is not None:
        lines.append(f"KL(dense || new) {report['kl_nats_per_token']:.3e} nats per token")
    return "\n".join(lines)


def _milliseconds(row: CostRow) -> str:
    return f"{1000 * (row.median_s or 0):.3g} ms"


def _held_reads(rows: Sequence[CostRow], widths: Sequence[int]) -> list[str]:
    """Three lines per target: energy, time and power."""
    table = [["scheme", "", *map(str, widths)]]
    held = [r for r in rows if r.energy_mj is not None]
    for cell in dict.fromkeys(r.cell for r in held):
        own = {r.n: r for r in held if r.cell == cell}
        first = next(iter(own.values()))
        columns = [(first.target, "", ""), HELD, *(_held(own.get(n)) for n in widths)]
        table += map(list, zip(*columns, strict=True))
    return _aligned(table, right=range(2, len(table[0])))


def _held(row: CostRow | None) -> list[str]:
    """Give energy, time and power, as HELD has them."""
    if row is None or row.energy_mj is None or row.held_ms is None:
        return [""] * len(HELD)
    values = (row.energy_mj, row.held_ms, row.energy_mj / row.held_ms)
    return [f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in values]


def _times(row: CostRow | None) -> str:
    return "" if row is None or row.ratio is None else f"{row.ratio:.2f}"


def _aligned(table: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> list[str]:
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = []
    for line in table:
        cells = [
            said.rjust(width) if i in right else said.ljust(width)
            for i, (said, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(("  " + "  ".join(cells)).rstrip())
    return lines


def _with(table: Sequence[list[str]], columns: Sequence[list[str]]) -> list[list[str]]:
    """Put further columns before the last, the status."""
    return [[*line[:-1], *more, line[-1]] for line, more in zip(table, columns, strict=True)]


def _joules(row: CellRow) -> list[str]:
    ratio = "" if row.energy_ratio is None else f"{row.energy_ratio:.2f}"
    return [number(row.joules_per_token), ratio]


def _correct(row: CellRow) -> str:
    return _interval(row.accuracy, row.accuracy_low, row.accuracy_high)


def _interval(value: float | None, low: float | None, high: float | None, form: str = ".2f") -> str:
    if value is None:
        return ""
    bounds = "" if low is None else f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{bounds}"


def _quality(row: QualityRow) -> list[str]:
    return [
        row.target,
        _interval(row.perplexity, row.perplexity_low, row.perplexity_high, ".3f"),
        _interval(row.increase, row.increase_low, row.increase_high, "+.3f"),
        _interval(row.kl_nats, row.kl_low, row.kl_high, ".4f"),
        _interval(row.top1_agreement, row.top1_low, row.top1_high, ".1%"),
        row.status,
    ]


def _cell(row: CellRow) -> list[str]:
    speedup = "" if row.speedup is None else f"{row.speedup:.2f}"
    if row.speedup_low is not None and row.method != VANILLA:
        speedup += f" [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"
    same = row.lossless if row.agreement is None else f"{row.agreement:.0%} {row.lossless}"
    return [
        row.target + (" (random)" if row.weights == "random" else ""),
        row.arm,
        "" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
        speedup,
        "" if row.acceptance_length is None else f"{row.acceptance_length:.2f}",
        same,
        row.status,
    ]
