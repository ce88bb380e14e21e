"""Door: time what reading n tokens costs a target, and what a proposal costs its drafter.

    specquant cost quant=w4a16 method=eagle2
    specquant cost -m quant=dense,w4a16 method=vanilla,chain,eagle2
    specquant cost experiment=demo

`python -m bench.cost` does the same. With `specquant run` of the same campaign the report explains
every speed-up by them: (tau) / (T_draft / T_1 + T_v(n) / T_1), arXiv 2505.22179.
"""

import sys

from bench.door import open_door
from bench.plan import Planner

CHILD = "bench.cost_cell"


def main() -> int:
    """Time what the command line asks for; give the exit code."""
    return open_door("cost", lambda: Planner(CHILD), module=CHILD)


if __name__ == "__main__":
    sys.exit(main())
