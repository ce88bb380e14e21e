"""What a reader must know before the numbers: where they come from, and how far they carry."""

from collections import Counter
from collections.abc import Sequence

from bench.results import Campaign
from bench.rows import CellRow

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


def shortened(value: str) -> str:
    """Shorten a hash; leave anything else."""
    hexadecimal = len(value) >= 40 and set(value) <= set("0123456789abcdef")
    return value[:10] if hexadecimal else value


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
