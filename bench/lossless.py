"""Where an arm's tokens leave vanilla's, and how near a tie the target saw there.

A method is lossless: it emits the target's own tokens. Forwards of different width may round
differently, so that a near-tie falls the other way. The target's own gap between the two tokens,
measured by reading the common prefix once more, tells a near-tie from a fault. Where every
operation is exact there is nothing to round differently, and any difference is a fault.
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.config import Config
from bench.record import Generation, Status
from bench.replayed import missed
from methods.prefill import PREFILL_CHUNK
from methods.transformer import Transformer
from methods.verify import Rule

ENDED = -1  # in place of a token, where one answer ends and the other goes on


def ending(config: Config, generations: Sequence[Generation]) -> Status:
    """How a cell ends whose prompts are all recorded."""
    problem = missed(config.accept, generations)
    if config.settings.exact:
        problem = problem or different(generations)
    return Status(state="failed" if problem else "done", reason=problem)


def different(generations: Sequence[Generation]) -> str:
    """Say where answers differ from vanilla's though every operation is exact; else nothing."""
    apart = [(g, g.divergence) for g in generations if g.divergence is not None]
    if not apart:
        return ""
    first, where = apart[0]
    return (
        f"exact=true: tokens must be vanilla's, got others in {len(apart)} of {len(generations)} "
        f"turns, first in {first.prompt_id} turn {first.turn} at token {where['index']}"
    )


def divergence(
    target: Transformer,
    prompt: list[int],
    tokens: list[int],
    vanilla: list[int],
    *,
    rule: Rule,
    seed: int,
) -> dict[str, float] | None:
    """First difference: index, token, vanilla_token, gap_nats; None where there is none.

    gap_nats: difference of the two tokens' scores under the rule that both arms decode by, its
    noise included. An answer that ends early has no near-tie to excuse it.
    """
    if tokens == vanilla:
        return None
    shorter = min(len(tokens), len(vanilla))
    index = next((i for i in range(shorter) if tokens[i] != vanilla[i]), shorter)
    token = tokens[index] if index < len(tokens) else ENDED
    other = vanilla[index] if index < len(vanilla) else ENDED
    gap = sys.float_info.max
    if index < shorter:
        context = prompt + tokens[:index]
        logits = next_logits(target, context)
        position = torch.tensor([len(context)], device=target.device)
        scores = rule.scores(logits[None], position, seed=torch.tensor([seed]))[0]
        gap = float((scores[token] - scores[other]).abs())
    return {"index": index, "token": token, "vanilla_token": other, "gap_nats": gap}


def next_logits(target: Transformer, tokens: list[int]) -> Tensor:
    """Read tokens in large chunks; give the logits after the last, [V] float32."""
    kv = target.cache(len(tokens))
    hidden = torch.empty(0)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        chunk = torch.tensor([tokens[start : start + PREFILL_CHUNK]], device=target.device)
        positions = torch.arange(start, start + chunk.shape[1], device=target.device)
        hidden = target(chunk, positions, kv).hidden
        kv.advance(chunk.shape[1])
    return target.logits(hidden[0, -1:]).float()[0]
