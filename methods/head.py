"""A draft head's folder: its sizes, and its tensors by EAGLE's own names, whoever published it.

Two forms are read: that of the EAGLE authors (github.com/SafeAILab/EAGLE), and that of vLLM's
speculators (github.com/vllm-project/speculators), whose config.json holds the layer's own as
`transformer_layer_config` and whose tensors are named otherwise.
"""

from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.architecture import read_shape
from methods.head_shapes import EMBEDDING, SPECULATORS, head_method
from methods.rotation import Rotation
from methods.transformer import Shape, Transformer
from methods.values import naming, read_flag, read_section, read_size, shown
from methods.weights import Weights, read_config
from quant.formats import Spec
from quant.scheme import is_finite

EAGLE, EAGLE3 = "eagle", "eagle3"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

# How names begin in speculators' files -> in EAGLE's.
RENAMED = {
    EAGLE: {"fusion_fc.": "fc.", "transformer.": "layers.0."},
    EAGLE3: {"layers.0.": "midlayer."},
}
# speculators writes only what differs from the defaults of transformers' LlamaConfig.
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}
# Variants that nothing here computes, by the key that asks for them.
REFUSED = {EAGLE: ("layernorms",), EAGLE3: ("norm_before_fc", "fc_norm")}
ROWS = 4096  # compared at once, so that a large embedding is never copied whole
ROUNDING = 2.0**-7  # relative to a row: what two roundings to bfloat16 may change


@dataclass(frozen=True, kw_only=True)
class HeadFiles:
    """A head's folder in EAGLE's terms. config: the keys of EAGLE's config.json."""

    folder: Path
    config: Mapping[str, Any]
    shape: Shape
    weights: Weights

    def size(self, key: str, *, default: int | None = None) -> int:
        """Give a size of the config, or raise ValueError."""
        with naming(self.folder / "config.json"):
            return read_size(self.config, key, default=default)

    def flag(self, key: str, *, default: bool = False) -> bool:
        """Give a switch of the config, or raise ValueError."""
        with naming(self.folder / "config.json"):
            return read_flag(self.config, key, default=default)

    def section(self, key: str) -> Mapping[str, Any]:
        """Give an object of the config, empty where there is none, or raise ValueError."""
        with naming(self.folder / "config.json"):
            return read_section(self.config, key)

    def require(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        optional: Mapping[str, tuple[int, ...] | Spec],
    ) -> None:
        """Check that the folder holds these tensors, dense, or raise ValueError."""
        if quantized := self.config.get("quantization_config"):
            # Heads that inherit a quantised target's config may be dense all the same.
            present = [self.weights.spec(n) for n in shapes.keys() & self.weights.keys()]
            if len(present) < len(shapes) or any(s.dtypes[0] not in FLOATS for s in present):
                method = quantized.get("quant_method") if isinstance(quantized, dict) else quantized
                raise ValueError(
                    f"{self.folder}: a draft head must be stored dense, got quantization_config "
                    f"{shown(method)}"
                )
        floats = {name: Spec(dtypes=FLOATS, shape=shape) for name, shape in shapes.items()}
        self.weights.require(floats, optional=optional)

    def tensors(self, *, besides: Set[str]) -> dict[str, Tensor]:
        """Read all tensors but some."""
        return {name: self.weights[name] for name in self.weights.keys() - besides}

    def own_embedding(self, target: Transformer, rotation: Rotation | None) -> Tensor | None:
        """Give the head's embedding; None where it has none, or a copy of the target's.

        rotation: the target's, whose embedding is then compared as it was before.
        """
        if EMBEDDING not in self.weights:
            return None
        own = self.weights[EMBEDDING].to(target.device, target.dtype)
        if not is_finite(own):
            raise ValueError(
                f"{self.folder}: {EMBEDDING} must be finite in {own.dtype}, got infinities or NaNs"
            )
        if own.shape != target.embedding.shape:
            return own
        pieces = -(-len(own) // ROWS)
        both = (own.chunk(pieces), target.embedding.chunk(pieces))
        for mine, theirs in zip(*both, strict=True):
            original = theirs.float() if rotation is None else rotation.original(theirs)
            apart = (mine.float() - original).norm(dim=1)
            if not bool((apart <= ROUNDING * original.norm(dim=1)).all()):
                return own
        return None


def open_head(
    folder: Path, kind: str, target: Shape, *, device: torch.device | None = None
) -> HeadFiles:
    """Open a head's folder without reading its weights; ValueError where it is of another kind.

    kind: EAGLE or EAGLE3. device: as of `Weights`.
    """
    config = read_config(folder)
    renamed = None
    if "speculators_model_type" in config:
        config = _from_speculators(config, kind, folder)
        renamed = RENAMED[kind]
    layers = config.get("num_hidden_layers", 1)
    if layers != 1:
        raise ValueError(
            f"{folder}: num_hidden_layers must be 1 in a draft head, got {shown(layers)}"
        )
    for key in REFUSED[kind]:
        if config.get(key):
            raise ValueError(f"{folder}: {key} must be false, nothing here computes it")
    weights = Weights(folder, renamed=renamed, device=device)
    found, wanted = head_method(config, weights.keys()), SPECULATORS[kind]
    if found not in (wanted, None):
        raise ValueError(
            f"{folder} must hold a head of {wanted}, got one of {found}, which "
            f"model.heads.{found} takes"
        )
    # EAGLE's code asks this key, not the family; files without it have biases or have none.
    biased = any(name.endswith("q_proj.bias") for name in weights)
    with naming(folder):
        shape = read_shape({"qkv_bias": biased} | config)
    if shape.vocab_size != target.vocab_size:
        raise ValueError(
            f"{folder}: vocab_size must be the target's {target.vocab_size}, got {shape.vocab_size}"
        )
    return HeadFiles(folder=folder, config=config, shape=shape, weights=weights)


def kept_rows(own: Tensor, draft_ids: Tensor | None) -> Tensor | None:
    """Tell which rows of an lm_head score tokens of a list, in their own order; None = all.

    own: [V], the target's id of each row. draft_ids: [k], of the target; None = no list.
    """
    return None if draft_ids is None else torch.isin(own, draft_ids).nonzero().flatten()


def _from_speculators(config: Mapping[str, Any], kind: str, folder: Path) -> dict[str, Any]:
    """Bring speculators' keys into the form of EAGLE's config.json."""
    found = config["speculators_model_type"]
    if found != kind:
        raise ValueError(f"{folder}: speculators_model_type must be {kind}, got {shown(found)}")
    layer = config.get("transformer_layer_config")
    if not isinstance(layer, Mapping) or layer.get("model_type", "llama") != "llama":
        got = layer.get("model_type") if isinstance(layer, Mapping) else layer
        raise ValueError(f"{folder}: transformer_layer_config must be a llama's, got {shown(got)}")
    if "sliding_attention" in str(layer.get("layer_types")):
        raise ValueError(f"{folder}: layer_types must be full_attention, got sliding_attention")
    own = {key: value for key, value in config.items() if key != "transformer_layer_config"}
    flat = LLAMA_DEFAULTS | dict(layer) | own
    # The whole config's own type names the head, not the layer's architecture.
    return flat | {"model_type": "llama", "bias": config.get("fusion_bias") or False}
