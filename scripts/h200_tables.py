"""The tables of `scripts.h200`, from the records that its cases left.

    forward.csv  one forward of n tokens after a context, as decoding runs it
    rounds.csv   whole rounds under a replayed acceptance, by the stages of a step
    start.csv    from the command to the first timed token, by stage

A column is a key of the rows below. `copy_tb_per_s` was measured in the process of its own row.
`speedup_at_profile` is what the replayed profile's own tau would give at this run's time per step:
drawn lengths differ from it by chance. `lost_share` is what of a round's wall time is no draft,
verify or commit: of the worst prompt.
`energy_mj` and `held_ms` are of one forward that was repeated back to back for `cost.hold_s`; so
their ratio is its power in watts, and `sm_mhz` and `power_capped` are how the device was meanwhile.
`parts_ms` is what a round should take by parts that were timed apart, by `specquant cost`: a
proposal, a read of as many tokens, and the commit; `parts_apart` is how far that is from its wall.
"""

import csv
import re
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from bench import metrics
from bench.cost_model import proposal, reading, timed_s
from bench.record import VANILLA, Cost, Generation
from bench.results import Campaign, CellResult, load

MOST_APART = 0.05  # of a round's wall time: parts and whole must agree so far
STAGES = ("host", "draft", "verify", "commit")  # of a step
START = (
    *("command", "imports", "tokenizer", "device", "weights", "rounding", "kernels", "layout"),
    *("building", "captures", "warm_up", "first_token"),
)

Row = Mapping[str, object]


def write_tables(out: Path) -> str:
    """Turn the records below `out` into tables; say how far rounds are from their parts at most."""
    campaign = load(out / "records")
    cells = [cell for cell in campaign.cells if cell.done]
    rounds = [_round(cell, campaign) for cell in cells if cell.generations]
    _write(out / "forward.csv", (row for cell in cells for row in _forwards(cell, cells)))
    _write(out / "rounds.csv", rounds)
    _write(out / "start.csv", (_start(cell) for cell in cells if "start_s" in cell.context))
    return "".join(_worst(rounds, column) for column in ("lost_share", "parts_apart"))


def _forwards(cell: CellResult, cells: list[CellResult]) -> Iterator[Row]:
    """Rows of one target's costs."""
    beside = _plain(cells, cell.same_target)
    gap = metrics.host_gap_share(beside) if beside else None
    copied = cell.context.get("copy_tb_per_s")
    for cost in cell.costs:
        if cost.what != "verify":
            continue
        times = sorted(1e3 * s for s in cost.repeat_s)
        median = statistics.median(times)
        yield {
            "model": cell.cell.model,
            "scheme": cell.cell.scheme,
            "lm_head": cell.cell.lm_head,
            "kernel": "+".join(sorted(set(cell.context.get("kernels", {}).values()))),
            "n": cost.n,
            "context": cost.context,
            "median_ms": f"{median:.4f}",
            "min_ms": f"{times[0]:.4f}",
            "max_ms": f"{times[-1]:.4f}",
            "repeats": len(times),
            "weight_bytes": cost.weight_bytes,
            "copy_tb_per_s": _told(copied, 3),
            "share_of_limit": _told(copied and cost.weight_bytes / copied / 1e9 / median, 3),
            "host_gap_share": _told(gap if cost.n == 1 else None, 4),
            "device": cell.device_name,
            "exact": cell.cell.exact,
            "price_of_exact": _told(_price(cell, cost, cells), 3),
            "energy_mj": _told(cost.energy_mj, 1),
            "held_ms": _told(cost.held_ms, 4),
            "sm_mhz": _told(cost.sm_mhz, 0),
            "power_capped": "" if cost.power_capped is None else cost.power_capped,
        }


def _price(cell: CellResult, cost: Cost, cells: list[CellResult]) -> float | None:
    """What an exact read takes over the same one of the same target as it comes."""
    as_it_comes = replace(cell, cell=replace(cell.cell, exact=False))
    plain = [
        statistics.median(other.repeat_s)
        for c in cells
        if cell.cell.exact and c.same_target(as_it_comes)
        for other in c.costs
        if (other.what, other.n, other.context) == (cost.what, cost.n, cost.context)
    ]
    return statistics.median(cost.repeat_s) / plain[0] if plain else None


def _round(cell: CellResult, campaign: Campaign) -> Row:
    """The row of one arm."""
    done = metrics.finished(cell.generations)
    steps = metrics.num_steps(done)
    rate = metrics.tokens_per_second(done) or 0.0
    beside = _plain(campaign.cells, cell.comparable)
    base = metrics.tokens_per_second(beside) if beside else None
    wall_ms = 1e3 * sum(_wall_s(g) for g in done) / steps
    commit_ms = 1e3 * metrics.seconds(done, ["commit"]) / steps
    apart = _parts_ms(cell, campaign)
    parts_ms = None if apart is None else apart + commit_ms
    prefill_ms = 1e3 * metrics.seconds(done, ["draft_prefill"]) / len(done)
    return {
        "model": cell.cell.model,
        "scheme": cell.cell.scheme,
        "draft_scheme": cell.cell.draft_scheme,
        "method": cell.cell.method,
        "acceptance": cell.cell.acceptance,
        "prompts": len(done),
        "tokens": metrics.num_tokens(done),
        "steps": steps,
        "tau": _told(metrics.acceptance_length(done), 3),
        "tokens_per_s": f"{rate:.2f}",
        "speedup": _told(base and rate / base, 3),
        "speedup_at_profile": _told(base and _at_profile(cell, rate / base), 3),
        **{f"{s}_ms": f"{1e3 * metrics.seconds(done, [s]) / steps:.4f}" for s in STAGES},
        "wall_ms": f"{wall_ms:.4f}",
        "lost_share": _told(max(_lost_share(g) for g in done), 4),
        "parts_ms": _told(parts_ms, 4),
        "parts_apart": _told(parts_ms and abs(parts_ms - wall_ms) / wall_ms, 4),
        "draft_prefill_ms": f"{prefill_ms:.3f}",
        "host_gap_share": _told(metrics.host_gap_share(done), 4),
        "uncaptured": sum(g.uncaptured for g in done),
        "copy_tb_per_s": _told(cell.context.get("copy_tb_per_s"), 3),
        "device": cell.device_name,
    }


def _at_profile(cell: CellResult, speedup: float) -> float | None:
    """Scale a speed-up to the tau that its cell's acceptance names; None where it names none."""
    named = re.search(r"\(tau=([0-9.]+)\)$", cell.cell.acceptance)
    drawn = metrics.acceptance_length(metrics.finished(cell.generations))
    drafts = cell.cell.method != VANILLA
    return speedup * float(named[1]) / drawn if drafts and named and drawn else None


def _wall_s(generation: Generation) -> float:
    """Of all rounds of a generation: without the prompt's reading, and the look for a stop."""
    others = ("prefill", "draft_prefill", "stop")
    return generation.wall_s - metrics.seconds([generation], others)


def _lost_share(generation: Generation) -> float:
    wall_s = _wall_s(generation)
    return abs(wall_s - metrics.seconds([generation], ("draft", "verify", "commit"))) / wall_s


def _parts_ms(cell: CellResult, campaign: Campaign) -> float | None:
    """A proposal and a read of what it proposes, timed apart; None where they were not."""
    done = metrics.finished(cell.generations)
    verify, draft = campaign.costs_of(cell)
    context, drafted = metrics.mean_context(done), metrics.drafted_per_step(done)
    assert context is not None
    assert drafted is not None
    read_s = reading(verify, drafted + 1, context, timed_s)
    drafts_s = 0.0
    if cell.cell.method != VANILLA:
        proposed_s = proposal(draft, drafted + 1, context, timed_s)
        if proposed_s is None:
            return None
        drafts_s = proposed_s
    return None if read_s is None else 1e3 * (read_s + drafts_s)


def _start(cell: CellResult) -> Row:
    stages: dict[str, float] = cell.context["start_s"]
    return {
        "model": cell.cell.model,
        "scheme": cell.cell.scheme,
        "method": cell.cell.method,
        "door": cell.cell.door,
        "total_s": f"{sum(stages.values()):.2f}",
        **{f"{name}_s": f"{stages.get(name, 0.0):.2f}" for name in START},
        "device": cell.device_name,
    }


def _worst(rounds: Iterable[Row], column: str) -> str:
    """Say which row's parts and whole are the furthest apart."""
    told = [row for row in rounds if row[column] != ""]
    if not told:
        return f"{column}: nothing to compare\n"
    worst = max(told, key=lambda row: float(str(row[column])))
    share = float(str(worst[column]))
    name = " ".join(str(worst[key]) for key in ("model", "scheme", "method"))
    verdict = "within" if share <= MOST_APART else "BEYOND"
    return f"{column}: at most {share:.1%} ({name}), {verdict} {MOST_APART:.0%}\n"


def _plain(cells: list[CellResult], fits: Callable[[CellResult], bool]) -> list[Generation]:
    """Plain decoding's answers, of the first cell that fits; empty where none does."""
    done = (c for c in cells if c.done and c.generations and c.cell.method == VANILLA)
    return next((metrics.finished(c.generations) for c in done if fits(c)), [])


def _told(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _write(path: Path, rows: Iterable[Row]) -> None:
    """Write a table whose columns are the keys of its rows; none where there are no rows."""
    whole = list(rows)
    if not whole:
        return
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(whole[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(whole)
