"""Every formula on generations, once: records in, numbers out, None where nothing was measured.

Those on costs are in `bench/cost_model.py`.

Sums come before ratios: a rate is the sum of its tokens over the sum of its seconds, never a mean
of rates, so that records can be pooled before dividing.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.record import Generation

# The stages charged to a method: everything after the target has read the prompt. The drafter's
# own reading of the prompt is in, because without the method nobody would have paid for it.
CHARGED = ("draft_prefill", "host", "draft", "verify", "commit")
# What repeats with every step; the drafter's own reading of the prompt is left out.
# What the device does: all stages but host and stop.
WORK = ("prefill", "draft_prefill", "draft", "verify", "commit")
DECODE = ("host", "draft", "verify", "commit")
# What a user waits for: the target's reading of the prompt is in.
REQUEST = ("prefill", *CHARGED)


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Generations of a method beside vanilla's of the same prompt and turn."""

    pairs: list[tuple[Generation, Generation]]  # (method, vanilla), both ok
    num_incomparable: int  # later turns whose prompt differs because an earlier answer did
    num_unpaired: int  # the other arm has no such turn, or one of the two was too long


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How a method's tokens compare with vanilla's, counted in turns."""

    num_equal: int
    num_ties: int  # they differ, where vanilla's two best logits were nearly equal
    num_differences: int  # they differ beyond the tie threshold
    num_unknown: int  # they differ, and vanilla was not there when the gap could be measured

    @property
    def share(self) -> float:
        """Share of turns whose tokens are vanilla's tokens."""
        others = self.num_ties + self.num_differences + self.num_unknown
        return self.num_equal / (self.num_equal + others)

    @property
    def verdict(self) -> str:
        """`exact`, `ties` (every difference is a near-tie), `unknown` or `DIFFERENT`."""
        if self.num_differences:
            return "DIFFERENT"
        if self.num_unknown:
            return "unknown"
        return "ties" if self.num_ties else "exact"


def finished(generations: Iterable[Generation]) -> list[Generation]:
    """Those that ran; too_long ones are counted elsewhere and never averaged."""
    return [g for g in generations if g.status == "ok"]


def seconds(generations: Iterable[Generation], stages: Sequence[str] = CHARGED) -> float:
    """Sum of the seconds spent in some stages."""
    return math.fsum(t for g in generations for stage in stages for t in g.stage_s.get(stage, ()))


def num_tokens(generations: Iterable[Generation]) -> int:
    """Tokens emitted, after the cut at the stop token or limit."""
    return sum(len(g.token_ids) for g in generations)


def tokens_per_second(
    generations: Sequence[Generation], stages: Sequence[str] = CHARGED
) -> float | None:
    """Sum of tokens / sum of seconds in the stages, the drafter's own prefill charged by default.

    Spec-Bench and EAGLE average a ratio per question instead, which weighs short answers more.
    """
    return ratio(num_tokens(generations), seconds(generations, stages))


def num_steps(generations: Iterable[Generation]) -> int:
    """Rounds of draft, verify and commit."""
    return sum(len(g.accepted) for g in generations)


def acceptance_length(generations: Sequence[Generation]) -> float | None:
    """tau: tokens emitted per step, the bonus token included, so at least 1; before the cut.

    (sum(accepted) + steps) / steps; tau(n, d) of arXiv 2505.22179, equation of section 2.
    """
    steps = num_steps(generations)
    return ratio(sum(sum(g.accepted) for g in generations) + steps, steps)


def acceptance_at(generations: Sequence[Generation]) -> list[float]:
    """Share of steps that kept at least i drafts, for i = 1 .. the most ever kept."""
    accepted = [kept for g in generations for kept in g.accepted]
    return [
        sum(kept >= i for kept in accepted) / len(accepted)
        for i in range(1, max(accepted, default=0) + 1)
    ]


def drafted_per_step(generations: Sequence[Generation]) -> float | None:
    """Mean number of drafts proposed in a step."""
    return ratio(sum(sum(g.drafted) for g in generations), num_steps(generations))


def stage_shares(generations: Sequence[Generation]) -> dict[str, float]:
    """Share of the charged seconds that each charged stage took."""
    total = seconds(generations)
    return {s: seconds(generations, [s]) / total for s in CHARGED} if total else {}


def host_gap_share(generations: Sequence[Generation]) -> float | None:
    """Share of the wall time, begin to last commit, in which the device waited for the host."""
    wall = math.fsum(g.wall_s for g in generations)
    return ratio(wall - seconds(generations, WORK), wall)


def mean_context(generations: Sequence[Generation]) -> float | None:
    """Decided tokens in the cache, on average over a generation: the prompt and half the answer."""
    total = sum(g.prompt_tokens + len(g.token_ids) / 2 for g in generations)
    return ratio(total, len(generations))


def pair(
    generations: Iterable[Generation], vanilla: Iterable[Generation], *, tokens_matter: bool
) -> Pairing:
    """Put a method's turns beside vanilla's, repeat by repeat.

    A second turn has the first answer in its prompt, so it is comparable only where all earlier
    answers are equal. tokens_matter: False where tokens mean nothing (replayed acceptance): then
    only the costs are compared, and every turn counts.
    """
    others = _conversations(vanilla)
    pairs: list[tuple[Generation, Generation]] = []
    incomparable = unpaired = 0
    for key, turns in _conversations(generations).items():
        same = True
        for turn, mine in sorted(turns.items()):
            other = others.get(key, {}).get(turn)
            if other is None:
                unpaired += 1
                continue
            if tokens_matter and not (same and mine.prompt_tokens == other.prompt_tokens):
                incomparable += 1
            elif mine.status == other.status == "ok":
                pairs.append((mine, other))
            else:
                unpaired += 1
            same = same and mine.token_ids == other.token_ids
    return Pairing(pairs=pairs, num_incomparable=incomparable, num_unpaired=unpaired)


def agreement(
    pairs: Sequence[tuple[Generation, Generation]], tie_threshold_nats: float | None
) -> Agreement | None:
    """Compare tokens turn by turn; a gap of at most the threshold makes a difference a tie.

    tie_threshold_nats: None where every operation was exact, so that nothing excuses a difference.
    """
    if not pairs:
        return None
    equal = ties = unknown = 0
    for mine, vanilla in pairs:
        if mine.token_ids == vanilla.token_ids:
            equal += 1
        elif tie_threshold_nats is None:
            continue
        elif not _measured(mine, vanilla):
            unknown += 1
        elif mine.divergence and mine.divergence["gap_nats"] <= tie_threshold_nats:
            ties += 1
    return Agreement(
        num_equal=equal,
        num_ties=ties,
        num_differences=len(pairs) - equal - ties - unknown,
        num_unknown=unknown,
    )


def _measured(mine: Generation, vanilla: Generation) -> bool:
    """Whether the stored gap is that of the first difference between these two."""
    gap = mine.divergence
    if gap is None:
        return False
    index = int(gap["index"])
    if mine.token_ids[:index] != vanilla.token_ids[:index]:
        return False
    here = [next(iter(g.token_ids[index : index + 1]), -1) for g in (mine, vanilla)]
    return here == [gap["token"], gap["vanilla_token"]] and here[0] != here[1]


def pair_sums(
    pairs: Sequence[tuple[Generation, Generation]], stages: Sequence[str] = CHARGED
) -> dict[str, list[float]]:
    """Per prompt id: tokens and seconds of the method, tokens and seconds of vanilla.

    The turns of one prompt stay together: they are not independent of each other.
    """
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for mine, vanilla in pairs:
        row = sums[mine.prompt_id]
        row[0] += len(mine.token_ids)
        row[1] += seconds([mine], stages)
        row[2] += len(vanilla.token_ids)
        row[3] += seconds([vanilla], stages)
    return dict(sums)


def step_sums(generations: Iterable[Generation]) -> dict[str, list[float]]:
    """Per prompt id: tokens emitted before the cut, and steps."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for g in generations:
        sums[g.prompt_id][0] += sum(g.accepted) + len(g.accepted)
        sums[g.prompt_id][1] += len(g.accepted)
    return dict(sums)


def pair_steps(pairs: Iterable[tuple[Generation, Generation]]) -> dict[str, list[float]]:
    """Per prompt id: tokens before the cut and steps of the one, and of the other."""
    both = list(pairs)
    ours, theirs = step_sums(a for a, _ in both), step_sums(b for _, b in both)
    return {prompt: [*ours[prompt], *theirs[prompt]] for prompt in ours}


def num_scored(generations: Iterable[Generation]) -> int:
    """Answers that a scorer called right or wrong."""
    return sum(g.correct is not None for g in generations)


def ratio(above: float, below: float) -> float | None:
    """A quotient, None where there is nothing to divide by."""
    return above / below if below else None


def _conversations(
    generations: Iterable[Generation],
) -> dict[tuple[str, int], dict[int, Generation]]:
    """Turns by (prompt id, repeat); the r-th record of a turn belongs to repeat r."""
    seen: dict[tuple[str, int], int] = defaultdict(int)
    turns: dict[tuple[str, int], dict[int, Generation]] = defaultdict(dict)
    for g in generations:
        repeat = seen[g.prompt_id, g.turn]
        seen[g.prompt_id, g.turn] += 1
        turns[g.prompt_id, repeat][g.turn] = g
    return dict(turns)
