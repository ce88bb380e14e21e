"""A reduced draft vocabulary: the tokens that a draft head may propose (FR-Spec, arXiv 2502.14856).

A head's lm_head costs in proportion to how many tokens it scores, and most of what is right is
frequent. A list holds token ids of the target, most frequent first; the target still decides over
its whole vocabulary, so a list can cost acceptance and never the text.

Read are what `specquant vocab` writes, a JSON array of ids, and the lists that FR-Spec published,
`.pt` files of ids.

Letters: k listed, V vocabulary.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.build import ROOT, typed
from bench.identity import WeightHashes, digest
from bench.source import Source
from methods.architecture import read_shape
from methods.random_weights import TRANSFORMER, Draw, even_ids, is_random
from methods.shards import BROKEN
from methods.values import naming, parse_json, read_json, shown
from methods.weights import read_config

TOKENIZER = "tokenizer.json"
# Keys of `method`; the first is also a choice that labels a cell.
DRAFT_VOCAB, DRAFT_VOCAB_SIZE = "draft_vocab", "draft_vocab_size"
PICKLED = ".pt"


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """Token ids, most frequent first, as a file has them.

    counts: how often each occurs; tokens: how many were counted; text, origin: the text's name, and
    what tells it from others; tokenizer: digest of the vocabulary. Empty where a file does not say.
    """

    ids: list[int]
    counts: list[int] = field(default_factory=list)
    tokens: int = 0
    text: str = ""
    origin: str = ""
    tokenizer: str = ""
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("a draft vocabulary must list token ids, got none")
        wrong = next((i for i in self.ids if type(i) is not int or i < 0), None)
        if wrong is not None:
            raise ValueError(f"token ids must be integers from 0 on, got {shown(wrong)}")
        twice = [i for i, times in Counter(self.ids).items() if times > 1]
        if twice:
            raise ValueError(f"token ids must differ, got {twice[0]} twice")
        counted = [self.tokens, *self.counts] if isinstance(self.counts, list) else [None]
        if len(counted) not in (1, 1 + len(self.ids)) or any(type(n) is not int for n in counted):
            raise ValueError(
                f"counts must be an integer for each of {len(self.ids)} ids, and tokens one, "
                f"got {shown(self.counts)} of {shown(self.tokens)}"
            )

    def covers(self, size: int) -> float | None:
        """Share of the counted tokens that the first `size` ids are; None where nobody counted."""
        return sum(self.counts[:size]) / self.tokens if self.counts and self.tokens else None


@dataclass(frozen=True, kw_only=True)
class DraftVocab:
    """What is asked for: two keys of `method` in conf/base.yaml, whose meaning is written there."""

    draft_vocab: str | None = None
    draft_vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.draft_vocab_size is not None and self.draft_vocab_size < 1:
            raise ValueError(f"draft_vocab_size must be 1 or more, got {self.draft_vocab_size}")

    @property
    def file(self) -> Path | None:
        """The list; None where there is none."""
        return None if self.draft_vocab is None else ROOT / Path(self.draft_vocab).expanduser()

    @property
    def label(self) -> str:
        """For tables, after the drafter's scheme; empty where the vocabulary is whole."""
        name = [] if self.file is None else [self.file.stem]
        size = [] if self.draft_vocab_size is None else [str(self.draft_vocab_size)]
        return f"+vocab:{'-'.join(name + size)}" if name or size else ""

    def read(self) -> Ranking | None:
        """Read the list, if there is one; ValueError where it is none."""
        return None if self.file is None else read_ranking(self.file)

    def ids(self, target: Path) -> Tensor | None:
        """Tokens that a head may propose, [k] int64; None = all. target: the model's folder.

        Raises ValueError where the list is not one of the target's vocabulary.
        """
        return self._ids(self.read(), target)

    def facts(self, target: Path) -> dict[str, Any] | None:
        """What a cell's context tells of it; None where the vocabulary is whole."""
        ranking, file = self.read(), self.file
        ids = self._ids(ranking, target)
        if ids is None:
            return None
        known: dict[str, Any] = {"size": len(ids), "of": read_shape(read_config(target)).vocab_size}
        if ranking is None or file is None:
            return known | {"file": None}  # at even distances
        hashes = WeightHashes(None).of([], [file])
        return known | {
            "file": file.name,
            "sha256": next(iter(hashes.values())),
            "text": ranking.text,
            "covers": ranking.covers(len(ids)),
        }

    def _ids(self, ranking: Ranking | None, target: Path) -> Tensor | None:
        size = self.draft_vocab_size
        vocab = read_shape(read_config(target)).vocab_size
        if ranking is not None:
            with naming(self.file):
                _check_fit(ranking, target, vocab)
        if ranking is None and size is None:
            return None
        if ranking is None and not is_random(target):
            raise ValueError(
                "draft_vocab must be a file of token ids where draft_vocab_size is given, unless "
                f"weights are random, got null and {size}"
            )
        most = vocab if ranking is None else len(ranking.ids)
        if size is not None and size > most:
            where = "vocabulary" if ranking is None else f"list {self.file}"
            raise ValueError(f"draft_vocab_size must be within the {where} of {most}, got {size}")
        if ranking is None:
            return even_ids(size or vocab, vocab)
        return torch.tensor(ranking.ids[:size])


def parse_draft_vocab(method: Mapping[str, Any]) -> DraftVocab:
    """Read the two keys of a method's node."""
    keys = (DRAFT_VOCAB, DRAFT_VOCAB_SIZE)
    return typed({k: method[k] for k in keys if k in method}, DraftVocab, key="method")


def read_ranking(path: Path) -> Ranking:
    """Read a list of token ids, or raise ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"method.{DRAFT_VOCAB} must be a file of token ids, got {path}")
    with naming(path):
        found = _unpickled(path) if path.suffix == PICKLED else _parsed(path)
        if isinstance(found, dict):
            try:
                return Ranking(**found)
            except TypeError as error:
                raise ValueError(f"must be a list of token ids: {error}") from error
        return Ranking(ids=found)


def _parsed(path: Path) -> dict[str, Any] | list[int]:
    try:
        found = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"must be JSON, or {PICKLED}, of token ids: {error}") from error
    if isinstance(found, dict) and isinstance(found.get("ids"), list):
        return found
    if isinstance(found, list):
        return found
    raise ValueError(
        f"must be a JSON array of token ids, or an object with ids, got {shown(found)}"
    )


def _unpickled(path: Path) -> list[int]:
    """Read what torch.save made of ids; nothing else is unpickled, so no code in it can run."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"must be a whole pickle of nothing but token ids: {reason}") from error
    if isinstance(found, Tensor) and found.ndim == 1 and not found.is_floating_point():
        found = found.tolist()
    if not isinstance(found, list):
        raise ValueError(f"must hold a list of token ids, got {type(found).__name__}")
    return found


def _check_fit(ranking: Ranking, target: Path, vocab: int) -> None:
    """Check that a list is of a target's vocabulary."""
    if ranking.vocab_size not in (None, vocab):
        raise ValueError(
            f"vocab_size must be {vocab}, that of {target}, got {shown(ranking.vocab_size)}"
        )
    if (highest := max(ranking.ids)) >= vocab:
        raise ValueError(f"token ids must be below {vocab}, as {target} has them, got {highest}")
    own = tokenizer_digest(target)
    if ranking.tokenizer and own and not is_random(target) and ranking.tokenizer != own:
        raise ValueError(f"the list must be counted with the tokenizer of {target}, got another's")


def check_unseen(ranking: Ranking, source: Source) -> None:
    """Check that a list was not counted on the very prompts, or raise ValueError."""
    if ranking.origin and ranking.origin == origin_of(source):
        raise ValueError(
            f"method.{DRAFT_VOCAB} must be counted on another text than the prompts of task "
            f"{source.name}, got {ranking.text}"
        )


def origin_of(source: Source) -> str:
    """What tells a text from others: a file's content, or a data set's name; empty for neither."""
    if (file := source.file) is not None:
        hashes = WeightHashes(None).of([], [file])
        return f"sha256:{next(iter(hashes.values()))}"
    if source.hub is None:
        return ""
    return f"hub:{source.hub}/{source.hub_config}/{source.hub_split}"


def tokenizer_digest(folder: Path) -> str:
    """Hash a model's tokens and their ids; empty where it has no tokenizer file."""
    found = vocabulary(folder)
    return "" if found is None else digest(found)


def vocabulary(folder: Path) -> tuple[object, object] | None:
    """Tokens and their ids; None for a draft head, which has no tokenizer of its own."""
    path = folder / TOKENIZER
    if is_random(folder) and Draw.read(folder).holds == TRANSFORMER:
        return "numbers", read_shape(read_config(folder)).vocab_size
    if not path.is_file():
        return None
    try:
        values = read_json(path)
        added = [(token["id"], token["content"]) for token in values.get("added_tokens", [])]
        return values["model"]["vocab"], added
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} must be a tokenizer: {error!r}") from error
