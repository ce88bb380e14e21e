"""A round is one prompt through all arms: in which order, and which one a kill has torn."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def interleaved(arms: Sequence[T], number: int) -> list[T]:
    """Order of the arms in round `number`: each order is followed by its reverse, then rotated."""
    shift = number // 2 % len(arms)
    order = [*arms[shift:], *arms[:shift]]
    return order[::-1] if number % 2 else order


def torn_round(whole: Sequence[set[str]]) -> set[str]:
    """The one round that some arms have recorded and others not: a kill fell into its writing.

    More than one such round is an arm that joined late or failed before; what the others have
    then stands.
    """
    uneven = set[str].union(*whole) - set[str].intersection(*whole)
    return uneven if len(uneven) == 1 else set()
