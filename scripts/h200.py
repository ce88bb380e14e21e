"""Measure forwards and whole rounds of Llama-3 shapes on one GPU, over random weights.

    python -m scripts.h200 results/h200            # every case below
    python -m scripts.h200 results/h200 8b.w4a16   # some of them
    python -m scripts.h200 results/h200 tables     # none: the tables alone, of what is recorded

Each case is a call of `specquant cost` or `specquant run`, in a process of its own: what fails is
told and leaves the others. `<case>.parts` times what a round of that case is made of, each by
itself. What the doors recorded is then put into tables beside the records (scripts.h200_tables).

Kernels alone are timed by `specquant kernels`.
"""

import subprocess
import sys
from pathlib import Path

from scripts.h200_tables import write_tables

TABLES = "tables"
COST = [
    *("cost", "cost.widths=[1,4,8,16,24,32,48,60,64]", "context=1024"),
    *("cost.contexts=[512,768]", "cost.hold_s=1"),  # the latter is the mean one of the rounds below
]
# Prompts of 512 tokens, answers as long as the paper's of HumanEval (arXiv 2505.22179): of short
# ones the prompt's drafting and a last step that is cut off are a larger share.
RUN = ["run", "context=1024", "task.limit=3", "task.max_new_tokens=512"]
TARGETS = ("w4a16", "w8a8", "dense")
EXACT = ("w4a16", "w8a8")
DRAFT = ["method.draft_scheme=w4a16", "method.draft_lm_head=w4a16"]
# The constant acceptance that gives 4.1 over 6 levels gives 3.01 over 3; 4 of 6 is assumed.
SHALLOW, CHAIN = ["accept=constant", "accept.tau=3.01"], ["accept=constant", "accept.tau=4"]
ROUNDS = {
    "8b.{}.eagle2": ["model=llama3_8b", "method=eagle2", "accept=eagle2_llama3_8b"],
    "70b.{}.eagle2": [
        *("model=llama3_70b", "method=eagle2", "method.nodes=48", "accept=eagle2_llama3_70b")
    ],
    "70b.{}.eagle2_shallow": [
        *("model=llama3_70b", "method=eagle2", "method.depth=3", "method.nodes=24", *SHALLOW)
    ],
    "70b.{}.chain": ["model=llama3_70b", "method=chain", "method.min_draft=6", *CHAIN],
    "70b.{}.hierarchical": [
        *("model=llama3_70b", "method=hierarchical", "accept=hierarchical_llama3_70b")
    ],
}


def cases() -> dict[str, list[str]]:
    """Every case by its name: the words of a `specquant` command."""
    made: dict[str, list[str]] = {}
    for name in ("8b.dense", "8b.w4a16", "8b.w8a8", "8b.fp8", "70b.w4a16", "70b.w8a8", "70b.dense"):
        model, scheme = name.split(".")
        made[name] = [*COST, "method=vanilla", f"model=llama3_{model}", f"quant={scheme}"]
        if scheme in EXACT:
            made[f"{name}.exact"] = [*made[name], "exact=true"]
        if scheme == "w4a16":  # as others count a model in 4 bits, its output projection too
            made[f"{name}.lm_head"] = [*made[name], "quant.lm_head=w4a16"]
    for target in TARGETS:
        for name, words in ROUNDS.items():
            own = [*words, f"quant={target}", *DRAFT]
            made[name.format(target)] = [*RUN, *own]
            # Plain decoding's part, the target's reads, is the case above.
            made[f"{name.format(target)}.parts"] = [*COST, *own, "baseline=false"]
    return made


def main() -> int:
    """Run the cases that are named, or all; then write the tables of all that is recorded."""
    known = cases()
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.stderr.write(f"usage: python -m scripts.h200 <folder> [{TABLES} | case ...]\n")
        return 2
    out, *names = sys.argv[1:]
    if unknown := set(names) - known.keys() - {TABLES}:
        sys.stderr.write(f"error: a case must be one of {', '.join(known)}, got {unknown}\n")
        return 2
    chosen = [name for name in names if name != TABLES] if names else list(known)
    failed = [name for name in chosen if not _ran(known[name], Path(out))]
    sys.stdout.write(write_tables(Path(out)))
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return 1 if failed else 0


def _ran(arguments: list[str], out: Path) -> bool:
    common = [
        *("task=random", "device=cuda", "dtype=float16"),
        *(f"results_dir={out}", "campaign=records"),
    ]
    done = subprocess.run([sys.executable, "-m", "bench.cli", *arguments, *common], check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
