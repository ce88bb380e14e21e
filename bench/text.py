"""A running text, and the windows that slide over it: what a perplexity is measured on.

    text = ...                                   # from conf/task/perplexity.yaml or wikitext2.yaml
    tokens = encode(tokenizer, text)[: evaluation.limit]
    for window in windows(len(tokens), evaluation): ...

The text begins with one BOS where the tokenizer has one; no window after the first does. Every
token but the very first is scored exactly once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.source import Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Text(Source):
    """Rows that are read as one text."""

    text_key: str
    separator: str  # put between two rows

    def read(self) -> str:
        """Join the rows; ValueError where there is no text."""
        joined = self.separator.join(str(row.get(self.text_key)) for row in self.rows())
        if not joined.strip():
            raise ValueError(f"task {self.name}: the data must have a text, got none")
        return joined


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What the quality door measures; the keys of `quality` in conf/quality.yaml.

    reference: folder of the dense model; None = the target's own.
    """

    window: int
    stride: int
    limit: int | None
    kl: bool
    reference: str | None

    def __post_init__(self) -> None:
        for name, least in (("window", 2), ("stride", 1), ("limit", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if self.stride >= self.window:  # the first token of a window would never be scored
            raise ValueError(f"stride must be below window={self.window}, got {self.stride}")
        if self.reference is not None and not self.kl:
            raise ValueError(f"reference must be null where kl is false, got {self.reference}")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Tokens [start, end) of a text are read, and those from `first` on are scored."""

    number: int
    start: int
    first: int
    end: int


def windows(num_tokens: int, evaluation: Evaluation) -> Iterator[Window]:
    """Slide a window over a text; each scores what no earlier one has.

    So a token has at least window - stride tokens before it, except near the start of the text.
    """
    number, start, first = 0, 0, 1  # token 0 has nothing before it
    while first < num_tokens:
        end = min(start + evaluation.window, num_tokens)
        yield Window(number=number, start=start, first=first, end=end)
        number, start, first = number + 1, start + evaluation.stride, end


def encode(tokenizer: "PreTrainedTokenizerBase", text: Text) -> list[int]:
    """Token ids of a whole text; ValueError where there are fewer than two."""
    # verbose: the text may be longer than the model's positions, a window is not.
    ids: list[int] = tokenizer(text.read(), add_special_tokens=False, verbose=False)["input_ids"]
    bos: int | None = tokenizer.bos_token_id
    tokens = ids if bos is None else [bos, *ids]
    if len(tokens) < 2:
        raise ValueError(f"task {text.name}: the text must have two tokens or more, got {tokens}")
    return tokens
