"""The command `specquant`: hands its arguments to the door of the name given first.

Doors are imported when they are called, so that a report does not wait for torch.
"""

import importlib
import sys

from bench.pipe import until_closed

DOORS = {
    "check": "look at everything that a run would trip over, and whether a head works at all",
    "run": "decode a task with a method on a quantised model, or a matrix of them",
    "cost": "measure what verifying n tokens costs, and what drafting does",
    "quality": "measure what a scheme costs in quality: perplexity, divergence from dense",
    "quantize": "round a model's layers on calibration text, into a checkpoint folder",
    "vocab": "count a text's tokens, and list the most frequent as a draft vocabulary",
    "kernels": "time every kernel of a scheme on this GPU, and keep which is fastest",
    "report": "turn a campaign's records into tables, figures and one page",
}
# Doors whose module has another name: `bench.check` is what every door looks at.
MODULES = {"check": "preflight"}


def main() -> int:
    """Open a door; give its exit code."""
    return until_closed(_open)


def _open() -> int:
    arguments = sys.argv[1:]
    if arguments[:1] in ([], ["--help"], ["-h"]):
        sys.stdout.write(_usage())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in DOORS:
        sys.stderr.write(f"error: a door must be one of {', '.join(DOORS)}, got {name!r}\n")
        return 2
    sys.argv = [f"specquant {name}", *rest]
    code: int = importlib.import_module(f"bench.{MODULES.get(name, name)}").main()
    return code


def _usage() -> str:
    doors = "\n".join(f"  specquant {name:<9} {what}" for name, what in DOORS.items())
    return (
        f"Does speculative decoding still pay on a quantised model?\n\n{doors}\n\n"
        "Keys are set as key=value; -m sweeps over a=1,2; `specquant <door> --help` lists them.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
