"""How a command ends whose output nobody reads any more, as in `specquant run --help | head`."""

import os
import signal
import sys
from collections.abc import Callable

CLOSED = 128 + signal.SIGPIPE  # the exit code of a shell's tools


def until_closed(door: Callable[[], int]) -> int:
    """Open a door and give its exit code; CLOSED, without a word, where its reader has gone."""
    try:
        try:
            return door()
        finally:
            sys.stdout.flush()  # also where Hydra has shown its help and exits
    except BrokenPipeError:
        # What is left to write would be tried again, and told of, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED
