"""Door: turn a campaign's records into tables, figures and one page.

    specquant report campaign=demo         python -m bench.report campaign=demo

Writes results/<campaign>/report/{index.html, report.md, *.csv, *.svg}. Needs no torch, so records
from a GPU machine can be read on a laptop.
"""

import csv
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import hydra
from omegaconf import DictConfig

from bench import metrics, page, plot, stats
from bench.build import ROOT
from bench.page import Figure, Section
from bench.record import STAGES, Cost
from bench.results import REPORT, Campaign, CellResult, CellRow, load
from bench.stats import Bootstrap, CostRow

Row = dict[str, object]  # column -> value

FORMATS = ("csv", "svg", "md", "html")
CAPTIONS = {
    "speedup": (
        "Speed-up over plain decoding of the same scheme",
        "Bars: ratio of tokens/s over the same prompts; whiskers: bootstrap interval over prompts; "
        "dashed: no change. Every scheme has its own baseline.",
    ),
    "acceptance-length": (
        "Tokens per step",
        "Acceptance length tau, bonus token included. Plain decoding gives 1 (dashed).",
    ),
    "acceptance-at": (
        "How far into a draft the target agrees",
        "Share of steps that kept at least i drafts.",
    ),
    "verify-cost": (
        "What reading n tokens at once costs",
        "Median time to read n tokens over the time to read one, per scheme; shaded: bootstrap "
        "interval over repeats. 1 would make verification free.",
    ),
    "stage-shares": (
        "Where a round's time goes",
        "Share of the seconds charged to the method, per stage.",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Everything that can be said about a campaign."""

    campaign: Campaign
    confidence: float
    cells: list[CellRow]
    costs: list[CostRow]
    categories: list[Row]
    stages: list[Row]


def tables(campaign: Campaign, bootstrap: Bootstrap) -> Tables:
    """Make all rows of a campaign."""
    done = [result for result in campaign.runs if result.done]
    return Tables(
        campaign=campaign,
        confidence=bootstrap.confidence,
        cells=stats.cell_rows(campaign, bootstrap),
        costs=cost_rows(campaign, bootstrap),
        categories=[row for result in done for row in _categories(result, campaign, bootstrap)],
        stages=[row for result in done for row in _stages(result)],
    )


def cost_rows(campaign: Campaign, bootstrap: Bootstrap) -> list[CostRow]:
    """Give one row per measured cost, and one per cost cell that has none."""
    merged = {c.name: _merged(c.costs) if c.done else [] for c in campaign.costs}
    once = {
        (key, cost.context, cost.batch): cost.repeat_s
        for result in campaign.costs
        for cost in merged[result.name]
        for key in (result.target, result.name)
        if (cost.what, cost.n) == ("verify", 1)
    }
    rows = []
    for result in campaign.costs:
        for cost in merged[result.name]:
            size = (cost.context, cost.batch)
            # T_1 of the same cell was measured between the others; another cell's is second best.
            base = once.get((result.name, *size)) or once.get((result.target, *size))
            rows.append(_cost_row(result, cost, base, bootstrap))
        if not merged[result.name]:
            rows.append(_cost_row(result, None, None, bootstrap))
    return rows


def sections(report: Tables) -> list[Section]:
    """Split measured from synthetic, and draw the figures of each."""
    parts = []
    for synthetic in (False, True):
        cells = [r for r in report.cells if r.synthetic == synthetic]
        costs = [r for r in report.costs if (r.weights == "random") == synthetic]
        suffix = "-synthetic" if synthetic else ""
        drawn = {
            "speedup": plot.speedup(cells, name=f"speedup{suffix}"),
            "acceptance-length": plot.acceptance_length(cells, name=f"acceptance-length{suffix}"),
            "acceptance-at": plot.acceptance_at(cells, name=f"acceptance-at{suffix}"),
            "verify-cost": plot.verify_cost(costs, name=f"verify-cost{suffix}"),
            "stage-shares": plot.stage_shares(cells, name=f"stage-shares{suffix}"),
        }
        figures = [
            Figure(name=name + suffix, title=CAPTIONS[name][0], caption=CAPTIONS[name][1], svg=svg)
            for name, svg in drawn.items()
            if svg
        ]
        title, note = ("Synthetic", "synthetic") if synthetic else ("Measured", "")
        parts.append(Section(title=title, note=note, rows=cells, costs=costs, figures=figures))
    return parts


def write(report: Tables, folder: Path, formats: Sequence[str]) -> None:
    """Write the report's files into a folder, made where it is missing."""
    if unknown := set(formats) - set(FORMATS):
        raise ValueError(f"formats must be among {list(FORMATS)}, got {sorted(unknown)}")
    folder.mkdir(parents=True, exist_ok=True)
    parts = sections(report)
    if "csv" in formats:
        _write_csv(folder / "table.csv", report.cells)
        _write_csv(folder / "cost.csv", report.costs)
        _write_csv(folder / "categories.csv", report.categories)
        _write_csv(folder / "stages.csv", report.stages)
    if "svg" in formats:
        for figure in (f for part in parts for f in part.figures):
            text = plot.standalone(figure.svg)
            (folder / f"{figure.name}.svg").write_text(text, encoding="utf-8")
    for name, kind in (("report.md", "md"), ("index.html", "html")):
        if kind in formats:
            text = page.render(f"report.{kind}.j2", report.campaign, parts, report.confidence)
            (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    """Report on a campaign as the command line asks; give the exit code."""
    codes = []

    @hydra.main(config_path=str(ROOT / "conf"), config_name="report", version_base="1.3")
    def door(config: DictConfig) -> None:
        try:
            sys.stdout.write(_report(config))
            codes.append(0)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            codes.append(2)

    door()
    return codes[0] if codes else 0


def _report(config: DictConfig) -> str:
    if "campaign" not in config:  # Hydra's ??? counts as absent
        raise ValueError("campaign must name a folder of results_dir, as in campaign=demo")
    folder = Path.cwd() / config.results_dir / str(config.campaign)
    bootstrap = Bootstrap(
        samples=config.bootstrap_samples, confidence=config.confidence, seed=config.seed
    )
    report = tables(load(folder), bootstrap)
    write(report, folder / REPORT, list(config.formats))
    shown = folder / REPORT / ("index.html" if "html" in config.formats else "")
    return f"{page.format_table(report.cells)}\n{shown}\n"


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
        status=result.status.state,
        reason=result.status.reason,
        cell=result.name,
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
        gb_per_s=metrics.bytes_per_second(cost) / 1e9,
        tokens_per_s_at_n=cost.n * cost.batch / median if cost.what == "verify" else None,
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


def _categories(result: CellResult, campaign: Campaign, bootstrap: Bootstrap) -> list[Row]:
    ok = metrics.finished(result.generations)
    vanilla = campaign.vanilla_of(result)
    pairs = stats.pairing(result, vanilla).pairs if vanilla else []
    rows = []
    for category in sorted({g.category for g in ok}):
        here = [g for g in ok if g.category == category]
        sums = metrics.pair_sums([p for p in pairs if p[0].category == category])
        gain = bootstrap.over_prompts(sums, stats.speedup)
        rows.append(
            {
                **_labels(result),
                "category": category,
                "num_prompts": len({g.prompt_id for g in here}),
                "num_tokens": metrics.num_tokens(here),
                "tokens_per_s": metrics.tokens_per_second(here),
                "speedup": gain.value,
                "speedup_low": gain.low,
                "speedup_high": gain.high,
                "acceptance_length": metrics.acceptance_length(here),
            }
        )
    return rows


def _stages(result: CellResult) -> list[Row]:
    ok = metrics.finished(result.generations)
    shares = metrics.stage_shares(ok)
    return [
        {
            **_labels(result),
            "stage": stage,
            "count": sum(len(g.stage_s.get(stage, ())) for g in ok),
            "total_s": metrics.seconds(ok, [stage]),
            "per_step_s": metrics.ratio(metrics.seconds(ok, [stage]), metrics.num_steps(ok)),
            "share": shares.get(stage),  # of the charged seconds; the target's prefill is not
        }
        for stage in STAGES
    ]


def _labels(result: CellResult) -> Row:
    c = result.cell
    return {
        "model": c.model,
        "weights": c.weights,
        "scheme": c.scheme,
        "draft_scheme": c.draft_scheme,
        "method": c.method,
        "task": c.task,
        "device": c.device,
        "acceptance": c.acceptance,
        "cell": result.name,
    }


def _write_csv(path: Path, rows: Sequence[object]) -> None:
    """Write rows of one kind; no rows, an empty file."""
    records = [row if isinstance(row, dict) else vars(row) for row in rows]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([list(records[0])] if records else [])
        for record in records:
            values = record.values()
            writer.writerow(" ".join(map(str, v)) if isinstance(v, tuple) else v for v in values)


if __name__ == "__main__":
    sys.exit(main())
