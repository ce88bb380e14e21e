"""How attention is cut into pieces, and where they lie.

A piece is what one program of `methods.kernels.attention`, or one block of
`methods.kernels.attention_hopper`, leaves of a node's keys for `methods.kernels.combine`. A cut is
fine where a piece of decided keys is one step, so that many programs share the wait for memory, and
else coarse: a whole split's, so that pieces cost little traffic. Of own keys a piece is always one
step. In a fine cut pieces lie by position; in a coarse one own steps lie behind all splits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

STEP = 64  # keys, cut by position
STEPS = 4  # of a split
SPLIT = STEPS * STEP
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One launch.

    fine_steps: the most decided steps for which it is fine, -1 where it never is; the device knows
    how many there are. shared_programs: those of decided keys. hop: programs that share a node's
    own steps. own_at: the first piece of own steps where it is coarse. pieces: of a row.
    """

    fine_steps: int
    shared_programs: int
    hop: int
    own_at: int
    pieces: int


def cut(tiles: int, groups: int, capacity: int, *, longest: int, fine_steps: int) -> Cut:
    """Cut a launch. tiles: of rows, of one group. fine_steps: as of a `Cut`.

    longest: most scratch slots that a node may see.
    """
    splits, own_steps = -(-capacity // SPLIT), (STEP + longest - 2) // STEP + 1
    fine = min(fine_steps, -(-capacity // STEP))
    shared = max(splits, fine)
    return Cut(
        fine_steps=fine,
        shared_programs=shared * tiles * groups,
        hop=own_steps if fine >= 0 else 1,
        own_at=splits,
        pieces=shared + own_steps,
    )


def room(queries: Tensor, parts: Cut) -> tuple[Tensor, Tensor, Tensor]:
    """Make room for what a launch leaves of queries, [n, H, d], whose values are not looked at.

    Gives maxima and sums, [pieces, n * H], and weighted values, [pieces, n * H, d], all float32.
    """
    nodes, heads, dim = queries.shape
    tops, totals = queries.new_empty(2, parts.pieces, nodes * heads, dtype=torch.float32)
    return tops, totals, queries.new_empty(parts.pieces, nodes * heads, dim, dtype=torch.float32)


def scale_of(dim: int) -> float:
    """What scores are multiplied by, so that weights are powers of two. dim: d."""
    return LOG2_E / math.sqrt(dim)


def longest_path(ancestors: Tensor | None, scratch: int, n: int) -> int:
    """Most scratch slots that one of n new tokens may see. ancestors: [n, depth] or None."""
    return scratch + n if ancestors is None else ancestors.shape[1]
