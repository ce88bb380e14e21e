"""Measure forwards and whole rounds of Llama-3 shapes on one GPU, over random weights.

    python -m scripts.h200 results/h200            # every case below
    python -m scripts.h200 results/h200 8b.w4a16   # some of them

Each case is a call of `specquant cost` or `specquant run`, in a process of its own: what fails is
told and leaves the others. What the doors recorded is then put into two tables beside the records:

    forward.csv  one forward of n tokens after a context, as decoding runs it
    rounds.csv   whole rounds under a replayed acceptance, by the stages of a step

Kernels alone are timed by `specquant kernels`.
"""

import csv
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import torch

from bench import metrics
from bench.kernel_timing import copy_tb_per_s
from bench.record import VANILLA, Cost, Generation
from bench.results import CellResult, load

WIDTHS = "1,4,8,16,24,32,48,60,64"
COST = ["cost", "method=vanilla", f"cost.widths=[{WIDTHS}]", "cost.contexts=[512]", "context=1024"]
RUN = ["run", "context=1024", "task.limit=3"]
DRAFT = ["method.draft_scheme=w4a16", "method.draft_lm_head=w4a16"]
EAGLE_8B = [*RUN, "model=llama3_8b", "method=eagle2", "accept=eagle2_llama3_8b"]
EAGLE_70B = [*RUN, "model=llama3_70b", "method=eagle2", "method.nodes=48", *DRAFT]
CASES: dict[str, list[str]] = {
    "8b.dense": [*COST, "model=llama3_8b", "quant=dense"],
    "8b.w4a16": [*COST, "model=llama3_8b", "quant=w4a16"],
    "8b.w8a8": [*COST, "model=llama3_8b", "quant=w8a8"],
    "8b.w4a16.exact": [*COST, "model=llama3_8b", "quant=w4a16", "exact=true"],
    "8b.w8a8.exact": [*COST, "model=llama3_8b", "quant=w8a8", "exact=true"],
    "70b.w4a16": [*COST, "model=llama3_70b", "quant=w4a16"],
    "70b.w8a8": [*COST, "model=llama3_70b", "quant=w8a8"],
    "70b.w4a16.exact": [*COST, "model=llama3_70b", "quant=w4a16", "exact=true"],
    "70b.w8a8.exact": [*COST, "model=llama3_70b", "quant=w8a8", "exact=true"],
    "70b.dense": [*COST, "model=llama3_70b", "quant=dense"],
    "8b.dense.eagle2": [*EAGLE_8B, "quant=dense"],
    "8b.w4a16.eagle2": [*EAGLE_8B, "quant=w4a16", *DRAFT],
    "70b.w4a16.eagle2": [*EAGLE_70B, "quant=w4a16", "accept=eagle2_llama3_70b"],
    "70b.w4a16.hierarchical": [
        *RUN,
        "model=llama3_70b",
        "quant=w4a16",
        "method=hierarchical",
        "accept=hierarchical_llama3_70b",
        *DRAFT,
    ],
}
COPIES = 15
FORWARD = (
    *("model", "scheme", "lm_head", "kernel", "n", "context", "median_ms", "min_ms", "max_ms"),
    *("repeats", "weight_bytes", "copy_tb_per_s", "share_of_limit", "host_gap_share", "device"),
    *("exact", "price_of_exact"),  # over the same read where layers need not be
)
ROUNDS = (
    *("model", "scheme", "draft_scheme", "method", "acceptance", "prompts", "tokens", "steps"),
    *("tau", "tokens_per_s", "speedup", "host_ms", "draft_ms", "verify_ms", "commit_ms"),
    *("draft_prefill_ms", "host_gap_share", "device"),
)


def main() -> int:
    """Run the cases that are named, or all; then write the tables of all that is recorded."""
    if len(sys.argv) < 2:
        sys.stderr.write(f"usage: python -m scripts.h200 <folder> [{' | '.join(CASES)}]\n")
        return 2
    out, *names = sys.argv[1:]
    unknown = set(names) - CASES.keys()
    if unknown:
        sys.stderr.write(f"error: a case must be one of {', '.join(CASES)}, got {unknown}\n")
        return 2
    failed = [name for name in names or CASES if not _ran(CASES[name], Path(out))]
    device = torch.device("cuda")
    write_tables(Path(out), copy_rate=copy_tb_per_s(device, repeats=COPIES))
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


def write_tables(out: Path, *, copy_rate: float) -> None:
    """Turn the records below `out` into forward.csv and rounds.csv."""
    campaign = load(out / "records")
    cells = [cell for cell in campaign.cells if cell.done]
    forwards = [row for cell in cells for row in _forwards(cell, cells, copy_rate)]
    rounds = [_rounds(cell, cells) for cell in cells if cell.generations]
    _write(out / "forward.csv", FORWARD, forwards)
    _write(out / "rounds.csv", ROUNDS, rounds)


def _ran(arguments: list[str], out: Path) -> bool:
    common = [
        *("task=random", "device=cuda", "dtype=float16"),
        *(f"results_dir={out}", "campaign=records"),
    ]
    done = subprocess.run([sys.executable, "-m", "bench.cli", *arguments, *common], check=False)
    return done.returncode == 0


def _forwards(
    cell: CellResult, cells: list[CellResult], copy_rate: float
) -> Iterable[tuple[object, ...]]:
    """Rows of one target's costs."""
    beside = _plain(cells, cell.same_target)
    gap = metrics.host_gap_share(beside) if beside else None
    kernel = "+".join(sorted(set(cell.context.get("kernels", {}).values())))
    for cost in cell.costs:
        if cost.what != "verify":
            continue
        times = sorted(1e3 * s for s in cost.repeat_s)
        median = statistics.median(times)
        limit = cost.weight_bytes / copy_rate / 1e9
        yield (
            *(cell.cell.model, cell.cell.scheme, cell.cell.lm_head, kernel, cost.n, cost.context),
            *(f"{median:.4f}", f"{times[0]:.4f}", f"{times[-1]:.4f}", len(times)),
            *(cost.weight_bytes, f"{copy_rate:.3f}", f"{limit / median:.3f}"),
            *("" if gap is None or cost.n > 1 else f"{gap:.4f}", cell.device_name),
            *(cell.cell.exact, _price(cell, cost, cells)),
        )


def _price(cell: CellResult, cost: Cost, cells: list[CellResult]) -> str:
    """What an exact read takes over the same one of the same target as it comes."""
    as_it_comes = replace(cell, cell=replace(cell.cell, exact=False))
    plain = [
        statistics.median(other.repeat_s)
        for c in cells
        if cell.cell.exact and c.same_target(as_it_comes)
        for other in c.costs
        if (other.what, other.n, other.context) == (cost.what, cost.n, cost.context)
    ]
    return f"{statistics.median(cost.repeat_s) / plain[0]:.3f}" if plain else ""


def _rounds(cell: CellResult, cells: list[CellResult]) -> tuple[object, ...]:
    """The row of one arm."""
    done = metrics.finished(cell.generations)
    steps = metrics.num_steps(done)
    rate = metrics.tokens_per_second(done) or 0.0
    beside = _plain(cells, cell.comparable)
    base = metrics.tokens_per_second(beside) if beside else None
    tau, gap = metrics.acceptance_length(done), metrics.host_gap_share(done)
    stages = [
        1e3 * metrics.seconds(done, [s]) / steps for s in ("host", "draft", "verify", "commit")
    ]
    return (
        *(cell.cell.model, cell.cell.scheme, cell.cell.draft_scheme, cell.cell.method),
        *(cell.cell.acceptance, len(done), metrics.num_tokens(done), steps),
        *(f"{tau:.3f}", f"{rate:.2f}", f"{rate / base:.3f}" if base else ""),
        *(f"{ms:.4f}" for ms in stages),
        *(f"{1e3 * metrics.seconds(done, ['draft_prefill']) / len(done):.3f}", f"{gap:.4f}"),
        cell.device_name,
    )


def _plain(cells: list[CellResult], fits: Callable[[CellResult], bool]) -> list[Generation]:
    """Plain decoding's answers, of the first cell that fits; empty where none does."""
    plain = (c for c in cells if c.generations and c.cell.method == VANILLA and fits(c))
    return next((metrics.finished(c.generations) for c in plain), [])


def _write(path: Path, head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
