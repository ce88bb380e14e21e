"""Triton kernels where there is no GPU."""

import os
import subprocess
import sys


def interpreted(code: str, *words: object) -> str:
    """Run code in a child, whose arguments are `words`; give what it printed.

    In a child, since Triton decides at its import whether its functions are interpreted.
    """
    child = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout
