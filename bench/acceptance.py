"""Whether a drafter works at all: a broken head is told from a slow one before it is timed.

A head over the wrong features, of another rotation or spoilt by quantisation still decodes without
an error, at an acceptance length near 1.00, and would stand in a table as a slow method.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from methods.decode import Method, Output, generate
from methods.grow import Head
from methods.hierarchical import HierarchicalDrafter
from methods.recipe import Family
from methods.rotation import is_norm_folded
from methods.transformer import Transformer
from methods.vanilla import VanillaDrafter
from methods.weights import ROTATION, Weights

# Decoded before a drafter is called broken: some 300 steps, after which one that is right in 2 of
# 100 steps has been caught right with a probability of 99.8 %.
PROMPTS, TOKENS = 5, 64


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Sums over the steps that drafted anything."""

    steps: int
    drafted: int
    accepted: int

    @property
    def length(self) -> float:
        """Tokens per step, bonus included."""
        return 1 + self.accepted / max(self.steps, 1)

    def chance(self, vocab: int) -> float:
        """The most that as many blind guesses reach, each right once in a vocabulary."""
        return 1 + self.drafted / max(self.steps, 1) / vocab


def acceptance_of(outputs: Iterable[Output]) -> Acceptance:
    """Sum what was drafted and accepted."""
    steps = [
        (drafted, accepted)
        for output in outputs
        for drafted, accepted in zip(output.drafted, output.accepted, strict=True)
        if drafted
    ]
    return Acceptance(
        steps=len(steps), drafted=sum(d for d, _ in steps), accepted=sum(a for _, a in steps)
    )


def drafting(method: Method, family: Family) -> Iterator[tuple[Method, Family]]:
    """The methods that draft: this one and those inside it, each with the family it is over."""
    if isinstance(method.drafter, VanillaDrafter):
        return
    yield method, family
    if isinstance(method.drafter, HierarchicalDrafter):
        yield from drafting(method.drafter.method, family.smaller())


def attempt(method: Method, tokens: list[int], limit: int) -> Output:
    """Decode a little, off the record."""
    return generate(method, tokens, limit=limit, stop=lambda _: None)


def broken(
    method: Method,
    prompts: Sequence[list[int]],
    *,
    tried: Sequence[Output],
    limit: int,
    floor: float,
    target: Path,
) -> str:
    """Say why a drafter is broken; nothing where it works.

    It works as soon as its accepted drafts per step exceed `floor` times those of blind guesses; 0
    asks for nothing. tried: what was decoded already; `prompts`, up to `limit` tokens each, are
    decoded only while that does not suffice. target: its folder, for what may be the cause.
    """
    if not floor:
        return ""
    vocab = method.target.shape.vocab_size
    outputs = list(tried)
    waiting = list(prompts[:PROMPTS])
    while not _works(found := acceptance_of(outputs), vocab, floor):
        if not waiting:
            model = isinstance(method.drafter, HierarchicalDrafter)  # it reads tokens, no features
            what, cause = ("drafter", "") if model else ("head", _suspicion(target))
            return (
                f"broken {what}: acceptance length {found.length:.2f} over {found.steps} steps of "
                f"{len(outputs)} prompts, blind guesses reach {found.chance(vocab):.4f} "
                f"(acceptance_floor={floor:g} times){cause}"
            )
        outputs.append(attempt(method, waiting.pop(0), min(limit, TOKENS)))
    return ""


def _works(found: Acceptance, vocab: int, floor: float) -> bool:
    return found.length - 1 > floor * (found.chance(vocab) - 1)


def _suspicion(target: Path) -> str:
    """What in the target's files would explain a head that is never right."""
    if (target / ROTATION).is_file() or not is_norm_folded(Weights(target)):
        return ""
    return (
        f"; the final norm of {target} is all ones and there is no {ROTATION}: it seems to be "
        "rotated, and the head made for the target of before"
    )


@torch.inference_mode()
def top1_agreement(
    head: Head, dense: Head, target: Transformer, prompts: Sequence[list[int]]
) -> float:
    """How often a head's likeliest next token is that of its dense self, over every place."""
    agreed = places = 0
    for tokens in prompts:
        positions = torch.arange(len(tokens) - 1, device=target.device)
        text = torch.tensor(tokens, device=target.device)
        kv = target.cache(len(tokens))
        features = target(text[None, :-1], positions, kv, taps=head.taps).features[0]
        picks = [
            own.logits(
                own(text[1:], own.enter(features), positions, own.cache(len(tokens)), None)
            ).argmax(dim=-1)
            for own in (head, dense)
        ]
        agreed += int((picks[0] == picks[1]).sum())
        places += len(positions)
    return agreed / max(places, 1)
