"""What lies in a campaign's folder: cells read back as typed records, nothing passed over silently.

    campaign = load(Path("results/demo"))

A cell that never ended is `unfinished`; one that failed keeps its reason; a record of another
schema is refused by the name of its file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from bench import record as files
from bench.record import (
    COST,
    DOORS,
    QUALITY,
    RUN,
    VANILLA,
    Cell,
    Cost,
    Generation,
    Quality,
    Record,
    Status,
    read_lines,
)
from bench.rows import is_dense, is_synthetic
from methods.values import read_json

UNFINISHED = "unfinished"
REPORT = "report"  # the folder of a campaign that a report is written to

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class CellResult:
    """A cell as its folder has it. One list of records is filled, the door's."""

    name: str  # of its folder, relative to the campaign
    cell: Cell
    status: Status
    context: dict[str, Any]
    generations: list[Generation]
    costs: list[Cost]
    qualities: list[Quality]

    @property
    def done(self) -> bool:
        """Only whole cells are turned into numbers."""
        return self.status.state == "done"

    @property
    def synthetic(self) -> bool:
        """Random weights or replayed acceptance: costs are real, tokens mean nothing."""
        return is_synthetic(weights=self.cell.weights, acceptance=self.cell.acceptance)

    @property
    def tokens_matter(self) -> bool:
        """Whether the tokens are the model's own and not a profile's."""
        return self.cell.acceptance == "measured"

    @property
    def device_name(self) -> str:
        """The device as the driver calls it, such as `NVIDIA H200`; the label where unknown."""
        return str(self.context.get("device", {}).get("name") or self.cell.device)

    @property
    def target(self) -> tuple[str, ...]:
        """What two cells must share for their costs to be of the same target on one device."""
        c = self.cell
        labels = (c.model, c.weights, c.scheme, c.lm_head, c.folder)
        return (*labels, c.device, c.dtype, f"exact={c.exact}", self.device_name)

    @property
    def tie_threshold_nats(self) -> float | None:
        """How near a tie excuses a difference; None where all operations are exact: none does."""
        return None if self.cell.exact else self.cell.tie_threshold_nats

    def same_target(self, other: "CellResult") -> bool:
        """Whether both have measured one target on one device, by labels and by weights."""
        return self.target == other.target and self.same_weights(other)

    def same_weights(self, other: "CellResult") -> bool:
        """Whether both have read the same folder; older records do not tell, and are believed."""
        mine, theirs = self.cell.target_hash, other.cell.target_hash
        return mine == theirs or not (mine and theirs)

    def comparable(self, other: "CellResult") -> bool:
        """Whether a ratio of the two, a method and its baseline, means something."""
        mine, theirs = ((c.task, c.temperature, c.block) for c in (self.cell, other.cell))
        return mine == theirs and self.same_target(other)

    def quantises(self, dense: "CellResult") -> bool:
        """Whether this may be a dense cell's target in another scheme.

        Nothing tells what a folder of quantised layers was made from; that one is believed.
        """
        unquantised = is_dense(dense.cell.scheme)
        return unquantised and (self.cell.stored or self.same_weights(dense))


@dataclass(frozen=True)
class Campaign:
    """All cells below a campaign's folder. stray: folders with results that are no cell."""

    name: str
    folder: Path
    cells: list[CellResult]
    stray: list[str]

    @cached_property
    def runs(self) -> list[CellResult]:
        """Cells of generations, dense first, vanilla first."""
        return self._of(RUN)

    @cached_property
    def costs(self) -> list[CellResult]:
        """Cells of cost measurements."""
        return self._of(COST)

    @cached_property
    def qualities(self) -> list[CellResult]:
        """Cells of quality measurements."""
        return self._of(QUALITY)

    def _of(self, door: str) -> list[CellResult]:
        return sorted((c for c in self.cells if c.cell.door == door), key=_place)

    def vanilla_of(self, result: CellResult) -> CellResult | None:
        """Give the whole vanilla cell of the same target, task, device and temperature."""
        found = [
            c for c in self.runs if c.cell.method == VANILLA and c.done and c.comparable(result)
        ]
        if len(found) > 1:
            names = " and ".join(c.name for c in found)
            raise ValueError(f"{self.folder}: a baseline must be unique, got {names}")
        return found[0] if found else None

    def dense_of(self, result: CellResult) -> CellResult | None:
        """Give the whole cell of the same method and everything else on unquantised weights."""
        found = [c for c in self.runs if c.done and result.quantises(c) and _arm(c) == _arm(result)]
        # A quantised lm_head has a counterpart of its own only where somebody measured one.
        same_head = [c for c in found if c.cell.lm_head == result.cell.lm_head]
        dense_head = [c for c in found if is_dense(c.cell.lm_head)]
        return next(iter(same_head or dense_head), None)

    def costs_of(self, result: CellResult) -> tuple[list[Cost], list[Cost]]:
        """Give the costs of verifying on this target, and of this cell's drafter beside it."""
        same = [c for c in self.costs if c.done and c.same_target(result)]
        verify = [r for c in same for r in c.costs if r.what == "verify"]
        drafter = (result.cell.method, result.cell.draft_scheme, result.cell.acceptance)
        draft = [
            r
            for c in same
            if (c.cell.method, c.cell.draft_scheme, c.cell.acceptance) == drafter
            for r in c.costs
            if r.what == "draft"
        ]
        return verify, draft


def load(folder: Path) -> Campaign:
    """Read every cell below a campaign's folder.

    Raises ValueError where there is no folder, no cell, a broken file or another schema.
    """
    if not folder.is_dir():
        raise ValueError(f"a campaign must be a folder, got {folder}")
    inside = [d for d in sorted(folder.rglob("*")) if d.is_dir() and not _is_report(d, folder)]
    cells = [_read_cell(d, folder) for d in inside if (d / files.CELL).exists()]
    stray = [
        str(d.relative_to(folder))
        for d in inside
        if not (d / files.CELL).exists()
        and any((d / name).exists() for name in (files.STATUS, files.RECORDS, files.CONFIG))
    ]
    if not cells:
        seen = f" (folders without cell.json: {', '.join(stray)})" if stray else ""
        raise ValueError(f"a campaign must hold at least one cell, got none in {folder}{seen}")
    return Campaign(name=folder.resolve().name, folder=folder, cells=cells, stray=stray)


def _read_cell(folder: Path, root: Path) -> CellResult:
    cell = _parse(Cell, folder / files.CELL)
    if cell.door not in DOORS:
        known = ", ".join(DOORS)
        raise ValueError(f"{folder / files.CELL}: door must be one of {known}, got {cell.door!r}")
    ended = (folder / files.STATUS).exists()
    status = _parse(Status, folder / files.STATUS) if ended else Status(state=UNFINISHED)
    # A killed writer leaves half a line; a cell that says it is done has no excuse for one.
    torn = status.state != "done"
    records = folder / files.RECORDS
    return CellResult(
        name=str(folder.relative_to(root)),
        cell=cell,
        status=status,
        context=_read_context(folder / files.CONTEXT),
        generations=_read_records(Generation, records, of=cell.door == RUN, torn_tail=torn),
        costs=_read_records(Cost, records, of=cell.door == COST, torn_tail=torn),
        qualities=_read_records(Quality, records, of=cell.door == QUALITY, torn_tail=torn),
    )


def _parse(kind: type[R], path: Path) -> R:
    values = read_json(path)
    try:
        return kind.parse(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_records(kind: type[R], path: Path, *, of: bool, torn_tail: bool) -> list[R]:
    """of: whether the cell's door writes records of this kind."""
    return list(_parse_lines(kind, path, torn_tail=torn_tail)) if of and path.exists() else []


def _parse_lines(kind: type[R], path: Path, *, torn_tail: bool) -> Iterator[R]:
    for number, values in enumerate(read_lines(path, torn_tail=torn_tail), start=1):
        if not isinstance(values, dict):
            raise ValueError(f"{path}: record {number} must be an object, got {values!r}")
        try:
            yield kind.parse(values)
        except ValueError as error:
            raise ValueError(f"{path}: record {number}: {error}") from error


def _read_context(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    context = read_json(path)
    if context.get("schema") != files.SCHEMA:
        raise ValueError(f"{path}: schema must be {files.SCHEMA}, got {context.get('schema')!r}")
    return context


def _is_report(folder: Path, root: Path) -> bool:
    return folder.relative_to(root).parts[0] == REPORT


def _arm(result: CellResult) -> tuple[object, ...]:
    c = result.cell
    return (
        (c.model, c.weights, c.task, c.device, result.device_name, c.dtype, c.exact, c.temperature),
        (c.method, c.draft_scheme, c.acceptance),
    )


def _place(result: CellResult) -> tuple[object, ...]:
    c = result.cell
    return (
        result.synthetic,
        (c.model, c.weights, c.task, c.device, c.dtype, c.exact, c.temperature),
        (not is_dense(c.scheme), c.scheme, c.lm_head, c.folder),
        (c.method != VANILLA, c.method, c.draft_scheme, c.acceptance),
        result.name,
    )
