"""config.json -> sizes, and the names and shapes of the tensors that go with them."""

from collections.abc import Mapping
from typing import Any

from methods.rope import Rope
from methods.transformer import Shape
from quant.formats import Quantization, Spec

EMBEDDING = "model.embed_tokens.weight"
# Projections of the same input, which are read as one layer: some files hold them so.
QKV, GATE_UP = "qkv_proj", "gate_up_proj"
FUSED = {QKV: ("q_proj", "k_proj", "v_proj"), GATE_UP: ("gate_proj", "up_proj")}

Tensors = dict[str, tuple[int, ...] | Spec]


def read_shape(config: Mapping[str, Any]) -> Shape:
    """Take the sizes from a Llama configuration, or raise ValueError naming the key."""
    for key, plain in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if config.get(key, plain) != plain:
            raise ValueError(f"config.json: {key} must be {plain}, got {config[key]}")
    try:
        heads = config["num_attention_heads"]
        return Shape(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            norm_eps=config["rms_norm_eps"],
            max_positions=config["max_position_embeddings"],
            rope=_read_rope(config),
            tied=bool(config.get("tie_word_embeddings")),
        )
    except KeyError as error:
        raise ValueError(f"config.json must have {error}") from error


def transformer_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Every tensor of a Llama checkpoint, by its published name."""
    hidden = shape.hidden_size
    expected = {EMBEDDING: (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not shape.tied:
        expected["lm_head.weight"] = (shape.vocab_size, hidden)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}."
        expected |= block_shapes(prefix, shape, attention_in=hidden)
        expected[f"{prefix}input_layernorm.weight"] = (hidden,)
    return expected


def block_shapes(prefix: str, shape: Shape, *, attention_in: int) -> dict[str, tuple[int, ...]]:
    """The tensors that every decoder layer has, also an EAGLE head's."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    return {
        f"{prefix}self_attn.q_proj.weight": (queries, attention_in),
        f"{prefix}self_attn.k_proj.weight": (keys, attention_in),
        f"{prefix}self_attn.v_proj.weight": (keys, attention_in),
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        f"{prefix}mlp.gate_proj.weight": (inner, hidden),
        f"{prefix}mlp.up_proj.weight": (inner, hidden),
        f"{prefix}mlp.down_proj.weight": (hidden, inner),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
    }


def stored_tensors(shape: Shape, quantization: Quantization | None) -> tuple[Tensors, Tensors]:
    """Every tensor of a checkpoint, required and optional, where some layers are quantised."""
    shapes = transformer_shapes(shape)
    if quantization is None:
        return {**shapes}, {}
    if quantization.fused:
        shapes = _fused(shapes)
    required: Tensors = {}
    optional: Tensors = {}
    for name, size in shapes.items():
        module = name.removesuffix(".weight")
        layout = None
        if len(size) == 2 and name != EMBEDDING:
            layout = quantization.layout(module)
        if layout is None:
            required[name] = size
            continue
        try:
            required |= {f"{module}.{k}": v for k, v in layout.specs(*size).items()}
            optional |= {f"{module}.{k}": v for k, v in layout.optional(*size).items()}
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
    return required, optional


def _fused(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Put fused projections in the place of their parts."""
    fused: dict[str, tuple[int, ...]] = {}
    whole = {part: name for name, parts in FUSED.items() for part in parts}
    for name, size in shapes.items():
        words = [whole.get(word, word) for word in name.split(".")]
        joined = ".".join(words)
        rows = fused[joined][0] if joined in fused else 0
        fused[joined] = (rows + size[0], *size[1:])
    return fused


def _read_rope(config: Mapping[str, Any]) -> Rope:
    values = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = values.get("rope_type", values.get("type", "default"))
    theta = values.get("rope_theta", config.get("rope_theta", 10000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "llama3":
        return Rope(
            theta=theta,
            factor=values["factor"],
            low_freq_factor=values["low_freq_factor"],
            high_freq_factor=values["high_freq_factor"],
            original_max_positions=values["original_max_position_embeddings"],
        )
    raise ValueError(f"config.json: rope type must be default or llama3, got {kind!r}")
