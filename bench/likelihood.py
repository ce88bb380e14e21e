"""What a window of text says of a model: its likelihood, and how far it is from another model.

Letters: n tokens of a window, D hidden, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.record import Quality
from bench.text import Window
from methods.transformer import Transformer

# Logits held at once: [rows, V] in float32 are 64 MiB, for any vocabulary.
CHUNK_LOGITS = 2**24


class Reader:
    """A model that reads one window after another into the same cache."""

    def __init__(self, model: Transformer, *, window: int) -> None:
        self.model = model
        self._kv = model.cache(window)

    def read(self, tokens: Tensor) -> Tensor:
        """tokens: [n] int64 -> hidden states [n, D]; positions begin at 0."""
        self._kv.rewind(0)
        positions = torch.arange(len(tokens), device=tokens.device)
        out: Tensor = self.model(tokens[None], positions, self._kv).hidden[0]
        return out

    def log_probs(self, hidden: Tensor) -> Tensor:
        """hidden: [rows, D] -> log-probabilities [rows, V], float32 or wider."""
        logits = self.model.logits(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def score(
    window: Window,
    tokens: Sequence[int],
    target: Reader,
    dense: Reader | None,
    *,
    chunk_logits: int = CHUNK_LOGITS,
) -> Quality:
    """Score a window's own tokens by the target; beside the dense model where it is given.

    tokens: of the whole text. dense: may be the target itself, which is then read once.
    """
    device = target.model.device
    read = torch.tensor(tokens[window.start : window.end], device=device)
    # Row i of the hidden states predicts token i + 1.
    rows = slice(window.first - window.start - 1, -1)
    labels = read[rows.start + 1 :]
    hidden = target.read(read)[rows]
    beside = dense.read(read)[rows] if dense is not None and dense is not target else hidden
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # nll, kl, agreements
    step = max(1, chunk_logits // target.model.shape.vocab_size)
    for start in range(0, len(labels), step):
        part = slice(start, start + step)
        own = target.log_probs(hidden[part])
        sums[0] -= own.gather(1, labels[part, None]).double().sum()
        if dense is not None:
            aim = own if dense is target else dense.log_probs(beside[part])
            sums[1] += (aim.exp() * (aim - own)).double().sum()
            sums[2] += (aim.argmax(dim=-1) == own.argmax(dim=-1)).sum()
    if not bool(sums.isfinite().all()):
        raise FloatingPointError(f"window {window.number} must have finite logits, got others")
    nll, kl, agreements = sums.tolist()
    return Quality(
        window=window.number,
        start=window.start,
        context=window.first - window.start,
        tokens=len(labels),
        nll_nats=nll,
        kl_nats=None if dense is None else kl,
        top1_agree=None if dense is None else int(agreements),
    )
