"""The tensors of draft heads, by EAGLE's own names: what a folder must hold, or is filled with."""

from collections.abc import Collection, Mapping
from typing import Any

from methods.architecture import EMBEDDING as MODEL_EMBEDDING
from methods.architecture import block_shapes
from methods.transformer import Shape

FC, FC_BIAS, EMBEDDING, LM_HEAD = "fc.weight", "fc.bias", "embed_tokens.weight", "lm_head.weight"
OFFSETS, KEPT = "d2t", "t2d"  # of a draft vocabulary

SPECULATORS = {"eagle": "eagle2", "eagle3": "eagle3"}  # speculators' own names of them
EAGLE2_PREFIX, EAGLE3_PREFIX = "layers.0.", "midlayer."
EAGLE3_EMBEDDING_NORM = f"{EAGLE3_PREFIX}input_layernorm.weight"


def eagle2_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of an EAGLE-1/2 head that must be there."""
    hidden = shape.hidden_size
    return {FC: (hidden, 2 * hidden)} | block_shapes(EAGLE2_PREFIX, shape, attention_in=hidden)


def eagle3_shapes(
    shape: Shape, draft_vocab: int, *, taps: int, width: int
) -> dict[str, tuple[int, ...]]:
    """Every tensor of an EAGLE-3 head that must be there.

    taps, width: how many streams of the target it reads, and how wide they are.
    """
    hidden = shape.hidden_size
    return {
        FC: (hidden, taps * width),
        EAGLE3_EMBEDDING_NORM: (hidden,),
        f"{EAGLE3_PREFIX}hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
        LM_HEAD: (draft_vocab, hidden),
    } | block_shapes(EAGLE3_PREFIX, shape, attention_in=2 * hidden)


def head_method(config: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Tell which method's head a folder holds, by its config.json and tensors; None where none's.

    eagle2 stands for EAGLE-1 as well, whose heads are the same.
    """
    if "speculators_model_type" in config:
        return SPECULATORS.get(str(config["speculators_model_type"]))
    if FC not in names or MODEL_EMBEDDING in names:
        return None
    return "eagle3" if any(name.startswith(EAGLE3_PREFIX) for name in names) else "eagle2"
