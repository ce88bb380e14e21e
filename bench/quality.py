"""Door: measure what a scheme costs in quality, beside the dense model.

    specquant quality quant=w4a16
    specquant quality -m quant=dense,w8a8,w4a16
    specquant quality quant=w4a16 model=llama3_8b_instruct task=wikitext2 quality.window=2048

`python -m bench.quality` does the same. A method is lossless and has no quality of its own, so a
cell is the target's alone, whatever `method` says. With `specquant run` of the same campaign the
report puts the price of a scheme beside its speed.
"""

import sys

from bench.door import open_door
from bench.plan import Planner

CHILD = "bench.quality_cell"


def main() -> int:
    """Measure what the command line asks for; give the exit code."""
    return open_door("quality", lambda: Planner(CHILD), module=CHILD)


if __name__ == "__main__":
    sys.exit(main())
