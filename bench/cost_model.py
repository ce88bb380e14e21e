"""The cost model: what the measured parts of a round say of decoding, in seconds or in joules.

A round is one proposal and one read of the tree that it gives, as `specquant cost` measures them.
They are taken at batch 1 and the nearest context where they were measured; None where they were
not, never a guess.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

from bench.record import Cost

Unit = Callable[[Cost], Sequence[float]]  # what was measured of a cost; empty where nothing was


def timed_s(cost: Cost) -> list[float]:
    """Seconds of every repeat, timed in bursts."""
    return cost.repeat_s


def held_j(cost: Cost) -> list[float]:
    """Joules of one run, repeated back to back: the whole card's, by the driver's counter."""
    return [] if cost.energy_mj is None else [cost.energy_mj / 1e3]


def reading(costs: Sequence[Cost], n: float, context: float, unit: Unit) -> float | None:
    """What the target takes to read n tokens, T_v(n): a straight line between measured n."""
    points = _curve(costs, "verify", context, unit)
    if n in points:
        return points[int(n)]
    below = max((m for m in points if m < n), default=None)
    above = min((m for m in points if m > n), default=None)
    if below is None or above is None:
        return None  # a line beyond the last measurement would be a guess
    share = (n - below) / (above - below)
    return points[below] + share * (points[above] - points[below])


def proposal(costs: Sequence[Cost], n: float, context: float, unit: Unit) -> float | None:
    """What one whole proposal takes, at the nearest measured tree size."""
    points = _curve(costs, "draft", context, unit)
    return points[min(points, key=lambda m: (abs(m - n), m))] if points else None


def predicted_speedup(
    *, acceptance_length: float, draft_ratio: float, verify_ratio: float
) -> float:
    """What the cost model makes of measured parts: tau / (d T_d / T_1 + T_v(n) / T_1).

    The inverse of arXiv 2505.22179's time per token. draft_ratio: all d forwards of one round.
    """
    return acceptance_length / (draft_ratio + verify_ratio)


def joules_per_token(*, acceptance_length: float, proposal_j: float, reading_j: float) -> float:
    """What a token takes of a round's energy: (proposal + read of its tree) / tau.

    That is the whole card's energy by the driver's counter, while one and the same thing is
    repeated back to back. Not in it: the host, which no counter of the card sees; the commit, and
    what the card draws while it waits between the parts of a step; the prompt, whoever reads it.
    """
    return (proposal_j + reading_j) / acceptance_length


def bytes_per_second(cost: Cost) -> float:
    """Bytes of weights and cache that were read, over the median seconds."""
    return (cost.weight_bytes + cost.kv_bytes) / statistics.median(cost.repeat_s)


def _curve(costs: Iterable[Cost], what: str, context: float, unit: Unit) -> Mapping[int, float]:
    """By n, what was measured in a unit; a cost without it is as if it were not.

    Of reads the median, of proposals the mean: a smaller model's own method takes a step more or
    fewer from state to state, and a round's share is what they take together.
    """
    middle = statistics.fmean if what == "draft" else statistics.median
    at: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cost in costs:
        if cost.what == what and cost.batch == 1 and unit(cost):
            at[cost.context][cost.n].extend(unit(cost))
    if not at:
        return {}
    nearest = min(at, key=lambda c: (abs(c - context), c))
    return {n: middle(values) for n, values in at[nearest].items()}
