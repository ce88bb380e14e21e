"""What a person reads: the page and its Markdown.

Everything said here is computed from the rows; an interval that contains 1 is never called a
speed-up. Measured cells and synthetic ones (random weights, replayed acceptance) stand apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import jinja2

from bench.caveats import provenance, shortened, warnings
from bench.record import VANILLA
from bench.results import Campaign
from bench.rows import CategoryRow, CellRow, CostRow, QualityRow

TEMPLATES = Path(__file__).parent / "templates"
EFFECTS = {
    "faster": "faster",
    "slower": "slower",
    "same": "no measurable difference",
    "unknown": "no interval from a single prompt",
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A drawn figure and what it shows."""

    name: str
    title: str
    caption: str
    svg: str

    def _repr_html_(self) -> str:
        return self.svg  # a notebook shows the last value of a cell by this


@dataclass(frozen=True, kw_only=True)
class Section:
    """The measured cells of a campaign, or its synthetic ones; never both."""

    title: str
    note: str  # label of every synthetic row; empty for measured ones
    rows: list[CellRow]
    costs: list[CostRow]
    qualities: list[QualityRow]
    categories: list[CategoryRow]
    figures: list[Figure]

    @property
    def groups(self) -> list["Group"]:
        """Give one matrix per model, task and device."""
        keys = dict.fromkeys(r.group for r in self.rows)
        parts = [[r for r in self.rows if r.group == key] for key in keys]
        return [
            Group(rows=part, qualities=self.qualities, categories=self.categories) for part in parts
        ]

    def figure(self, name: str) -> Figure:
        """Give a figure by its name, such as `speedup`."""
        drawn = {f.name: f for f in self.figures}
        if name not in drawn:
            raise ValueError(f"figure must be among {list(drawn)}, got {name}")
        return drawn[name]

    @property
    def predictions(self) -> list[CellRow]:
        """Cells where the cost model can be held to a measurement."""
        return [r for r in self.rows if r.predicted_speedup and r.speedup_decode]

    @property
    def held(self) -> bool:
        """Whether any prediction stands beside what a token takes in joules."""
        return any(r.joules_per_token is not None for r in self.predictions)

    @property
    def compatibilities(self) -> list[CellRow]:
        """Cells on quantised weights whose dense counterpart was measured."""
        return [r for r in self.rows if r.compatibility is not None]

    @property
    def acceptances(self) -> list[CellRow]:
        """Cells on quantised weights whose tau can be held against dense's."""
        return [r for r in self.rows if r.acceptance_change is not None]

    @property
    def accuracies(self) -> list[CellRow]:
        """Cells whose answers were scored."""
        return [r for r in self.rows if r.accuracy is not None]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that differ in scheme and method only: one matrix.

    qualities, categories: of the whole section, from which a matrix takes its own.
    """

    rows: list[CellRow]
    qualities: list[QualityRow] = field(default_factory=list)
    categories: list[CategoryRow] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Model and task."""
        return f"{self.rows[0].model} on {self.rows[0].task}"

    @property
    def facts(self) -> str:
        """Under which conditions."""
        r = self.rows[0]
        decoding = "greedy" if r.temperature == 0 else f"temperature {r.temperature:g}"
        prompts = max(row.num_prompts for row in self.rows)
        dtype = f"{r.dtype}, exact" if r.exact else r.dtype
        return f"{r.weights} weights, {r.device}, {dtype}, {decoding}, up to {prompts} prompts"

    @property
    def targets(self) -> list[str]:
        """Rows of the matrix."""
        return list(dict.fromkeys(r.target for r in self.rows))

    @property
    def arms(self) -> list[str]:
        """Columns of the matrix; vanilla is the row's own baseline."""
        return list(dict.fromkeys(r.arm for r in self.rows if r.method != VANILLA))

    def at(self, target: str, arm: str) -> CellRow | None:
        """Give the cell of a row and column."""
        return next((r for r in self.rows if (r.target, r.arm) == (target, arm)), None)

    @property
    def prices(self) -> list[QualityRow]:
        """What the matrix's targets cost in quality; on whatever device, in the same dtype."""
        first = self.rows[0]
        same = (first.model, first.weights, first.dtype)
        return [
            r
            for r in self.qualities
            if r.perplexity is not None and (r.model, r.weights, r.dtype) == same
        ]

    @property
    def texts(self) -> list[str]:
        """Texts that the targets' perplexity was measured on."""
        return list(dict.fromkeys(r.task for r in self.prices))

    def price(self, target: str, text: str) -> QualityRow | None:
        """Give what a row of the matrix costs on a text."""
        return next((r for r in self.prices if (r.target, r.task) == (target, text)), None)

    @property
    def kinds(self) -> list[str]:
        """Categories of the prompts, where there is more than one."""
        own = {r.cell for r in self.rows}
        names = dict.fromkeys(r.category for r in self.categories if r.cell in own)
        return list(names) if len(names) > 1 else []

    def part(self, row: CellRow, category: str) -> CategoryRow | None:
        """Give one category of a cell."""
        found = (r for r in self.categories if (r.cell, r.category) == (row.cell, category))
        return next(found, None)

    def verdict(self, target: str) -> str:
        """Say whether the methods of a row gave vanilla's tokens."""
        rows = [r for r in self.rows if r.target == target and r.num_ties is not None]
        different = [r.arm for r in rows if r.lossless == "DIFFERENT"]
        if different:
            return f"DIFFERENT: {', '.join(different)}"
        ties = sum(r.num_ties or 0 for r in rows)
        turns = sum(r.num_paired or 0 for r in rows)
        if not rows:
            return "-"
        return f"ties: {ties} of {turns} turns" if ties else "exact"

    @property
    def answer(self) -> str:
        """Say in one paragraph what the matrix says."""
        parts = [_best(t, [r for r in self.rows if r.target == t]) for t in self.targets]
        rates = [r for r in self.rows if r.tokens_per_s is not None]
        if rates:
            top = max(rates, key=lambda r: r.tokens_per_s or 0)
            parts.append(
                f"The highest rate is {top.tokens_per_s:.1f} tok/s: {top.target} with {top.arm}"
            )
        return ". ".join(p[0].upper() + p[1:] for p in parts) + "."


def effect(row: CellRow) -> str:
    """Say what an interval allows: faster, slower, same (it contains 1), or unknown."""
    if row.speedup_low is None or row.speedup_high is None:
        return "unknown"
    if row.speedup_low > 1:
        return "faster"
    return "slower" if row.speedup_high < 1 else "same"


def dates(campaign: Campaign) -> str:
    """First and last start of a cell."""
    started = sorted(str(c.context["started"]) for c in campaign.cells if "started" in c.context)
    ends = [time[:16].replace("T", " ") for time in (*started[:1], *started[-1:])]
    return " to ".join(dict.fromkeys(ends)) or "unknown date"


def render(
    template: str, campaign: Campaign, sections: Sequence[Section], confidence: float
) -> str:
    """Fill templates/report.html.j2 or templates/report.md.j2."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=template.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["num"] = number
    environment.filters["effect"] = effect
    rows = [r for section in sections for r in section.rows]
    return environment.get_template(template).render(
        campaign=campaign,
        confidence=confidence,
        sections=[s for s in sections if s.rows or s.costs or s.qualities],
        warnings=warnings(campaign, rows),
        provenance={
            k: [(shortened(v), n) for v, n in c.items()] for k, c in provenance(campaign).items()
        },
        dates=dates(campaign),
        failures=[c for c in campaign.cells if not c.done],
        columns=[f.name for f in fields(CellRow)],
        cost_columns=[f.name for f in fields(CostRow)],
    )


def number(value: object) -> str:
    """Write a value as a table shows it: nothing for None, three or four digits for a float."""
    if value is None or value == ():
        return ""
    if isinstance(value, tuple):
        return " ".join(number(v) for v in value)
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.01 <= abs(value) < 100:
        return f"{value:.3f}" if abs(value) < 10 else f"{value:.2f}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3g}"


def _best(target: str, rows: Sequence[CellRow]) -> str:
    """Say what the methods did on one scheme."""
    arms = [r for r in rows if r.method != VANILLA and r.speedup is not None]
    if not arms:
        return f"on {target} no method was compared with vanilla"
    faster = [r for r in arms if effect(r) == "faster"]
    if not faster:
        told = ", ".join(f"{_told(r)} {EFFECTS[effect(r)]}" for r in arms)
        return f"on {target} no method is measurably faster than vanilla: {told}"
    best = max(faster, key=lambda r: r.speedup or 0)
    rest = [r for r in arms if r is not best and (r.speedup_high or 0) >= (best.speedup_low or 0)]
    beside = (
        f", its interval overlaps those of {' and '.join(_told(r) for r in rest)}" if rest else ""
    )
    return f"on {target} the best method is {_told(best)}{beside}"


def _told(row: CellRow) -> str:
    bounds = f" ({row.speedup_low:.2f}-{row.speedup_high:.2f})" if row.speedup_low else ""
    wrong = " [tokens DIFFER from vanilla's]" if row.lossless == "DIFFERENT" else ""
    return f"{row.arm} {row.speedup:.2f}x{bounds}{wrong}"
