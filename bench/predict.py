"""What a campaign's cost cells say of a cell of generations: its speed-up, and its energy."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench import metrics
from bench.cost_model import (
    Unit,
    held_j,
    joules_per_token,
    predicted_speedup,
    proposal,
    reading,
    timed_s,
)
from bench.record import VANILLA, Cost
from bench.results import Campaign, CellResult
from bench.rows import CellRow


@dataclass(frozen=True, kw_only=True)
class _Round:
    """A cell's mean round and its parts in one unit; None where a part was not measured."""

    tau: float
    n: float  # tokens that a step reads: the root is read with the drafts
    once: float | None  # reading one token
    read: float | None  # reading n
    proposed: float | None


def predicted(row: CellRow, result: CellResult, campaign: Campaign) -> CellRow:
    """Fill the predicted speed-up, or why it is missing where its target's costs were measured."""
    mean = _round(row, result, campaign, timed_s)
    if mean is None:
        return row
    if mean.once is None or mean.read is None or mean.proposed is None:
        return replace(row, unpredicted=_missing(mean.n, *campaign.costs_of(result)))
    speedup = predicted_speedup(
        acceptance_length=mean.tau,
        draft_ratio=mean.proposed / mean.once,
        verify_ratio=mean.read / mean.once,
    )
    return replace(row, predicted_speedup=speedup)


def in_joules(row: CellRow, result: CellResult, campaign: Campaign) -> CellRow:
    """Fill what a token takes in joules, and plain decoding's joules over these.

    From costs that were held, as the predicted speed-up is from their times; what is not in it:
    `cost_model.joules_per_token`. Plain decoding is reading one token at this cell's context, so
    that vanilla's ratio is 1; where just that was not held there is no ratio.
    """
    mean = _round(row, result, campaign, held_j)
    if mean is None or mean.read is None or mean.proposed is None:
        return row
    token_j = joules_per_token(
        acceptance_length=mean.tau, proposal_j=mean.proposed, reading_j=mean.read
    )
    energy_ratio = None if mean.once is None else metrics.ratio(mean.once, token_j)
    return replace(row, joules_per_token=token_j, energy_ratio=energy_ratio)


def _round(row: CellRow, result: CellResult, campaign: Campaign, unit: Unit) -> _Round | None:
    verify, draft = campaign.costs_of(result)
    context = metrics.mean_context(metrics.finished(result.generations))
    if row.acceptance_length is None or row.drafted_per_step is None or context is None:
        return None
    n = row.drafted_per_step + 1
    plain = row.method == VANILLA
    return _Round(
        tau=row.acceptance_length,
        n=n,
        once=reading(verify, 1, context, unit),
        read=reading(verify, n, context, unit),
        proposed=0.0 if plain else proposal(draft, n, context, unit),
    )


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
