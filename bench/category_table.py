"""From cells to rows per category of their prompts: Spec-Bench's six, MT-Bench's eight."""

from bench import metrics, stats
from bench.results import Campaign, CellResult
from bench.rows import CategoryRow
from bench.stats import Bootstrap


def category_rows(campaign: Campaign, bootstrap: Bootstrap) -> list[CategoryRow]:
    """Give one row per category of every whole cell of generations."""
    return [
        row
        for result in campaign.runs
        if result.done
        for row in _rows_of(result, campaign, bootstrap)
    ]


def _rows_of(result: CellResult, campaign: Campaign, bootstrap: Bootstrap) -> list[CategoryRow]:
    c, ok = result.cell, metrics.finished(result.generations)
    vanilla = campaign.vanilla_of(result)
    pairs = stats.pairing(result, vanilla).pairs if vanilla else []
    rows = []
    for category in sorted({g.category for g in ok}):
        here = [g for g in ok if g.category == category]
        sums = metrics.pair_sums([p for p in pairs if p[0].category == category])
        gain = bootstrap.over_prompts(sums, stats.speedup)
        tau = bootstrap.over_prompts(metrics.step_sums(here), stats.rate)
        right = stats.accuracy(here, bootstrap.confidence)
        rows.append(
            CategoryRow(
                model=c.model,
                weights=c.weights,
                scheme=c.scheme,
                draft_scheme=c.draft_scheme,
                method=c.method,
                task=c.task,
                device=c.device,
                acceptance=c.acceptance,
                cell=result.name,
                category=category,
                num_prompts=len({g.prompt_id for g in here}),
                num_tokens=metrics.num_tokens(here),
                tokens_per_s=metrics.tokens_per_second(here),
                speedup=gain.value,
                speedup_low=gain.low,
                speedup_high=gain.high,
                acceptance_length=tau.value,
                acceptance_low=tau.low,
                acceptance_high=tau.high,
                accuracy=right.value,
                accuracy_low=right.low,
                accuracy_high=right.high,
                num_scored=metrics.num_scored(here),
            )
        )
    return rows
