"""Show on one GPU that exact=true is exact, and what it costs.

    python -m scripts.exact results/exact                     # every case below
    python -m scripts.exact results/exact tokens 8b.w4a16     # some of them
    python -m scripts.exact results/exact 8b.w8a8 quant.kernel=triton    # with overrides

`tokens` decodes the lab family by every method in w4a16 and w8a8, and compares the tokens with
plain decoding's. A model's case reads a tree's nodes together, in chains and one by one, and times
reads of n tokens, once as it comes and once exact. A line is added for each to

    tokens.csv  tokens compared of every method, and turns that differ from plain decoding's
    nodes.csv   nodes whose logits have other bits when read otherwise; exact=false for contrast
    price.csv   a read of n tokens: exact over not

Exit code 1 where anything exact differed.
"""

import csv
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from bench import metrics
from bench.build import ROOT
from bench.config import Config, parse, resolve
from bench.cost_cell import text_tokens
from bench.load import Loader
from bench.measure import measure, verify_cases
from bench.nodes import in_a_tree, in_chains, one_by_one, unequal
from bench.record import VANILLA
from bench.results import load
from bench.stats import pairing
from methods.transformer import Transformer
from methods.tree import Tree

METHODS = "chain,eagle2,eagle3,hierarchical,hierarchical_eagle3"
TOKENS = ["run", "-m", "model=lab", "task=lab", "quant=w4a16,w8a8", f"method={METHODS}"]
MODELS = {
    f"{size}.{scheme}": [f"model=llama3_{size}", f"quant={scheme}"]
    for size in ("8b", "70b")
    for scheme in ("dense", "w4a16", "w8a8")
}
CASES = ("tokens", *MODELS)
COMMON = ["device=cuda", "dtype=float16"]
CONTEXT, NODES, REPEATS, WARMUP = 512, 60, 15, 3
CHILDREN = 3  # of a node, so that its chains have two lengths only: each is a kernel to compile
WIDTHS = [1, 8, 16, 32, 60]
TOKENS_HEAD = ("scheme", "method", "dtype", "kernels", "turns", "tokens", "turns_that_differ")
NODES_HEAD = (
    *("model", "scheme", "exact", "kernels", "context", "shape", "nodes"),
    *("unequal_in_chains", "unequal_alone", "largest_difference", "device"),
)
PRICE_HEAD = (
    *("model", "scheme", "kernels", "exact_kernels", "context", "n"),
    *("median_ms", "exact_median_ms", "price", "repeats", "device"),
)


def main() -> int:
    """Run the cases that are named, or all."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.stderr.write(f"usage: python -m scripts.exact <folder> [{' | '.join(CASES)}]\n")
        return 2
    out, *words = sys.argv[1:]
    changes = [word for word in words if "=" in word]
    names = [word for word in words if word not in changes]
    if unknown := sorted(set(names) - set(CASES)):
        sys.stderr.write(f"error: a case must be one of {', '.join(CASES)}, got {unknown}\n")
        return 2
    wrong = 0
    for name in names or CASES:
        if name == "tokens":
            wrong += _tokens(changes, Path(out))
        else:
            wrong += _model([*MODELS[name], *changes], Path(out))
        torch.cuda.empty_cache()
    sys.stdout.write(f"{wrong} turns or nodes differ where all is exact\n")
    return 1 if wrong else 0


def _tokens(changes: list[str], out: Path) -> int:
    """Decode the lab family; give the number of turns that differ, and of cells that failed."""
    place = [f"results_dir={out}", "campaign=records"]
    line = [sys.executable, "-m", "bench.cli", *TOKENS, *COMMON, "exact=true", *place, *changes]
    subprocess.run(line, check=False)
    campaign = load(out / "records")
    rows, wrong = [], 0
    for cell in campaign.runs:
        wrong += not cell.done
        if cell.cell.method == VANILLA:
            continue
        plain = campaign.vanilla_of(cell)
        pairs = [] if plain is None else pairing(cell, plain).pairs
        differ = sum(mine.token_ids != theirs.token_ids for mine, theirs in pairs)
        wrong += differ
        count = metrics.num_tokens(mine for mine, _ in pairs)
        kernels = _named(cell.context.get("kernels", {}).values())
        labels = (cell.cell.scheme, cell.cell.method, cell.cell.dtype, kernels)
        rows.append((*labels, len(pairs), count, differ if cell.done else cell.status.reason))
    _write(out / "tokens.csv", TOKENS_HEAD, rows, anew=True)
    return wrong


@torch.inference_mode()
def _model(overrides: list[str], out: Path) -> int:
    """Look at one model as it comes and exact; give how many nodes differ in the latter."""
    times: list[dict[int, float]] = []
    kernels: list[str] = []
    wrong = 0
    for exact in (True, False):
        loader, config = _loaded(overrides, exact=exact)
        tokens = text_tokens(config, loader, CONTEXT)
        kernels.append(_named(loader.kernels.values()))
        device = torch.cuda.get_device_name(loader.device)
        labels = (Path(config.model.family.target).name, config.schemes.target.label)
        for shape, chained, alone, largest in _nodes(loader.target, tokens):
            read = (CONTEXT, shape, NODES, chained, alone, f"{largest:.3g}")
            _write(out / "nodes.csv", NODES_HEAD, [(*labels, exact, kernels[-1], *read, device)])
            wrong += exact * (chained + alone)
        times.append(_times(loader.target, tokens))
        del loader
        torch.cuda.empty_cache()
    rows = [
        (
            *labels,
            *reversed(kernels),
            CONTEXT,
            n,
            f"{ms:.4f}",
            f"{own:.4f}",
            f"{own / ms:.3f}",
            REPEATS,
            device,
        )
        for (n, own), ms in zip(times[0].items(), times[1].values(), strict=True)
    ]
    _write(out / "price.csv", PRICE_HEAD, rows)
    return wrong


def _loaded(overrides: list[str], *, exact: bool) -> tuple[Loader, Config]:
    asked = [*overrides, *COMMON, "task=random", "context=1024", f"exact={str(exact).lower()}"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(resolve(compose("run", overrides=asked)))
    return Loader(config), config


def _nodes(target: Transformer, tokens: list[int]) -> Iterator[tuple[str, int, int, float]]:
    """Read a tree's nodes, then a chain's, in three ways; give how many differ, and how far.

    In chains, then one by one.
    """
    device = target.device
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randint(target.shape.vocab_size, (NODES,), generator=generator, device=device)
    order = torch.arange(NODES, device=device)
    tree = Tree(tokens=drawn, parents=torch.div(order - 1, CHILDREN, rounding_mode="floor"))
    chain = Tree(tokens=drawn, parents=order - 1)
    kv = target.cache(CONTEXT + NODES)
    target(torch.tensor([tokens], device=device), torch.arange(CONTEXT, device=device), kv)
    kv.advance(CONTEXT)
    for shape, nodes in (("tree", tree), ("chain", chain)):
        whole = in_a_tree(target, kv, nodes)
        others = [in_chains(target, kv, nodes), one_by_one(target, kv, nodes)]
        largest = max(float((whole.float() - other.float()).abs().max()) for other in others)
        chained, alone = (unequal(whole, other) for other in others)
        yield shape, chained, alone, largest


def _times(target: Transformer, tokens: list[int]) -> dict[int, float]:
    """Time reads of n tokens; give the median milliseconds by n."""
    cases = list(verify_cases(target, tokens, context=CONTEXT, widths=WIDTHS, batches=[1], seed=0))
    taken = measure(cases, repeats=REPEATS, warmup=WARMUP, seed=0, device=target.device)
    return {cost.n: 1e3 * statistics.median(cost.repeat_s) for cost in taken}


def _named(kernels: Iterable[str]) -> str:
    return "+".join(sorted({name for joined in kernels for name in joined.split("+")}))


def _write(
    path: Path, head: tuple[str, ...], rows: Sequence[tuple[object, ...]], *, anew: bool = False
) -> None:
    """Add rows to a table, and show them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = anew or not path.exists()
    with path.open("w" if new else "a", encoding="utf-8", newline="") as file:
        for writer in (csv.writer(file, lineterminator="\n"), csv.writer(sys.stdout)):
            writer.writerows([head, *rows] if new else rows)


if __name__ == "__main__":
    sys.exit(main())
