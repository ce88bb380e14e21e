"""From cost cells to rows: every timing beside that of reading one token."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

from bench import cost_model
from bench.record import Cost
from bench.results import Campaign, CellResult
from bench.rows import CostRow
from bench.stats import Bootstrap


def cost_rows(campaign: Campaign, bootstrap: Bootstrap) -> list[CostRow]:
    """Give one row per measured cost, and one per cost cell that has none."""
    merged = {c.name: _merged(c.costs) if c.done else [] for c in campaign.costs}
    rows = []
    for result in campaign.costs:
        # T_1 of the same cell was measured between the others; another cell's is second best.
        others = [c for c in campaign.costs if c is not result and c.same_target(result)]
        once = {
            (cost.context, cost.batch): cost.repeat_s
            for measured in (*others, result)
            for cost in merged[measured.name]
            if (cost.what, cost.n) == ("verify", 1)
        }
        for cost in merged[result.name]:
            base = once.get((cost.context, cost.batch))
            rows.append(_cost_row(result, cost, base, bootstrap))
        if not merged[result.name]:
            rows.append(_cost_row(result, None, None, bootstrap))
    return rows


def _cost_row(
    result: CellResult, cost: Cost | None, base: list[float] | None, bootstrap: Bootstrap
) -> CostRow:
    c = result.cell
    row = CostRow(
        what="" if cost is None else cost.what,
        method=c.method,
        scheme=c.scheme,
        model=c.model,
        weights=c.weights,
        lm_head=c.lm_head,
        draft_scheme=c.draft_scheme,
        device=c.device,
        dtype=c.dtype,
        exact=c.exact,
        status=result.status.state,
        reason=result.status.reason,
        cell=result.name,
        folder=c.folder,
    )
    if cost is None:
        return row
    median = statistics.median(cost.repeat_s)
    row = replace(
        row,
        n=cost.n,
        context=cost.context,
        batch=cost.batch,
        median_s=median,
        min_s=min(cost.repeat_s),
        max_s=max(cost.repeat_s),
        count=len(cost.repeat_s),
        forwards=cost.forwards,
        gb_per_s=cost_model.bytes_per_second(cost) / 1e9,
        tokens_per_s_at_n=cost.n * cost.batch / median if cost.what == "verify" else None,
        energy_mj=cost.energy_mj,
        held_ms=cost.held_ms,
        sm_mhz=cost.sm_mhz,
        power_capped=cost.power_capped,
    )
    if base is None:
        return replace(row, reason="no T_1 of the same scheme, context and batch")
    if (cost.what, cost.n) == ("verify", 1) and cost.repeat_s == base:
        return replace(row, ratio=1.0, ratio_low=1.0, ratio_high=1.0)
    to_once = bootstrap.ratio_of_medians(cost.repeat_s, base)
    return replace(row, ratio=to_once.value, ratio_low=to_once.low, ratio_high=to_once.high)


def _merged(costs: Sequence[Cost]) -> list[Cost]:
    """Join repeats of the same measurement, as a resumed cell may hold it twice."""
    joined: dict[tuple[str, int, int, int, int], Cost] = {}
    for cost in costs:
        key = (cost.what, cost.n, cost.context, cost.batch, cost.forwards)
        before = joined[key].repeat_s if key in joined else []
        joined[key] = replace(cost, repeat_s=[*before, *cost.repeat_s])
    return [cost for cost in joined.values() if cost.repeat_s]
