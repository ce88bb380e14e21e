"""Values out of files that anyone may have written: JSON, and the sizes and numbers in it.

Each reader raises ValueError in one short line: what must hold, then what came. None of them
allocates more than the file is large.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from reprlib import Repr
from typing import Any

MAX_DEPTH = 64  # of lists and objects in each other: more than any toolkit writes
TOO_DEEP = f"lists and objects must be nested {MAX_DEPTH} deep at most, got deeper ones"
MAX_SIZE = 2**63 - 1  # the sizes of tensors are int64
# What float32 holds in full precision, which frequencies and norms are computed in.
TINY, HUGE = 2.0**-126, 2.0**127
MAX_SHOWN = 120  # characters of a value in a message


def shown(value: object) -> str:
    """Write a value of a file for a message: on one line, and short."""
    short = Repr()
    short.maxstring = short.maxother = MAX_SHOWN
    return short.repr(value)


@contextmanager
def naming(place: object) -> Iterator[None]:
    """Put the place before what a ValueError in here says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def parse_json(text: bytes) -> Any:  # noqa: ANN401  whatever JSON holds
    """Read JSON in UTF-8; ValueError where it is something else, or nested too deep."""
    try:
        value = json.loads(text.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(TOO_DEEP) from error
    if _depth(value) > MAX_DEPTH:
        raise ValueError(TOO_DEEP)
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise ValueError naming the file."""
    try:
        values = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} must be a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(values).__name__}")
    return values


def read_size(
    values: Mapping[str, Any], key: str, *, default: int | None = None, least: int = 1
) -> int:
    """Give an integer from `least` on. default: also for null."""
    value = _given(values, key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= MAX_SIZE:
        raise ValueError(f"{key} must be an integer from {least} to 2**63 - 1, got {shown(value)}")
    return value


def read_number(
    values: Mapping[str, Any], key: str, *, default: float | None = None, above: float = 0
) -> float:
    """Give a number that is finite, and not 0, in float32. default: also for null."""
    value = _given(values, key, default)
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not max(above, TINY) <= value <= HUGE
        or value == above
    ):
        raise ValueError(f"{key} must be a finite number above {above:g}, got {shown(value)}")
    return float(value)


def read_flag(values: Mapping[str, Any], key: str, *, default: bool = False) -> bool:
    """Give true or false. default: also for null."""
    value = _given(values, key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {shown(value)}")
    return value


def read_section(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Give an object; an empty one for null."""
    value = _given(values, key, {})
    if not isinstance(value, Mapping):
        raise ValueError(f"{key} must be an object, got {shown(value)}")
    return value


def _given(values: Mapping[str, Any], key: str, default: object) -> object:
    value = values.get(key)
    return default if value is None else value


def _depth(value: object) -> int:
    """How deep lists and objects are in each other; without recursion, which has a depth too."""
    depth, level = 0, [value]
    while level := [each for each in level if isinstance(each, dict | list)]:
        depth += 1
        level = [
            own for each in level for own in (each.values() if isinstance(each, dict) else each)
        ]
    return depth
