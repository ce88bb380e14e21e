"""A checkpoint folder -> our modules: Hugging Face names and shapes, read from safetensors.

Everything is checked before anything is allocated: files, configuration, the presence and the
shape of every tensor. Pickles are never opened here.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from methods.rope import Rope
from methods.transformer import MLP, Attention, Block, RMSNorm, Shape, Transformer
from quant.scheme import QuantLinear, Scheme

EMBEDDING = "model.embed_tokens.weight"


class Weights(Mapping[str, Tensor]):
    """The tensors of a folder, by name; each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file_of: dict[str, Path] = {}
        for path in _weight_files(folder):
            try:
                with safe_open(path, framework="pt") as file:
                    self._file_of.update(dict.fromkeys(file.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{path} must be a whole safetensors file: {error}") from error

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        with safe_open(self._file_of[name], framework="pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def require(self, expected: Mapping[str, tuple[int, ...]], *, ignored: set[str]) -> None:
        """Check that the folder holds exactly these tensors, or raise ValueError.

        ignored: names that may stand there besides.
        """
        missing = expected.keys() - self.keys()
        extra = self.keys() - expected.keys() - ignored
        if missing or extra:
            raise ValueError(
                f"{self.folder} must hold the tensors of its config.json: "
                f"missing {_some(missing)}, superfluous {_some(extra)}"
            )
        for name, shape in expected.items():
            if self.shape(name) != shape:
                raise ValueError(
                    f"{self.folder}: {name} must be {list(shape)}, got {list(self.shape(name))}"
                )


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json, or raise ValueError naming the folder."""
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} must be a checkpoint folder with a config.json, found none")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


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


def check_transformer(folder: Path) -> Shape:
    """Check a Llama folder without reading its weights; give its sizes."""
    config = read_config(folder)
    if config.get("model_type") != "llama":
        raise ValueError(f"{folder}: model_type must be llama, got {config.get('model_type')!r}")
    if "quantization_config" in config:
        raise ValueError(f"{folder}: weights must be unquantised, got a quantization_config")
    shape = read_shape(config)
    ignored = {"lm_head.weight"} if shape.tied else set()
    Weights(folder).require(transformer_shapes(shape), ignored=ignored)
    return shape


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


class Packer:
    """Turns named weights into layers of one scheme, on one device, in one activation dtype."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        device: torch.device,
        absmax: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.weights = weights
        self.scheme = scheme
        self.dtype = dtype
        self.device = device
        self.absmax = absmax or {}

    def of(self, scheme: Scheme) -> "Packer":
        """The same weights in another scheme."""
        return Packer(
            self.weights, scheme, dtype=self.dtype, device=self.device, absmax=self.absmax
        )

    def tensor(self, name: str) -> Tensor:
        """A weight that no scheme touches: an embedding or a norm."""
        return self.weights[name].to(device=self.device, dtype=self.dtype)

    def norm(self, name: str, eps: float) -> RMSNorm:
        """A norm by the name of its weight."""
        return RMSNorm(self.tensor(name), eps)

    def linear(self, label: str, *names: str) -> QuantLinear:
        """One layer from weights stacked along their outputs. label: its name in our model."""
        stacked = torch.cat([self.tensor(name) for name in names])
        try:
            stored = self.scheme.pack(stacked, self.absmax.get(label))
        except ValueError as error:
            raise ValueError(f"{label} in {self.scheme.label}: {error}") from error
        return self.scheme.layer(stored).to(self.device)

    def attention(self, label: str, prefix: str, shape: Shape) -> Attention:
        """The attention of one decoder layer; its projections are fused, row by row unchanged."""
        projections = [f"{prefix}self_attn.{x}_proj.weight" for x in "qkv"]
        return Attention(
            shape,
            qkv=self.linear(f"{label}.qkv", *projections),
            out=self.linear(f"{label}.out", f"{prefix}self_attn.o_proj.weight"),
        )

    def mlp(self, label: str, prefix: str) -> MLP:
        """The feed-forward layer of one decoder layer."""
        gate, up = f"{prefix}mlp.gate_proj.weight", f"{prefix}mlp.up_proj.weight"
        return MLP(
            gate_up=self.linear(f"{label}.gate_up", gate, up),
            down=self.linear(f"{label}.down", f"{prefix}mlp.down_proj.weight"),
        )


def build_transformer(shape: Shape, packer: Packer, lm_head: Scheme) -> Transformer:
    """Make the model from a packer's weights. lm_head: the scheme of the output projection."""
    blocks = []
    for layer in range(shape.num_layers):
        prefix, label = f"model.layers.{layer}.", f"blocks.{layer}"
        blocks.append(
            Block(
                input_norm=packer.norm(f"{prefix}input_layernorm.weight", shape.norm_eps),
                attention=packer.attention(f"{label}.attention", prefix, shape),
                mlp_norm=packer.norm(f"{prefix}post_attention_layernorm.weight", shape.norm_eps),
                mlp=packer.mlp(f"{label}.mlp", prefix),
            )
        )
    head = packer.of(lm_head)
    return Transformer(
        shape,
        embedding=packer.tensor(EMBEDDING),
        blocks=blocks,
        norm=packer.norm("model.norm.weight", shape.norm_eps),
        lm_head=head.linear("lm_head", _output_name(shape)),
    ).eval()


def load_transformer(
    folder: Path,
    *,
    scheme: Scheme,
    lm_head: Scheme,
    dtype: torch.dtype,
    device: torch.device,
    absmax: Mapping[str, Tensor] | None = None,
) -> Transformer:
    """Read a Llama folder into a model whose linear layers are in `scheme`."""
    shape = check_transformer(folder)
    packer = Packer(Weights(folder), scheme, dtype=dtype, device=device, absmax=absmax)
    return build_transformer(shape, packer, lm_head)


def load_lm_head(
    folder: Path, scheme: Scheme, *, dtype: torch.dtype, device: torch.device
) -> QuantLinear:
    """Read a Llama folder's output projection alone, in a scheme of its own."""
    packer = Packer(Weights(folder), scheme, dtype=dtype, device=device)
    return packer.linear("lm_head", _output_name(read_shape(read_config(folder))))


def _output_name(shape: Shape) -> str:
    return EMBEDDING if shape.tied else "lm_head.weight"


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        paths = [folder / "model.safetensors"]
    else:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        paths = [folder / name for name in sorted(set(named))]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{folder} must hold {path.name}, found none")
    return paths


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


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3]) or "none"
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
