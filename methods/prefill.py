"""How a prompt is read: in chunks."""

from collections.abc import Iterator

# So that activations of a long prompt stay small.
PREFILL_CHUNK = 1024


def chunks(start: int, end: int) -> Iterator[slice]:
    """Cut what is to be read, from `start` to `end`."""
    for first in range(start, end, PREFILL_CHUNK):
        yield slice(first, min(first + PREFILL_CHUNK, end))
