"""What a campaign's cost cells say a speed-up should be, or why they say nothing."""

from collections.abc import Sequence
from dataclasses import replace

from bench import metrics
from bench.cost_model import predicted_speedup, proposal, reading, timed_s
from bench.record import Cost
from bench.results import Campaign, CellResult
from bench.rows import CellRow


def predicted(row: CellRow, result: CellResult, campaign: Campaign) -> CellRow:
    """Fill the predicted speed-up, or why it is missing where its target's costs were measured."""
    verify, draft = campaign.costs_of(result)
    context = metrics.mean_context(metrics.finished(result.generations))
    if row.acceptance_length is None or row.drafted_per_step is None or context is None:
        return row
    n = row.drafted_per_step + 1  # the root is read with the drafts
    once = reading(verify, 1, context, timed_s)
    read = reading(verify, n, context, timed_s)
    proposed = proposal(draft, n, context, timed_s)
    if once is None or read is None or proposed is None:
        return replace(row, unpredicted=_missing(n, verify, draft))
    speedup = predicted_speedup(
        acceptance_length=row.acceptance_length,
        draft_ratio=proposed / once,
        verify_ratio=read / once,
    )
    return replace(row, predicted_speedup=speedup)


def _missing(n: float, verify: Sequence[Cost], draft: Sequence[Cost]) -> str:
    """Say what was not measured; nothing where no cost was. n: tokens that a step reads."""
    if not verify and not draft:
        return ""
    if not verify:
        return "no cost of reading by its target was measured"
    widths = sorted({cost.n for cost in verify if cost.batch == 1})
    if not widths:
        return "no cost was measured at batch 1"
    if widths[0] > 1 or widths[-1] < n:
        measured = f"for {widths[0]} to {widths[-1]} tokens read at once"
        return f"costs were measured {measured}, it needs 1 and {n:.4g} (cost.widths)"
    return "no cost of its drafter was measured"
