"""From quality cells to rows: perplexity, divergence, and the paired difference to dense.

Windows of the text are what is resampled. A window is as hard for one scheme as for another, so a
difference is taken window by window; its interval is far narrower than those of the perplexities.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bench.record import Quality
from bench.results import Campaign, CellResult
from bench.rows import QualityRow, is_dense
from bench.stats import Bootstrap, Floats, rate

Key = tuple[int, int, int]  # start, context and tokens of a window: what two cells must share


def quality_rows(campaign: Campaign, bootstrap: Bootstrap) -> list[QualityRow]:
    """Give one row per quality cell, failed and unfinished ones included."""
    return [_row(result, campaign, bootstrap) for result in campaign.qualities]


def perplexity(sums: Floats) -> Floats:
    """[..., 2], nats and tokens -> exp of nats per token."""
    return np.asarray(np.exp(rate(sums)))


def increase(sums: Floats) -> Floats:
    """[..., 4], a scheme's nats and tokens and dense's -> difference of the perplexities."""
    return perplexity(sums[..., 0:2]) - perplexity(sums[..., 2:4])


def _row(result: CellResult, campaign: Campaign, bootstrap: Bootstrap) -> QualityRow:
    c, windows = result.cell, result.qualities
    row = QualityRow(
        model=c.model,
        weights=c.weights,
        scheme=c.scheme,
        lm_head=c.lm_head,
        task=c.task,
        device=c.device,
        dtype=c.dtype,
        num_windows=len(windows),
        num_tokens=sum(w.tokens for w in windows),
        status=result.status.state,
        reason=result.status.reason,
        cell=result.name,
        folder=c.folder,
    )
    if not result.done:
        return row
    if not windows:
        return replace(row, reason="no records")
    own = bootstrap.over_prompts(_sums(windows), perplexity)
    kl = bootstrap.over_prompts(_beside(windows, [w.kl_nats for w in windows]), rate)
    top1 = bootstrap.over_prompts(_beside(windows, [w.top1_agree for w in windows]), rate)
    row = replace(
        row,
        perplexity=own.value,
        perplexity_low=own.low,
        perplexity_high=own.high,
        kl_nats=kl.value,
        kl_low=kl.low,
        kl_high=kl.high,
        top1_agreement=top1.value,
        top1_low=top1.low,
        top1_high=top1.high,
    )
    if is_dense(c.scheme) and is_dense(c.lm_head):
        return row
    return _against_dense(row, result, campaign, bootstrap)


def _against_dense(
    row: QualityRow, result: CellResult, campaign: Campaign, bootstrap: Bootstrap
) -> QualityRow:
    found = [
        c
        for c in campaign.qualities
        if c.done
        and result.quantises(c)
        and is_dense(c.cell.lm_head)
        and _place(c) == _place(result)
    ]
    if not found:
        return replace(row, reason="no finished dense cell of the same text and device")
    mine, theirs = _sums(result.qualities), _sums(found[0].qualities)
    both = {key: [*mine[key], *theirs[key]] for key in mine if key in theirs}
    if not both:
        return replace(row, reason="no window in common with dense")
    more = bootstrap.over_prompts(both, increase)
    return replace(
        row,
        increase=more.value,
        increase_low=more.low,
        increase_high=more.high,
        num_paired=len(both),
    )


def _place(result: CellResult) -> tuple[str, ...]:
    """What a cell and its dense counterpart must share."""
    c = result.cell
    return (c.model, c.weights, c.task, c.device, result.device_name, c.dtype)


def _key(window: Quality) -> Key:
    return (window.start, window.context, window.tokens)


def _sums(windows: Sequence[Quality]) -> dict[Key, list[float]]:
    return {_key(w): [w.nll_nats, w.tokens] for w in windows}


def _beside(windows: Sequence[Quality], values: Sequence[float | None]) -> dict[Key, list[float]]:
    """Sums of what is known beside a dense model only."""
    return {
        _key(w): [value, w.tokens]
        for w, value in zip(windows, values, strict=True)
        if value is not None
    }
