"""Door: turn a campaign's records into tables, figures and one page.

    specquant report campaign=demo         python -m bench.report campaign=demo

Writes results/<campaign>/report/{index.html, report.md, *.csv, *.svg}. Needs no torch, so records
from a GPU machine can be read on a laptop.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hydra
from omegaconf import DictConfig

from bench import canvas, metrics, page, plot, stats, terminal
from bench.build import ROOT
from bench.category_table import category_rows
from bench.cost_table import cost_rows
from bench.door import unusable
from bench.page import Figure, Section
from bench.quality_table import quality_rows
from bench.record import STAGES
from bench.results import REPORT, Campaign, CellResult, load
from bench.rows import CategoryRow, CellRow, CostRow, QualityRow
from bench.stats import Bootstrap

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
    "quality": (
        "What a scheme costs in quality",
        "Perplexity of the target, per scheme; whiskers: bootstrap interval over windows of the "
        "text; dashed: dense. Intervals of one text move together: the table has the paired "
        "difference.",
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
    qualities: list[QualityRow]
    categories: list[CategoryRow]
    stages: list[Row]


def tables(campaign: Campaign, bootstrap: Bootstrap) -> Tables:
    """Make all rows of a campaign."""
    done = [result for result in campaign.runs if result.done]
    return Tables(
        campaign=campaign,
        confidence=bootstrap.confidence,
        cells=stats.cell_rows(campaign, bootstrap),
        costs=cost_rows(campaign, bootstrap),
        qualities=quality_rows(campaign, bootstrap),
        categories=category_rows(campaign, bootstrap),
        stages=[row for result in done for row in _stages(result)],
    )


def sections(report: Tables) -> list[Section]:
    """Split measured from synthetic, and draw the figures of each."""
    parts = []
    for synthetic in (False, True):
        cells = [r for r in report.cells if r.synthetic == synthetic]
        costs = [r for r in report.costs if (r.weights == "random") == synthetic]
        qualities = [r for r in report.qualities if (r.weights == "random") == synthetic]
        names = {r.cell for r in cells}
        suffix = "-synthetic" if synthetic else ""
        drawn = {
            "speedup": plot.speedup(cells, name=f"speedup{suffix}"),
            "acceptance-length": plot.acceptance_length(cells, name=f"acceptance-length{suffix}"),
            "acceptance-at": plot.acceptance_at(cells, name=f"acceptance-at{suffix}"),
            "verify-cost": plot.verify_cost(costs, name=f"verify-cost{suffix}"),
            "quality": plot.quality(qualities, name=f"quality{suffix}"),
            "stage-shares": plot.stage_shares(cells, name=f"stage-shares{suffix}"),
        }
        figures = [
            Figure(name=name + suffix, title=CAPTIONS[name][0], caption=CAPTIONS[name][1], svg=svg)
            for name, svg in drawn.items()
            if svg
        ]
        title, note = ("Synthetic", "synthetic") if synthetic else ("Measured", "")
        parts.append(
            Section(
                title=title,
                note=note,
                rows=cells,
                costs=costs,
                qualities=qualities,
                categories=[r for r in report.categories if r.cell in names],
                figures=figures,
            )
        )
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
        _write_csv(folder / "quality.csv", report.qualities)
        _write_csv(folder / "categories.csv", report.categories)
        _write_csv(folder / "stages.csv", report.stages)
    if "svg" in formats:
        for figure in (f for part in parts for f in part.figures):
            text = canvas.standalone(figure.svg)
            (folder / f"{figure.name}.svg").write_text(text, encoding="utf-8")
    for name, kind in (("report.md", "md"), ("index.html", "html")):
        if kind in formats:
            text = page.render(f"report.{kind}.j2", report.campaign, parts, report.confidence)
            (folder / name).write_text(text, encoding="utf-8")


def main() -> int:
    """Report on a campaign as the command line asks; give the exit code."""
    told, codes = [], []

    @hydra.main(config_path=str(ROOT / "conf"), config_name="report", version_base="1.3")
    def door(config: DictConfig) -> None:
        try:
            told.append(_report(config))
            codes.append(0)
        except (ValueError, OSError) as error:
            problem = unusable(error) if isinstance(error, OSError) else error
            sys.stderr.write(f"error: {problem}\n")
            codes.append(2)

    door()
    sys.stdout.writelines(told)  # not inside: Hydra would show a traceback of a closed pipe
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
    told = [terminal.cell_table(report.cells), terminal.quality_table(report.qualities)]
    return "\n".join([*filter(None, told), f"{shown}\n"])


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
