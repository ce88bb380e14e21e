"""Door: decode a task's prompts with a method on a quantised model, or a matrix of them.

    specquant run quant=w4a16 method=eagle2 task=lab
    specquant run -m quant=dense,w4a16 method=vanilla,eagle2
    specquant run experiment=demo

`python -m bench.run` does the same.
"""

import sys

from bench.door import open_door
from bench.plan import Planner

CHILD = "bench.cell"


def main() -> int:
    """Run what the command line asks for; give the exit code."""
    return open_door("run", lambda: Planner(CHILD), module=CHILD)


if __name__ == "__main__":
    sys.exit(main())
