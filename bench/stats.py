"""From cells to rows: every number of the tables with its interval.

    rows = cell_rows(load(Path("results/demo")), Bootstrap(samples=2000, confidence=0.95, seed=0))

Prompts are what was sampled, so prompts are what is resampled: each resample draws whole prompts,
all turns and both arms together, and takes the ratio of sums. An interval says how far another
draw of such prompts would move the number; it does not cover another machine or another day.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import metrics
from bench.predict import in_joules, predicted
from bench.record import VANILLA, Generation
from bench.results import Campaign, CellResult
from bench.rows import CellRow, is_dense

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A number and its bounds; no bounds where a single prompt leaves nothing to resample."""

    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Percentile intervals by resampling; the same seed gives the same interval."""

    samples: int
    confidence: float
    seed: int

    def __post_init__(self) -> None:
        if not isinstance(self.samples, int) or self.samples < 100:
            raise ValueError(f"bootstrap_samples must be 100 or more, got {self.samples!r}")
        if not isinstance(self.confidence, float) or not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence!r}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be 0 or more, got {self.seed!r}")

    def over_prompts(
        self, sums: Mapping[Any, Sequence[float]], statistic: Callable[[Floats], Floats]
    ) -> Interval:
        """Resample prompts, or windows. sums: of each, k sums. statistic: [..., k] -> [...]."""
        table = np.array(list(sums.values()), dtype=np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(table.sum(axis=0))) if len(table) else float("nan")
            if not np.isfinite(value):
                return Interval(value=None, low=None, high=None)
            if len(table) < 2:
                return Interval(value=value, low=None, high=None)
            share = np.full(len(table), 1 / len(table))
            generator = np.random.default_rng(self.seed)
            drawn = generator.multinomial(len(table), share, size=self.samples)
            low, high = self._bounds(statistic(drawn @ table))
        return Interval(value=value, low=low, high=high)

    def ratio_of_medians(self, above: Sequence[float], below: Sequence[float]) -> Interval:
        """Resample the repeats of two timings, each on its own."""
        value = statistics.median(above) / statistics.median(below)
        if min(len(above), len(below)) < 2:
            return Interval(value=value, low=None, high=None)
        generator = np.random.default_rng(self.seed)
        medians = [
            np.median(generator.choice(repeats, (self.samples, len(repeats))), axis=1)
            for repeats in (above, below)
        ]
        low, high = self._bounds(medians[0] / medians[1])
        return Interval(value=value, low=low, high=high)

    def _bounds(self, resampled: Floats) -> tuple[float, float]:
        outside = (1 - self.confidence) / 2
        low, high = np.quantile(resampled[np.isfinite(resampled)], [outside, 1 - outside])
        return float(low), float(high)


def cell_rows(campaign: Campaign, bootstrap: Bootstrap) -> list[CellRow]:
    """Give one row per cell of generations, failed and unfinished ones included."""
    return [_cell_row(result, campaign, bootstrap) for result in campaign.runs]


def rate(sums: Floats) -> Floats:
    """[..., 2] -> first sum over second."""
    return np.asarray(sums[..., 0] / sums[..., 1])


def speedup(sums: Floats) -> Floats:
    """[..., 4], as `metrics.pair_sums` gives them: the method's tokens/s over vanilla's."""
    return rate(sums[..., 0:2]) / rate(sums[..., 2:4])


def compatibility(sums: Floats) -> Floats:
    """[..., 8]: speed-up on a scheme over speed-up on dense weights."""
    return speedup(sums[..., 0:4]) / speedup(sums[..., 4:8])


def acceptance_change(sums: Floats) -> Floats:
    """[..., 4], tokens and steps on a scheme and on dense weights -> difference of tau."""
    return rate(sums[..., 0:2]) - rate(sums[..., 2:4])


def accuracy(generations: Sequence[Generation], confidence: float) -> Interval:
    """Share of the scored answers that are correct, with Wilson's interval.

    A bootstrap would give no width where all answers are right, or none is.
    """
    scored = metrics.num_scored(generations)
    if not scored:
        return Interval(value=None, low=None, high=None)
    share = sum(g.correct is True for g in generations) / scored
    z2 = statistics.NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    middle = (share + z2 / (2 * scored)) / (1 + z2 / scored)
    spread = share * (1 - share) / scored + z2 / (4 * scored**2)
    half = math.sqrt(z2 * spread) / (1 + z2 / scored)
    return Interval(value=share, low=max(middle - half, 0.0), high=min(middle + half, 1.0))


def _cell_row(result: CellResult, campaign: Campaign, bootstrap: Bootstrap) -> CellRow:
    c, ok = result.cell, metrics.finished(result.generations)
    row = CellRow(
        model=c.model,
        weights=c.weights,
        scheme=c.scheme,
        draft_scheme=c.draft_scheme,
        method=c.method,
        task=c.task,
        device=c.device,
        num_prompts=len({g.prompt_id for g in ok}),
        num_tokens=metrics.num_tokens(ok),
        status=result.status.state,
        dtype=c.dtype,
        exact=c.exact,
        lm_head=c.lm_head,
        acceptance=c.acceptance,
        temperature=c.temperature,
        num_too_long=len(result.generations) - len(ok),
        reason=result.status.reason,
        cell=result.name,
        folder=c.folder,
    )
    if not result.done:
        return row
    if not ok:
        return replace(row, reason="every prompt is too long" if row.num_too_long else "no records")
    row = in_joules(_measured(row, ok, bootstrap), result, campaign)
    if c.method == VANILLA:
        return replace(
            row,
            speedup=1.0,
            speedup_low=1.0,
            speedup_high=1.0,
            speedup_decode=1.0,
            speedup_request=1.0,
            lossless="-",
        )
    row = predicted(row, result, campaign)
    row = _moved(row, result, campaign, bootstrap)
    vanilla = campaign.vanilla_of(result)
    if vanilla is None:
        return replace(row, reason="no finished vanilla cell of the same target, task and device")
    return _beside(row, result, vanilla, campaign, bootstrap)


def _measured(row: CellRow, ok: Sequence[Generation], bootstrap: Bootstrap) -> CellRow:
    """Fill what a cell says on its own."""
    tau = bootstrap.over_prompts(metrics.step_sums(ok), rate)
    right = accuracy(ok, bootstrap.confidence)
    shares = metrics.stage_shares(ok)
    return replace(
        row,
        accuracy=right.value,
        accuracy_low=right.low,
        accuracy_high=right.high,
        num_scored=metrics.num_scored(ok),
        tokens_per_s=metrics.tokens_per_second(ok),
        acceptance_length=tau.value,
        acceptance_low=tau.low,
        acceptance_high=tau.high,
        num_steps=metrics.num_steps(ok),
        drafted_per_step=metrics.drafted_per_step(ok),
        share_draft_prefill=shares.get("draft_prefill"),
        share_host=shares.get("host"),
        share_draft=shares.get("draft"),
        share_verify=shares.get("verify"),
        share_commit=shares.get("commit"),
        host_gap_share=metrics.host_gap_share(ok),
        acceptance_at=tuple(metrics.acceptance_at(ok)),
    )


def _moved(row: CellRow, result: CellResult, campaign: Campaign, bootstrap: Bootstrap) -> CellRow:
    """Fill how far tau is from that of the same method on dense weights."""
    dense = campaign.dense_of(result)
    if dense is None or is_dense(result.cell.scheme):
        return row
    paired = pairing(result, dense).pairs
    change = bootstrap.over_prompts(metrics.pair_steps(paired), acceptance_change)
    return replace(
        row,
        acceptance_change=change.value,
        acceptance_change_low=change.low,
        acceptance_change_high=change.high,
    )


def _beside(
    row: CellRow,
    result: CellResult,
    vanilla: CellResult,
    campaign: Campaign,
    bootstrap: Bootstrap,
) -> CellRow:
    """Fill what a cell says beside vanilla's, and beside the same method's on dense weights."""
    paired = pairing(result, vanilla)
    row = replace(row, num_paired=len(paired.pairs), num_incomparable=paired.num_incomparable)
    if not paired.pairs:
        return replace(row, reason="no prompt in common with vanilla")
    sums = metrics.pair_sums(paired.pairs)
    gain = bootstrap.over_prompts(sums, speedup)
    row = replace(
        row,
        speedup=gain.value,
        speedup_low=gain.low,
        speedup_high=gain.high,
        speedup_decode=_speedup(paired, metrics.DECODE),
        speedup_request=_speedup(paired, metrics.REQUEST),
        reason=f"{paired.num_unpaired} turns without a vanilla turn" * bool(paired.num_unpaired),
    )
    if result.tokens_matter:
        row = _agreeing(row, paired, result.tie_threshold_nats)
    dense = campaign.dense_of(result)
    dense_vanilla = campaign.vanilla_of(dense) if dense else None
    if dense is None or dense_vanilla is None or is_dense(result.cell.scheme):
        return row
    theirs = metrics.pair_sums(pairing(dense, dense_vanilla).pairs)
    both = {prompt: [*sums[prompt], *theirs[prompt]] for prompt in sums if prompt in theirs}
    kept = bootstrap.over_prompts(both, compatibility)
    return replace(
        row,
        compatibility=kept.value,
        compatibility_low=kept.low,
        compatibility_high=kept.high,
    )


def _agreeing(row: CellRow, paired: metrics.Pairing, tie_threshold_nats: float | None) -> CellRow:
    """Fill the verdict; sampled tokens are drawn with the same noise, so they must agree too."""
    agreed = metrics.agreement(paired.pairs, tie_threshold_nats)
    if agreed is None:
        return row
    note = f"{agreed.num_unknown} differences found no vanilla to measure their gap: run it again"
    return replace(
        row,
        reason="; ".join(filter(None, [row.reason, note if agreed.num_unknown else ""])),
        agreement=agreed.share,
        lossless=agreed.verdict,
        num_ties=agreed.num_ties,
        num_differences=agreed.num_differences,
    )


def pairing(result: CellResult, vanilla: CellResult) -> metrics.Pairing:
    """Put a cell's turns beside its baseline's."""
    return metrics.pair(result.generations, vanilla.generations, tokens_matter=result.tokens_matter)


def _speedup(paired: metrics.Pairing, stages: Sequence[str]) -> float | None:
    sums = np.array(list(metrics.pair_sums(paired.pairs, stages).values())).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(speedup(sums))
    return value if np.isfinite(value) else None
