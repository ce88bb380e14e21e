"""What schemes of the draft path and a cut draft vocabulary lose in acceptance and gain in time.

    python -m scripts.draft_path tau results/draft_path             # the lab family, on a CPU
    python -m scripts.draft_path time results/draft_path 8b 70b     # Llama-3's shapes, on a GPU

Words with `=` are overrides of every cell. A target is loaded once, and its variants are decoded,
or timed, in one process. Records go to <folder>/records; the same command goes on from there.

    tau.csv    tokens per step of every variant, and how far from the plain drafter's, paired
    steps.csv  tokens/steps of every prompt, before the cut at the limit: what tau is made of
    time.csv   one proposal: its milliseconds and bytes; beside it the target's T_1 and T_v
"""

import csv
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_dir

from bench import metrics, stats
from bench.build import ROOT
from bench.choice import GROUPS
from bench.door import OK, execute
from bench.draft_vocab import read_ranking
from bench.plan import Planner
from bench.record import COST, RUN, VANILLA, Cost
from bench.results import CellResult, load
from bench.stats import Bootstrap

Variant = tuple[str, str | None, int | None]  # draft_scheme, draft_lm_head, draft_vocab_size

LIST = "models/lab/draft_vocab.json"
ALL = "all"
PLAIN: Variant = ("dense", None, None)
PAIRS = (("dense", None), ("w8a8", "w8a8"), ("w4a16", "w4a16"))
PARTS: tuple[Variant, ...] = (
    *(("w8a8", None, None), ("w4a16", None, None)),
    *(("dense", "w8a8", None), ("dense", "w4a16", None)),
)
SIZES = (None, 1024, 512, 256)  # of the lab's 2,048
GREEDY: list[Variant] = [(*pair, size) for size in SIZES for pair in PAIRS] + [*PARTS]
SAMPLED: list[Variant] = [(*pair, size) for size in SIZES for pair in (PAIRS[0], PAIRS[2])]
TEXT = ["model=lab", "task=lab", "task.max_new_tokens=64", "threads=1", "device=cpu"]
TIMED: dict[str, list[Variant]] = {
    "8b": [(*pair, size) for size in (None, 32768) for pair in PAIRS] + [("w4a16", "w4a16", 8192)],
    "70b": [
        *(PLAIN, ("dense", None, 32768), ("w8a8", "w8a8", None)),
        *(("w4a16", "w4a16", size) for size in (None, 32768, 8192)),
    ],
}
SHAPES = {
    "8b": ["model=llama3_8b", "cost.widths=[1,60]"],
    "70b": ["model=llama3_70b", "method.nodes=48", "cost.widths=[1,48]"],
}
TIMING = [
    *("quant=w4a16", "task=random", "device=cuda", "dtype=float16", "context=1024"),
    *("cost.contexts=[512]", "cost.repeats=15"),
]
BOOTSTRAP = Bootstrap(samples=2000, confidence=0.95, seed=0)
WORDS = ("model", "target", "temperature", "draft_scheme", "draft_lm_head", "draft_vocab")
TAU = (
    *(*WORDS, "prompts", "tokens", "steps", "tau", "tau_low", "tau_high"),
    *("change", "change_low", "change_high", "in_list", "same_tokens", "verdict"),
)
TIME = (
    *(*WORDS, "nodes", "forwards", "context", "median_ms", "min_ms", "max_ms", "repeats"),
    *("weight_bytes", "t1_ms", "tv_ms", "device"),
)


@dataclass(frozen=True, kw_only=True)
class Cells:
    """Variants of one target. door: run or cost. words: overrides that all of them share."""

    door: str
    words: list[str]
    variants: Sequence[Variant]

    def run(self, out: Path, more: Sequence[str]) -> bool:
        """Run what is not finished, and plain decoding beside it; tell whether all ended well."""
        module = "bench.cost_cell" if self.door == COST else "bench.cell"
        planner = Planner(module)
        for scheme, lm_head, size in self.variants:
            own = [f"method.draft_scheme={scheme}"]
            own += [] if lm_head is None else [f"method.draft_lm_head={lm_head}"]
            own += [] if size is None else [*self._listed(), f"method.draft_vocab_size={size}"]
            self._add(planner, ["method=eagle2", *own, *self.words, *more], out)
        return execute(planner, module=module) == OK

    def _listed(self) -> list[str]:
        """The lab's list; random weights need none."""
        return [] if self.door == COST else [f"method.draft_vocab={LIST}"]

    def _add(self, planner: Planner, words: list[str], out: Path) -> None:
        places = [f"results_dir={out}", "campaign=records"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            config = compose(self.door, overrides=[*words, *places])
        names = dict(word.split("=", 1) for word in words if word.partition("=")[0] in GROUPS)
        planner.add(config, names=names, overrides=words)


def main() -> int:
    """Run what the command line asks for, and write its tables."""
    more = [word for word in sys.argv[1:] if "=" in word]
    names = [word for word in sys.argv[1:] if "=" not in word]
    if len(names) < 2 or names[0] not in ("tau", "time") or set(names[2:]) - TIMED.keys():
        usage = f"usage: python -m scripts.draft_path tau | time <folder> [{' | '.join(TIMED)}]\n"
        sys.stderr.write(usage)
        return 2
    what, out, shapes = names[0], Path(names[1]), names[2:] or list(TIMED)
    if what == "tau":
        well = [cells.run(out, more) for cells in lab_cells()]
        write_tau(out)
        return 0 if all(well) else 1
    well = []
    for shape in shapes:
        cells = Cells(door=COST, words=[*SHAPES[shape], *TIMING], variants=TIMED[shape])
        well.append(cells.run(out, more))
        write_time(out)  # after each, so that what was measured is kept
    return 0 if all(well) else 1


def lab_cells() -> Iterator[Cells]:
    """Greedy, and sampled: in greedy answers a model this small falls into loops."""
    for target in ("dense", "w4a16"):
        own = [*TEXT, f"quant={target}"]
        yield Cells(door=RUN, words=own, variants=GREEDY)
        yield Cells(door=RUN, words=[*own, "temperature=1.0"], variants=SAMPLED)


def write_tau(out: Path) -> None:
    """Write tau.csv and steps.csv from the records below `out`."""
    campaign = load(out / "records")
    rows = {row.cell: row for row in stats.cell_rows(campaign, BOOTSTRAP)}
    cells = [c for c in campaign.runs if c.done and c.cell.method != VANILLA]
    listed = read_ranking(ROOT / LIST).ids
    table, steps = [], []
    prompts: list[str] = []
    for cell in cells:
        row, own = rows[cell.name], words(cell)
        plain = next(c for c in cells if c.comparable(cell) and c.cell.draft_scheme == "dense")
        pairs = stats.pairing(cell, plain).pairs
        change = BOOTSTRAP.over_prompts(metrics.pair_steps(pairs), stats.acceptance_change)
        tokens = [token for answer in cell.generations for token in answer.token_ids]
        first = set(listed if own[-1] == ALL else listed[: int(own[-1])])
        within = 1.0 if own[-1] == ALL else sum(t in first for t in tokens) / len(tokens)
        numbers = (row.acceptance_length, row.acceptance_low, row.acceptance_high)
        table.append(
            (
                *(*own, row.num_prompts, row.num_tokens, row.num_steps),
                *(_short(n) for n in (*numbers, change.value, change.low, change.high, within)),
                *(_short(row.agreement), row.lossless),
            )
        )
        sums = metrics.step_sums(cell.generations)
        prompts = sorted({*prompts, *sums})
        steps.append(
            (own, {p: f"{emitted:.0f}/{taken:.0f}" for p, (emitted, taken) in sums.items()})
        )
    wide = [(*own, *(sums.get(prompt, "") for prompt in prompts)) for own, sums in steps]
    _write(out / "tau.csv", TAU, sorted(table, key=_place))
    _write(out / "steps.csv", (*WORDS, *prompts), sorted(wide, key=_place))


def write_time(out: Path) -> None:
    """Write time.csv from the records below `out`."""
    cells = [c for c in load(out / "records").costs if c.done]
    rows = [_time(c, cost, cells) for c in cells for cost in c.costs if cost.what == "draft"]
    _write(out / "time.csv", TIME, sorted(rows, key=_place))


def _time(cell: CellResult, cost: Cost, cells: Sequence[CellResult]) -> tuple[object, ...]:
    """The row of one proposal."""
    times = sorted(1e3 * s for s in cost.repeat_s)
    reads = [r for c in cells if c.same_target(cell) for r in c.costs if r.what == "verify"]
    verify = [1e3 * statistics.median(r.repeat_s) for r in sorted(reads, key=lambda r: r.n)]
    return (
        *(*words(cell), cost.n, cost.forwards, cost.context),
        *(_short(statistics.median(times)), _short(times[0]), _short(times[-1]), len(times)),
        *(cost.weight_bytes, _short(verify[0]), _short(verify[-1]), cell.device_name),
    )


def words(cell: CellResult) -> tuple[object, ...]:
    """A cell in the words of the tables; `target`: lm_head is the target's own, or rows of it."""
    c = cell.cell
    scheme, *rest = c.draft_scheme.split("+")
    heads = [part.removeprefix("lm_head:") for part in rest if part.startswith("lm_head:")]
    size = cell.context.get("draft_vocab", {}).get("size", ALL)
    return (c.model, c.scheme, c.temperature, scheme, (heads or ["target"])[0], size)


def _place(row: tuple[object, ...]) -> tuple[object, ...]:
    """Order by target, then by how much is left of the vocabulary, then by scheme."""
    size = row[len(WORDS) - 1]
    return (*row[:3], 0 if size == ALL else 1 / int(str(size)), *map(str, row[3:5]))


def _short(number: float | None) -> str:
    return "" if number is None else f"{number:.4f}"


def _write(path: Path, head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(head)
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
