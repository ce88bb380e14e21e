"""What a reader must know before the numbers: where they come from, and how far they carry."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from bench.record import VANILLA
from bench.results import Campaign
from bench.rows import CellRow, is_dense

FEW_PROMPTS = 20  # or windows; below this a percentile interval is itself a rough guess


def warnings(campaign: Campaign, rows: Sequence[CellRow]) -> list[str]:
    """What a reader must know before the numbers."""
    said = []
    if any(c.cell.device.startswith("cpu") for c in campaign.cells):
        said.append("CPU timings show that the instrument works, not what a GPU would do.")
    if any(not c.cell.scheme.startswith("dense") for c in campaign.cells):
        said.append(
            "Quantised products are computed by the reference arithmetic in plain torch: times and "
            "speed-ups describe that reference, not what a format allows."
        )
    if any(c.cell.weights == "random" for c in campaign.cells):
        said.append("Weights are random in some cells: costs are real there, tokens mean nothing.")
    if foreign := {c.cell.folder or c.cell.model for c in campaign.cells if c.cell.foreign}:
        said.append(
            "Called lab weights, but neither below models/lab nor recorded as quantised from "
            f"there: {', '.join(sorted(foreign))}."
        )
    replayed = {c.cell.acceptance for c in campaign.cells} - {"measured"}
    if replayed:
        said.append(
            f"Acceptance is not measured but {', '.join(sorted(replayed))} where it is named so: "
            "such speed-ups are what these costs would give at that acceptance."
        )
    said += [
        f"Cells differ in {name}: "
        + ", ".join(f"{shortened(v)} ({_count(n, 'cell')})" for v, n in seen.most_common())
        for name, seen in provenance(campaign).items()
        if len(seen) > 1 and name != "uncommitted changes"
    ]
    if dirty := provenance(campaign)["uncommitted changes"]["yes"]:
        said.append(f"{_count(dirty, 'cell')} measured on a tree with uncommitted changes.")
    if few := [r for r in rows if r.status == "done" and r.num_prompts < FEW_PROMPTS]:
        told = f"{_count(len(few), 'cell')} with fewer than {FEW_PROMPTS} prompts"
        said.append(f"{told}: their intervals are rough themselves.")
    short = [c for c in campaign.qualities if c.done and len(c.qualities) < FEW_PROMPTS]
    if short:
        told = f"{_count(len(short), 'cell')} of quality with fewer than {FEW_PROMPTS} windows"
        said.append(f"{told}: their intervals are rough themselves.")
    places = Counter((r.group, r.target, r.arm) for r in rows)
    if twice := [r.cell for r in rows if places[r.group, r.target, r.arm] > 1]:
        said.append(f"Cells of the same labels, the first is in the matrix: {', '.join(twice)}.")
    said += [*_mixed(campaign), *_believed(campaign), *_apart(campaign), *_unpredicted(rows)]
    if campaign.stray:
        said.append(f"Folders with results but no cell.json: {', '.join(campaign.stray)}.")
    return said


def provenance(campaign: Campaign) -> dict[str, Counter[str]]:
    """Count cells per value of each thing that should not differ within a comparison."""
    seen: dict[str, Counter[str]] = {}
    for result in campaign.cells:
        c = result.context
        packages = ", ".join(f"{k} {v}" for k, v in sorted((c.get("packages") or {}).items()))
        dirty = {True: "yes", False: "no"}.get(c.get("dirty", "unknown"))
        values = {
            "host": c.get("hostname"),
            "device": result.device_name if c else None,
            "threads": c.get("threads"),
            "commit": c.get("commit"),
            "uncommitted changes": dirty,
            "diff": ((c.get("dirty") and c.get("diff_sha256")) or "none") if c else None,
            "python": c.get("python"),
            "packages": packages,
        }
        for name, value in values.items():
            seen.setdefault(name, Counter())[str(value or "unknown")] += 1
    return seen


def _mixed(campaign: Campaign) -> Iterator[str]:
    """Targets of one label whose weights differ: two checkpoints, or one that was written anew."""
    seen: dict[tuple[str, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for result in campaign.cells:
        c = result.cell
        if result.done and c.target_hash:
            label = (c.model, c.weights, c.folder, c.scheme if c.stored else "")
            seen[label][c.target_hash].append(result.name)
    for found in (cells for cells in seen.values() if len(cells) > 1):
        told = "; ".join(f"{shortened(key)}: {', '.join(found[key])}" for key in sorted(found))
        yield f"Targets of one label have different weights, and are not compared: {told}."


def _believed(campaign: Campaign) -> Iterator[str]:
    """Folders of quantised layers, which do not tell what they were made from."""
    dense = {(c.cell.model, c.cell.weights) for c in campaign.cells if is_dense(c.cell.scheme)}
    stored = {
        c.cell.folder or c.cell.scheme
        for c in campaign.cells
        if c.done and c.cell.stored and (c.cell.model, c.cell.weights) in dense
    }
    if stored:
        yield (
            "Held against the dense cells of the model, of which nothing tells whether they were "
            f"quantised from it: {', '.join(sorted(stored))}."
        )


def _apart(campaign: Campaign) -> Iterator[str]:
    """Arms whose vanilla was timed by another process, so that a drift does not cancel."""
    told = []
    for result in campaign.runs:
        vanilla = None if result.cell.method == VANILLA else campaign.vanilla_of(result)
        if vanilla is None or not result.done:
            continue
        theirs = {(g.prompt_id, g.turn): g.run for g in vanilla.generations if g.run}
        pairs = [(g.run, theirs.get((g.prompt_id, g.turn))) for g in result.generations if g.run]
        runs = [mine != other for mine, other in pairs if other is not None]
        if any(runs):
            told.append(f"{result.name} ({sum(runs)} of {_count(len(runs), 'turn')})")
    if told:
        yield (
            "Timed in another run than their vanilla, so that a drift of the machine is in the "
            f"ratio; remove both folders to time them side by side: {', '.join(told)}."
        )


def _unpredicted(rows: Sequence[CellRow]) -> Iterator[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.unpredicted:
            reasons[row.unpredicted].append(row.cell)
    for reason, cells in reasons.items():
        yield f"No predicted speed-up, {reason}: {', '.join(cells)}."


def shortened(value: str) -> str:
    """Shorten a hash; leave anything else."""
    hexadecimal = len(value) >= 40 and set(value) <= set("0123456789abcdef")
    return value[:10] if hexadecimal else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
