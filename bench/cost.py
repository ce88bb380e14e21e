"""Door: time what reading n tokens costs a target, and what a proposal costs its drafter.

    specquant cost quant=w4a16 method=eagle2
    specquant cost -m quant=dense,w4a16 method=vanilla,chain,eagle2
    specquant cost experiment=demo

`python -m bench.cost` does the same. With `specquant run` of the same campaign the report explains
every speed-up by them: (tau) / (T_draft / T_1 + T_v(n) / T_1), arXiv 2505.22179.
"""

import sys
from collections.abc import Sequence

from bench.block import Block
from bench.cost_table import cost_rows
from bench.door import open_door
from bench.plan import Planner
from bench.results import load
from bench.stats import Bootstrap
from bench.terminal import cost_table

CHILD = "bench.cost_cell"


def main() -> int:
    """Time what the command line asks for; give the exit code."""
    return open_door("cost", lambda: Planner(CHILD), module=CHILD, show=timed)


def timed(blocks: Sequence[Block]) -> str:
    """Tables of what was timed in some blocks; intervals are the report's."""
    told = []
    for campaign in dict.fromkeys(block.campaign for block in blocks):
        own = {arm.name for block in blocks if block.campaign == campaign for arm in block.arms}
        rows = cost_rows(load(campaign), Bootstrap(samples=100, confidence=0.95, seed=0))
        told.append(cost_table([row for row in rows if row.cell in own]))
    return "".join(told)


if __name__ == "__main__":
    sys.exit(main())
