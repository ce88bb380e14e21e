"""The scheme of every part of a cell, from the nodes that name them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.build import ROOT, build, named_node, without
from bench.draft_vocab import DRAFT_VOCAB, DRAFT_VOCAB_SIZE
from quant.scheme import Scheme

# Keys that name a scheme: in the configuration a file of conf/quant, here its content.
DENSE, LM_HEAD, DRAFT_SCHEME, DRAFT_LM_HEAD = "dense", "lm_head", "draft_scheme", "draft_lm_head"
NAMED = (("quant", LM_HEAD), ("method", DRAFT_SCHEME), ("method", DRAFT_LM_HEAD))  # their nodes
# Keys of `method` that are of what drafts, whatever the method.
DRAFTING = (DRAFT_SCHEME, DRAFT_LM_HEAD, DRAFT_VOCAB, DRAFT_VOCAB_SIZE)


@dataclass(frozen=True, kw_only=True)
class Schemes:
    """The scheme of every part. draft_lm_head: None leaves it to the method."""

    target: Scheme
    lm_head: Scheme
    draft: Scheme
    draft_lm_head: Scheme | None
    dense: Scheme

    @property
    def unsearched(self) -> "Schemes":
        """The same formats, rounded plainly: for weights that mean nothing."""
        return Schemes(
            target=self.target.unsearched,
            lm_head=self.lm_head.unsearched,
            draft=self.draft.unsearched,
            draft_lm_head=self.draft_lm_head and self.draft_lm_head.unsearched,
            dense=self.dense,
        )


def every_scheme() -> Iterator[tuple[str, Scheme]]:
    """Give each file of conf/quant by its name."""
    for path in sorted((ROOT / "conf" / "quant").glob("*.yaml")):
        node = named_node("quant", path.stem, key="quant")
        yield path.stem, build(node, Scheme, key="quant")  # type: ignore[type-abstract]


def parse_schemes(quant: Mapping[str, Any], method: Mapping[str, Any]) -> Schemes:
    """Build the schemes of the target, and of the drafter; one that is absent is dense."""
    dense = named_node("quant", DENSE, key="quant")
    draft_lm_head = method.get(DRAFT_LM_HEAD)
    return Schemes(
        target=_scheme(without(quant, LM_HEAD), "quant"),
        lm_head=_scheme(quant[LM_HEAD], f"quant.{LM_HEAD}"),
        draft=_scheme(method.get(DRAFT_SCHEME) or dense, f"method.{DRAFT_SCHEME}"),
        draft_lm_head=draft_lm_head and _scheme(draft_lm_head, f"method.{DRAFT_LM_HEAD}"),
        dense=_scheme(dense, "quant"),
    )


def _scheme(node: object, key: str) -> Scheme:
    return build(node, Scheme, key=key)  # type: ignore[type-abstract]
