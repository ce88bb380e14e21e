"""How attention is cut into pieces, and where they lie.

A piece is what one program of `methods.kernels.attention`, or one block of
`methods.kernels.attention_hopper`, leaves of a node's keys for `methods.kernels.combine`.

Letters: n new tokens, G key-value heads.
"""

from dataclasses import dataclass

from torch import Tensor

STEP = 64  # keys, cut by position
STEPS = 4  # of a split
SPLIT = STEPS * STEP


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One launch.

    tiles: of rows, of one group. fine: whether a piece of decided keys is one step, and else a
    whole split. shared_programs: those of decided keys. hop: programs that share a node's own
    steps. own_at: the first piece of own steps, where pieces are not fine. pieces: of a row.
    """

    tiles: int
    fine: bool
    shared_programs: int
    hop: int
    own_at: int
    pieces: int

    @property
    def size(self) -> int:
        """Keys of a piece of decided ones."""
        return STEP if self.fine else SPLIT


def cut(rows: int, groups: int, capacity: int, *, tile: int, longest: int, few: int) -> Cut:
    """Cut a launch. rows: of one group, a node's heads each. tile: rows of a program.

    longest: most scratch slots that a node may see. few: programs of whole splits up to which a
    launch is fine.
    """
    tiles, splits = -(-rows // tile), -(-capacity // SPLIT)
    own_steps = (STEP + longest - 2) // STEP + 1
    fine = splits * tiles * groups <= few
    shared = -(-capacity // STEP) if fine else splits
    return Cut(
        tiles=tiles,
        fine=fine,
        shared_programs=shared * tiles * groups,
        hop=own_steps if fine else 1,
        own_at=shared,
        pieces=shared if fine else shared + own_steps,
    )


def longest_path(ancestors: Tensor | None, scratch: int, n: int) -> int:
    """Most scratch slots that one of n new tokens may see. ancestors: [n, depth] or None."""
    return scratch + n if ancestors is None else ancestors.shape[1]
