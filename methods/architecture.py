"""config.json -> sizes, and the names and shapes of the tensors that go with them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from methods.rope import POSITIONS, Rope, read_rope
from methods.transformer import Shape
from methods.values import naming, read_flag, read_number, read_size, shown
from quant.formats import FLOATS, Quantization, Spec

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
# Projections of the same input, which are read as one layer: some files hold them so.
QKV, GATE_UP = "qkv_proj", "gate_up_proj"
FUSED = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Keys that a family must spell out, since transformers fills them in with numbers of its own.
NEEDED = {
    "mistral": ("num_key_value_heads", "sliding_window"),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
FULL, SLIDING = "full_attention", "sliding_attention"

LAYER = re.compile(r"model\.layers\.\d+\.")
DENSE = (*FLOATS, torch.float64)
Tensors = dict[str, tuple[int, ...] | Spec]


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Take the sizes from a configuration of one of FAMILIES, or raise ValueError naming the key.

    Sizes are integers from 1 on and numbers are finite; that a file's tensors have those sizes is
    for `require_layers` and `Weights.require` to check. What transformers computes from the same
    keys is what is meant. Where a layer attends to a sliding window, `max_positions` ends with the
    window: within it nothing has slid out of sight, so that a context there is exact.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"config.json: model_type must be one of {', '.join(FAMILIES)}, got {shown(family)}"
        )
    for key, plain in (("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, plain) != plain:
            raise ValueError(f"config.json: {key} must be {plain}, got {shown(config[key])}")
    if missing := [key for key in NEEDED.get(family, ()) if key not in config]:
        raise ValueError(f"config.json must have {missing[0]!r}")
    rope = read_rope(config)
    with naming("config.json"):
        return _shape(config, family, rope)


def require_layers(shape: Shape, names: Iterable[str]) -> None:
    """Check how many layers these tensors are of, before anything is made for each layer."""
    numbers = {name.split(".")[2] for name in names if LAYER.match(name)}
    if shape.num_layers != len(numbers):
        raise ValueError(
            f"num_hidden_layers must be {len(numbers)}, since the files hold so many layers, "
            f"got {shape.num_layers}"
        )


def transformer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a dense checkpoint, by its published name."""
    hidden = shape.hidden_size
    expected = {EMBEDDING: (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not shape.tied:
        expected[OUTPUT] = (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        expected |= block_shapes(prefix, shape, attention_in=hidden)
        expected[f"{prefix}input_layernorm.weight"] = (hidden,)
    return expected


def block_shapes(prefix: str, shape: Shape, *, attention_in: int) -> dict[str, tuple[int, ...]]:
    """The tensors that every decoder layer has, also an EAGLE head's."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    place = f"{prefix}self_attn."
    shapes: dict[str, tuple[int, ...]] = {
        f"{place}q_proj.weight": (queries, attention_in),
        f"{place}k_proj.weight": (keys, attention_in),
        f"{place}v_proj.weight": (keys, attention_in),
        f"{place}o_proj.weight": (hidden, queries),
        f"{prefix}mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}mlp.up_proj.weight": (inner, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, inner),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }
    if shape.qkv_bias:
        shapes |= {f"{place}q_proj.bias": (queries,)}
        shapes |= {f"{place}{part}_proj.bias": (keys,) for part in ("k", "v")}
    if shape.out_bias:
        shapes[f"{place}o_proj.bias"] = (hidden,)
    if shape.head_norms:
        shapes |= {f"{place}{part}_norm.weight": (shape.head_dim,) for part in ("q", "k")}
    return shapes


def stacked_shapes(shape: Shape) -> dict[str, tuple[int, int]]:
    """The linear layers of a model as they are decoded, [N, K]: what has one input is stacked."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        "qkv": (queries + 2 * keys, hidden),
        "o": (hidden, queries),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "lm_head": (shape.vocab_size, hidden),
    }


def stored_tensors(shape: Shape, quantization: Quantization | None) -> tuple[Tensors, Tensors]:
    """Every tensor of a checkpoint, required and optional, where some layers may be quantised."""
    shapes = transformer_shapes(shape)
    if quantization is not None and quantization.fused:
        shapes = fused_shapes(shapes)
    required: Tensors = {}
    # Llama 2's files hold the plain frequencies, which config.json says better.
    optional: Tensors = {
        f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": (shape.head_dim // 2,)
        for layer in range(shape.num_layers)
    }
    if shape.tied:  # a copy of the embedding, as is checked on reading
        optional[OUTPUT] = Spec(dtypes=DENSE, shape=shapes[EMBEDDING])
    for name, size in shapes.items():
        module = name.removesuffix(".weight")
        layout = None
        if quantization is not None and len(size) == 2 and name != EMBEDDING:
            layout = quantization.layout(module)
        if layout is None:
            required[name] = Spec(dtypes=DENSE, shape=size)
            continue
        try:
            required |= {f"{module}.{k}": v for k, v in layout.specs(*size).items()}
            optional |= {f"{module}.{k}": v for k, v in layout.optional(*size).items()}
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        # GPTQ's older writers give every layer a bias: of zeros, as is checked on reading.
        if f"{module}.bias" not in shapes:
            optional[f"{module}.bias"] = size[:1]
    return required, optional


def fused_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Put fused projections in the place of their parts."""
    fused: dict[str, tuple[int, ...]] = {}
    whole = {part: name for name, parts in FUSED.items() for part in parts}
    for name, size in shapes.items():
        words = [whole.get(word, word) for word in name.split(".")]
        joined = ".".join(words)
        rows = fused[joined][0] if joined in fused else 0
        fused[joined] = (rows + size[0], *size[1:])
    return fused


def _shape(config: Mapping[str, Any], family: str, rope: Rope) -> Shape:
    heads, hidden = read_size(config, "num_attention_heads"), read_size(config, "hidden_size")
    bias = family in ("llama", "qwen3") and read_flag(config, "attention_bias")
    head_dim = read_size(config, "head_dim", default=hidden // heads)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even, two halves being turned, got {head_dim}")
    return Shape(
        vocab_size=read_size(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=read_size(config, "intermediate_size"),
        num_layers=read_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=read_size(config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
        norm_eps=read_number(config, "rms_norm_eps"),
        max_positions=_max_positions(config, rope),
        rope=rope,
        tied=read_flag(config, "tie_word_embeddings"),
        # `qkv_bias` is a key of published EAGLE heads, whatever their model_type.
        qkv_bias=read_flag(config, "qkv_bias", default=bias or family == "qwen2"),
        out_bias=bias,
        head_norms=family == "qwen3",
    )


def _max_positions(config: Mapping[str, Any], rope: Rope) -> int:
    """Positions that a context may have: trained for or stretched to, within any window."""
    most = read_size(config, POSITIONS)
    if rope.scaling is not None:
        most = max(most, rope.scaling.reach)
    window = _window(config)
    return most if window is None else min(most, window)


def _window(config: Mapping[str, Any]) -> int | None:
    """Tokens that a layer sees at most, itself included; None where all layers see everything."""
    if config["model_type"] == "llama":
        return None
    given = config.get("sliding_window")
    window = None if given is None else read_size(config, "sliding_window")
    if config["model_type"] == "mistral":
        return window
    if not read_flag(config, "use_sliding_window"):
        window = None
    kinds = config.get("layer_types")
    if kinds is None:
        if window is None:
            return None
        full = read_size(config, "max_window_layers", least=0)
        return window if full < read_size(config, "num_hidden_layers") else None
    known = [FULL] if window is None else [FULL, SLIDING]
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise ValueError(
            f"layer_types must be {FULL}, or {SLIDING} where use_sliding_window is true and "
            f"there is a sliding_window, got {shown(kinds)}"
        )
    return window if SLIDING in kinds else None
