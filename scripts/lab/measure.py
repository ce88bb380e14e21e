"""What the lab models are worth: held-out loss and acceptance along greedy text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.corpus import Tokens
from lab.fit import half_precision
from lab.heads import Eagle3Head, Head, unroll
from lab.llama import Cache, Llama


@dataclass(frozen=True, kw_only=True)
class Continued:
    """Prompts with their greedy continuations.

    tokens: [B, n], padded on the right; begins, ends: where a continuation begins and ends.
    """

    tokens: Tensor
    begins: list[int]
    ends: list[int]


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Acceptance of a drafter along greedy text.

    length: tokens per step, bonus included; by_depth: share of drafts at each depth that are
    right when all before them are the text's own.
    """

    length: float
    steps: int
    by_depth: list[float]


@torch.no_grad()
def held_out_loss(model: Llama, tokens: Tokens, *, length: int, half: bool) -> float:
    """Mean loss in nats per token over rows of BEGIN and length tokens, the remainder left out."""
    device = model.model.norm.weight.device
    count = len(tokens.stream) // length
    stream = torch.from_numpy(tokens.stream[: count * length].astype(np.int64)).to(device)
    total, training = 0.0, model.training
    model.eval()
    for rows in torch.split(stream.view(count, length), 32):
        read = F.pad(rows[:, :-1], (1, 0), value=int(tokens.stream[0]))
        if half:
            with half_precision(device):
                logits = model(read).logits
        else:
            logits = model(read).logits
        flat = logits.float().flatten(0, 1)
        total += F.cross_entropy(flat, rows.flatten(), reduction="sum").item()
    model.train(training)
    return total / (count * length)


def quality(loss: float, *, tokens: int, size_bytes: int) -> dict[str, float]:
    """The same loss as perplexity per token and as bits per byte of text."""
    return {
        "nats_per_token": round(loss, 4),
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(loss * tokens / size_bytes / math.log(2), 4),
    }


@torch.no_grad()
def continue_prompts(model: Llama, prompts: Sequence[list[int]], count: int, end: int) -> Continued:
    """Continue prompts of different lengths greedily, in the weights' own dtype."""
    weight = model.model.norm.weight
    begins, shortest = [len(prompt) for prompt in prompts], min(map(len, prompts))
    total = max(begins) + count
    tokens = torch.zeros(len(prompts), total, dtype=torch.int64, device=weight.device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=weight.device)
    given = torch.arange(total) < torch.tensor(begins)[:, None]
    given = given.to(weight.device)
    cache = Cache(model.shape, len(prompts), total, weight)
    seen = model(tokens[:, :shortest], cache)
    for position in range(shortest, total):
        newest = seen.logits[:, -1].argmax(-1)
        tokens[:, position] = torch.where(given[:, position], tokens[:, position], newest)
        seen = model(tokens[:, position : position + 1], cache)
    ends = []
    for row, begin in enumerate(begins):
        made = tokens[row, begin : begin + count].tolist()
        ends.append(begin + (made.index(end) + 1 if end in made else count))
    return Continued(tokens=tokens, begins=begins, ends=ends)


def before_repeats(text: Continued, *, size: int) -> Continued:
    """The same, each continuation ending where its first repeated run of `size` tokens begins.

    Small models fall into loops under greedy decoding, and in a loop every draft is right.
    """
    ends = []
    for row, (begin, end) in enumerate(zip(text.begins, text.ends, strict=True)):
        made = text.tokens[row, begin:end].tolist()
        runs = [tuple(made[i : i + size]) for i in range(len(made) - size + 1)]
        repeats = (i for i, run in enumerate(runs) if run in runs[:i])
        ends.append(begin + next(repeats, len(made)))
    return Continued(tokens=text.tokens, begins=text.begins, ends=ends)


@torch.no_grad()
def agreement(target: Llama, drafter: Llama, tokens: Tokens, *, length: int) -> dict[str, float]:
    """How alike two models are on the first 32 rows of a split: their own text is not needed.

    first_choice: share of positions with the same first choice; overlap: mean of the sum of the
    lesser of both probabilities, the share of drafts that sampling at temperature 1 accepts.
    """
    device = target.model.norm.weight.device
    stream = torch.from_numpy(tokens.stream[: 32 * length].astype(np.int64)).to(device)
    same, overlap = [], []
    for row in stream.view(-1, length):
        ours, theirs = target(row[None]).logits, drafter(row[None]).logits
        same.append((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
        least = torch.minimum(ours.softmax(-1), theirs.softmax(-1))
        overlap.append(least.sum(-1).mean())
    return {
        "first_choice": round(torch.stack(same).mean().item(), 4),
        "overlap": round(torch.stack(overlap).mean().item(), 4),
    }


@torch.no_grad()
def chain_of_model(drafter: Llama, text: Continued, *, depth: int) -> Acceptance:
    """Acceptance of a model that drafts greedily, exact: drafts that agree are the text itself."""
    logits = drafter(text.tokens[:, :-1]).logits
    right = F.pad(logits.argmax(-1) == text.tokens[:, 1:], (1, 0))
    return _count([right] * depth, text)


@torch.no_grad()
def chain_of_head(
    head: Head, target: Llama, text: Continued, *, depth: int, width: int
) -> Acceptance:
    """Acceptance of a head whose draft at each depth is right if among its first `width` choices.

    Width 1 is the chain, exactly; a greater width bounds any tree that keeps so many children of
    every node.
    """
    features = head.features(target, target(text.tokens))[:, :-1]
    rights = []
    for step, output in enumerate(unroll(head, target, text.tokens, features, steps=depth)):
        rows = output[:, : output.shape[1] - step - 1]
        best = head.logits(target, rows).topk(width, dim=-1).indices
        if isinstance(head, Eagle3Head):
            best = best + head.d2t[best]
        right = (best == text.tokens[:, step + 2 :, None]).any(-1)
        rights.append(F.pad(right, (step + 2, 0)))
    return _count(rights, text)


def _count(rights: Sequence[Tensor], text: Continued) -> Acceptance:
    """Replay speculative decoding: rights[k][b, j] says whether draft k + 1 is token j."""
    tables = [right.tolist() for right in rights]
    depth, emitted, steps = len(tables), 0, 0
    for row, (begin, end) in enumerate(zip(text.begins, text.ends, strict=True)):
        newest = begin - 1
        while newest + depth + 1 < end:
            kept = 0
            while kept < depth and tables[kept][row][newest + 1 + kept]:
                kept += 1
            emitted, steps, newest = emitted + kept + 1, steps + 1, newest + kept + 1
    by_depth = []
    for table in tables:
        spans = zip(table, text.begins, text.ends, strict=True)
        hits = [hit for line, begin, end in spans for hit in line[begin:end]]
        by_depth.append(round(sum(hits) / max(1, len(hits)), 4))
    return Acceptance(length=round(emitted / max(1, steps), 3), steps=steps, by_depth=by_depth)
