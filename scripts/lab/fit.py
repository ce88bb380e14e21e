"""The training loops: language model, distillation, heads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from lab.corpus import Tokens
from lab.heads import Eagle2Head, Eagle3Head, Head, unroll
from lab.llama import Llama, Seen, continue_greedily

CrossEntropy = Callable[[Tensor, Tensor, Tensor], Tensor]
MEASURED_STEPS = range(10, 30)  # timed to learn how many steps fit: compilation is over by then


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One stage of training: it ends after max_steps or when its seconds are spent."""

    seconds: float
    max_steps: int
    rows: int
    length: int
    rate: float
    decay: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class Curve:
    """What a stage did: losses are means over the steps since the point before."""

    steps: int
    seconds: float
    tokens_per_step: int
    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]


class Rows:
    """Endless rows of a split, [count, length]: BEGIN, then text from where a definition begins."""

    def __init__(self, tokens: Tokens, *, length: int, seed: int, device: torch.device) -> None:
        self.stream = torch.from_numpy(tokens.stream.astype(np.int64)).to(device)
        self.begin = int(tokens.stream[0])
        self.length = length
        self.generator = np.random.default_rng(seed)
        # The nearest definition before each token, where it is near; else the token itself.
        indices = np.arange(len(tokens.stream))
        before = tokens.starts[np.searchsorted(tokens.starts, indices, side="right") - 1]
        self.snapped = np.where(indices - before < length // 4, before, indices)
        self.pending = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> Tensor:
        """The next rows; every epoch cuts the stream at another phase and in another order."""
        while len(self.pending) < count:
            phase = self.generator.integers(self.length)
            cuts = np.arange(phase, len(self.snapped) - self.length - 1, self.length)
            fresh = self.snapped[self.generator.permutation(cuts)]
            self.pending = np.concatenate([self.pending, fresh])
        chosen, self.pending = self.pending[:count], self.pending[count:]
        starts = torch.from_numpy(chosen).to(self.stream.device)
        starts = starts + (self.stream[starts] == self.begin)
        index = starts[:, None] + torch.arange(self.length - 1, device=starts.device)
        return F.pad(self.stream[index], (1, 0), value=self.begin)


def optimise(
    plan: Plan,
    parameters: Sequence[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    held_out: Callable[[], float] | None,
    name: str,
) -> Curve:
    """Run AdamW under a cosine schedule for as many steps as fit the plan's seconds."""
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    vectors = [parameter for parameter in parameters if parameter.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": plan.decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    device = parameters[0].device
    fused = device.type == "cuda"
    optimiser = torch.optim.AdamW(groups, lr=plan.rate, betas=(0.9, 0.95), fused=fused)
    train: list[tuple[int, float]] = []
    checks: list[tuple[int, float]] = []
    since: list[Tensor] = []
    steps, begun, step = plan.max_steps, clock(device), 0
    bar = tqdm(desc=name, mininterval=15, total=steps)
    while step < steps:
        if step == MEASURED_STEPS.start:
            measured = clock(device)
        if step == MEASURED_STEPS.stop:
            now = clock(device)
            each, left = (now - measured) / len(MEASURED_STEPS), plan.seconds - (now - begun)
            bar.total = steps = min(steps, step + max(1, int(left / each)))
        for group in optimiser.param_groups:
            group["lr"] = plan.rate * _schedule(step, steps)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        since.append(value.detach())
        step += 1
        bar.update()
        if step % 100 == 0 or step == steps:
            train.append((step, round(torch.stack(since).mean().item(), 4)))
            since = []
        if held_out is not None and (step % 500 == 0 or step == steps):
            checks.append((step, round(held_out(), 4)))
            bar.set_postfix(held_out=checks[-1][1])
    bar.close()
    return Curve(
        steps=step,
        seconds=round(clock(device) - begun, 1),
        tokens_per_step=plan.rows * plan.length,
        train=train,
        held_out=checks,
    )


def clock(device: torch.device) -> float:
    """Seconds once the device has done what it was given: for budgets, not for measurements."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # noqa: TID251
    return time.monotonic()  # noqa: TID251


def _schedule(step: int, steps: int) -> float:
    warm = min(1.0, (step + 1) / 100)
    return warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def half_precision(device: torch.device) -> torch.autocast:
    """The bf16 autocast of all training passes; off on a CPU."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")


def fit_target(target: Llama, rows: Rows, plan: Plan, held_out: Callable[[], float]) -> Curve:
    """Train a language model on text."""

    def loss(step: int) -> Tensor:
        batch = rows.take(plan.rows)
        with half_precision(batch.device):
            logits = target(batch[:, :-1]).logits
        return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())

    target.train()
    curve = optimise(plan, list(target.parameters()), loss, held_out=held_out, name="target")
    target.eval()
    return curve


def own_text(model: Llama, rows: Rows, *, batches: int, batch: int) -> Tensor:
    """Greedy continuations of training prompts, [batches * batch, rows.length].

    The prompts take 5/16 to 11/16 of a row.
    """
    texts = []
    for index in tqdm(range(batches), desc="own text", mininterval=15):
        size = rows.length * (5 + 2 * (index % 4)) // 16
        prompts = rows.take(batch)[:, :size]
        dtype = torch.bfloat16 if prompts.is_cuda else torch.float32
        texts.append(continue_greedily(model, prompts, rows.length - size, dtype=dtype))
    return torch.cat(texts)


def mixed_batches(rows: Rows, texts: Sequence[Tensor], plan: Plan) -> Iterator[Tensor]:
    """Batches by turns from each set of own text and, every fourth, from real text."""
    generator = torch.Generator().manual_seed(plan.seed)
    turn = 0
    while True:
        turn += 1
        if turn % 4 == 0:
            yield rows.take(max(1, plan.rows * plan.length // rows.length))
            continue
        text = texts[turn % len(texts)]
        chosen = torch.randint(len(text), (plan.rows,), generator=generator)
        yield text[chosen.to(text.device)]


def sharpened(logits: Tensor, share: float) -> Tensor:
    """The distribution of logits [..., V] with a share of its mass moved to its first choice."""
    soft = logits.float().softmax(-1) * (1 - share)
    first = logits.argmax(-1, keepdim=True)
    return soft.scatter_add_(-1, first, torch.full_like(first, share, dtype=soft.dtype))


def fit_small(
    small: Llama,
    target: Llama,
    batches: Iterator[Tensor],
    plan: Plan,
    held_out: Callable[[], float],
) -> Curve:
    """Distil a small model from the target's distribution, a quarter of it on its first choice."""

    def loss(step: int) -> Tensor:
        batch = next(batches)[:, :-1]
        with half_precision(batch.device):
            with torch.no_grad():
                aim = sharpened(target(batch).logits, 0.25)
            logits = small(batch).logits
        return F.cross_entropy(logits.float().flatten(0, 1), aim.flatten(0, 1))

    small.train()
    curve = optimise(plan, list(small.parameters()), loss, held_out=held_out, name="small")
    small.eval()
    return curve


def fit_heads(
    heads: Sequence[Head], target: Llama, batches: Iterator[Tensor], plan: Plan, *, steps: int
) -> Curve:
    """Train heads on a frozen target, unrolled over their own outputs."""
    target.requires_grad_(False)
    device = target.model.norm.weight.device
    begin_heads(heads, target, next(batches))
    # The head's logits are its largest tensors: compiled, their float copies are never written.
    cross_entropy: CrossEntropy = soft_cross_entropy
    if device.type == "cuda":
        cross_entropy = torch.compile(soft_cross_entropy, dynamic=True)

    def loss(step: int) -> Tensor:
        batch = next(batches)
        with half_precision(batch.device):
            with torch.no_grad():
                seen = target(batch)
            losses = [
                head_loss(head, target, batch, seen, steps=steps, cross_entropy=cross_entropy)
                for head in heads
            ]
        return torch.stack(losses).sum()

    for head in heads:
        head.train()
    parameters = [parameter for head in heads for parameter in head.parameters()]
    curve = optimise(plan, parameters, loss, held_out=None, name="heads")
    for head in heads:
        head.eval()
    return curve


def begin_heads(heads: Sequence[Head], target: Llama, batch: Tensor) -> None:
    """Initialise EAGLE-2 heads by the size of what they will read."""
    with torch.no_grad():
        final = target(batch).final.float().square().mean().sqrt().item()
        embedding = target.model.embed_tokens.weight.square().mean().sqrt().item()
    for head in heads:
        if isinstance(head, Eagle2Head):
            head.begin(embedding=embedding, hidden=final)


def head_loss(
    head: Head, target: Llama, batch: Tensor, seen: Seen, *, steps: int, cross_entropy: CrossEntropy
) -> Tensor:
    """Cross-entropy with the target's distribution at every unrolled step, weighted 0.8 ** step.

    EAGLE-2 adds smooth-L1 regression on the target's final hidden state, in units of its root
    mean square, and reads it with uniform noise of a tenth of that. EAGLE-3 is trained where the
    target's first choice is in the draft vocabulary.
    """
    features = head.features(target, seen)[:, :-1]
    size = seen.final.float().square().mean().sqrt().to(features.dtype)
    if isinstance(head, Eagle2Head):
        features = features + 0.1 * (2 * torch.rand_like(features) - 1) * size
    kept = torch.ones_like(batch, dtype=torch.float32)
    aim_logits = seen.logits
    if isinstance(head, Eagle3Head):
        kept = head.t2d[aim_logits.argmax(-1)].float()
        aim_logits = aim_logits[..., head.t2d]
    aim = sharpened(aim_logits, 0.5)
    total = torch.zeros((), device=batch.device)
    for step, output in enumerate(unroll(head, target, batch, features, steps=steps)):
        rows = output.shape[1] - step
        logits = head.logits(target, output)[:, :rows]
        value = cross_entropy(logits, aim[:, step + 1 :], kept[:, step + 1 :])
        if isinstance(head, Eagle2Head):
            goal = seen.final[:, step + 1 :] / size
            value = value + 0.5 * F.smooth_l1_loss(output[:, :rows] / size, goal)
        total = total + value * 0.8**step
    return total / sum(0.8**step for step in range(steps))


def soft_cross_entropy(logits: Tensor, aim: Tensor, kept: Tensor) -> Tensor:
    """Mean cross-entropy of logits [B, n, V] with distributions, over rows where kept is 1."""
    each = -(aim * logits.float().log_softmax(-1)).sum(-1)
    return (each * kept).sum() / kept.sum()
