"""A checkpoint folder -> our modules, in any scheme."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from methods.architecture import (
    EMBEDDING,
    FUSED,
    GATE_UP,
    QKV,
    read_shape,
    require_layers,
    stored_tensors,
)
from methods.norm import HeadNorm, RMSNorm
from methods.transformer import MLP, Attention, Block, Shape, Transformer
from methods.values import naming, read_flag
from methods.weights import Weights, read_config
from quant.formats import Layout, Quantization, read_quantization
from quant.scheme import QuantLinear, Scheme, is_finite, stack
from quant.stacked import StackedLinear

ROWS = 4096  # of a weight packed at once


def check_transformer(folder: Path) -> Shape:
    """Check a model's folder without reading its weights; give its sizes."""
    config = read_config(folder)
    weights = Weights(folder)
    quantization = _quantization(config, weights)
    with naming(folder):
        shape = read_shape(config)
        require_layers(shape, weights)
        expected, optional = stored_tensors(shape, quantization)
    ignored = {"lm_head.weight"} if shape.tied else set()
    weights.require(expected, optional=optional, ignored=ignored)
    return shape


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What a folder's layers will be in. label, lm_head: for tables."""

    scheme: Scheme
    label: str
    lm_head: str


def stored_in(folder: Path, scheme: Scheme, lm_head: Scheme) -> Stored:
    """Tell what a folder's layers will be in when these schemes are asked for.

    Raises ValueError where layers are quantised already and another scheme is asked for.
    """
    config = read_config(folder)
    quantization = _quantization(config, Weights(folder))
    if quantization is None:
        return Stored(scheme=scheme, label=scheme.label, lm_head=lm_head.label)
    # Where it is tied, the output is the embedding, always dense.
    with naming(folder / "config.json"):
        tied = read_flag(config, "tie_word_embeddings")
    output = None if tied else quantization.layout("lm_head")
    for asked, is_stored in ((scheme, True), (lm_head, output is not None)):
        if is_stored and not asked.as_stored:
            raise ValueError(
                f"{folder}: layers are stored in {quantization.label}, so their scheme must be "
                f"`checkpoint`, got {asked.label}"
            )
    return Stored(
        scheme=quantization.scheme,
        label=quantization.label,
        lm_head=lm_head.label if output is None else output.scheme.label,
    )


def require_dense(folder: Path) -> Shape:
    """Check a folder whose layers are not quantised, by any sign; give its sizes."""
    shape = check_transformer(folder)
    if (found := quantization_of(folder)) is not None:
        raise ValueError(f"{folder}: layers must be dense to be quantised, got {found.label}")
    return shape


def quantization_of(folder: Path) -> Quantization | None:
    """Tell how a folder's layers are stored, by any sign; None where they are dense."""
    return _quantization(read_config(folder), Weights(folder))


class Packer:
    """Turns named weights into layers of one scheme, on one device, in one activation dtype."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        device: torch.device,
        quantization: Quantization | None = None,
        absmax: Mapping[str, Tensor] | None = None,
    ) -> None:
        """quantization: how the weights are stored, where they are not dense."""
        self.weights = weights
        self.quantization = quantization
        self.scheme = scheme
        self.dtype = dtype
        self.device = device
        self.absmax = absmax or {}

    def of(self, scheme: Scheme) -> "Packer":
        """The same weights in another scheme."""
        return Packer(
            self.weights,
            scheme,
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            absmax=self.absmax,
        )

    def tensor(self, name: str) -> Tensor:
        """A weight that no scheme touches: an embedding or a norm."""
        tensor = self.weights[name].to(device=self.device, dtype=self.dtype)
        if not is_finite(tensor):
            raise ValueError(f"{name} must be finite in {self.dtype}, got infinities or NaNs")
        return tensor

    def norm(self, name: str, eps: float) -> RMSNorm:
        """A norm by the name of its weight."""
        return RMSNorm(self.tensor(name), eps)

    def linear(self, label: str, *modules: str, biased: bool = False) -> QuantLinear:
        """One layer from those of the file, stacked. label: its name in our model.

        biased: whether the file's layers have biases, which the model adds itself.
        """
        stored = [self._stored(module, biased=biased) for module in modules]
        try:
            if any(layout is not None for layout, _ in stored):
                return self._taken(stored)
            parts = [tensors["weight"] for _, tensors in stored]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            packed = self._packed(whole, label)
            return self.scheme.linear(packed, dtype=self.dtype, device=self.device)
        except ValueError as error:
            raise ValueError(f"{label} in {self.scheme.label}: {error}") from error

    def _packed(self, whole: Tensor, label: str) -> dict[str, Tensor]:
        """Pack a weight, in pieces where that is the same: rounding widens what it works on."""
        if not self.scheme.by_row or len(whole) <= ROWS:
            return self.scheme.pack(whole, self.absmax.get(label))
        packed = stack([self.scheme.pack(rows) for rows in torch.split(whole, ROWS)])
        assert packed is not None, "what is packed by row can be stacked"
        return packed

    def _stored(self, module: str, *, biased: bool) -> tuple[Layout | None, dict[str, Tensor]]:
        layout = None if self.quantization is None else self.quantization.layout(module)
        if layout is None:
            return None, {"weight": self.tensor(f"{module}.weight")}
        start = f"{module}."
        names = [name for name in self.weights if name.startswith(start)]
        tensors = {name.removeprefix(start): self.weights[name] for name in names}
        bias = tensors.pop("bias", None)
        if not biased and bias is not None and bool(bias.count_nonzero()):
            raise ValueError(f"{module}.bias must be all zero, since the model adds none")
        return layout, layout.read(tensors)

    def _taken(self, stored: Sequence[tuple[Layout | None, dict[str, Tensor]]]) -> QuantLinear:
        """Take layers as they are stored, each scheme with the kernel that was asked for."""
        assert self.scheme.as_stored, "checked by stored_in"
        schemes = [
            self.scheme if layout is None else replace(layout.scheme, kernel=self.scheme.kernel)
            for layout, _ in stored
        ]
        parts = [tensors for _, tensors in stored]
        if len(set(schemes)) == 1 and (whole := stack(parts)) is not None:
            return schemes[0].linear(whole, dtype=self.dtype, device=self.device)
        return StackedLinear(
            [
                scheme.linear(part, dtype=self.dtype, device=self.device)
                for scheme, part in zip(schemes, parts, strict=True)
            ]
        )

    def attention(self, label: str, prefix: str, shape: Shape) -> Attention:
        """The attention of one decoder layer; its projections are fused, row by row unchanged."""
        place = f"{prefix}self_attn."
        parts, out = self._parts(place, QKV), f"{place}o_proj"
        return Attention(
            qkv=self.linear(f"{label}.qkv", *parts, biased=shape.qkv_bias),
            out=self.linear(f"{label}.out", out, biased=shape.out_bias),
            qkv_bias=self._bias(*parts) if shape.qkv_bias else None,
            out_bias=self._bias(out) if shape.out_bias else None,
            norm=self._head_norm(place, shape) if shape.head_norms else None,
        )

    def _bias(self, *modules: str) -> Tensor:
        return torch.cat([self.tensor(f"{module}.bias") for module in modules])

    def _head_norm(self, place: str, shape: Shape) -> HeadNorm:
        return HeadNorm(
            heads=shape.num_heads,
            groups=shape.num_kv_heads,
            eps=shape.norm_eps,
            queries=self.tensor(f"{place}q_norm.weight"),
            keys=self.tensor(f"{place}k_norm.weight"),
        )

    def mlp(self, label: str, prefix: str) -> MLP:
        """The feed-forward layer of one decoder layer."""
        place = f"{prefix}mlp."
        return MLP(
            gate_up=self.linear(f"{label}.gate_up", *self._parts(place, GATE_UP)),
            down=self.linear(f"{label}.down", f"{place}down_proj"),
        )

    def block(self, number: int, shape: Shape) -> Block:
        """One decoder layer, by its number."""
        prefix, label = f"model.layers.{number}.", f"blocks.{number}"
        block = Block(
            input_norm=self.norm(f"{prefix}input_layernorm.weight", shape.norm_eps),
            attention=self.attention(f"{label}.attention", prefix, shape),
            mlp_norm=self.norm(f"{prefix}post_attention_layernorm.weight", shape.norm_eps),
            mlp=self.mlp(f"{label}.mlp", prefix),
        )
        attention, mlp = block.attention, block.mlp
        for layer, k in (  # a quantised layer tells its own number of inputs
            (attention.qkv, shape.hidden_size),
            (attention.out, shape.num_heads * shape.head_dim),
            (mlp.gate_up, shape.hidden_size),
            (mlp.down, shape.intermediate_size),
        ):
            if layer.in_features != k:
                raise ValueError(f"{prefix}* must have layers of K={k}, got {layer.in_features}")
        return block

    def _parts(self, place: str, fused: str) -> list[str]:
        if self.quantization is not None and self.quantization.fused:
            return [place + fused]
        return [place + part for part in FUSED[fused]]


def build_transformer(shape: Shape, packer: Packer, lm_head: Scheme) -> Transformer:
    """Make the model from a packer's weights. lm_head: the scheme of the output projection."""
    head = packer.of(lm_head)
    return Transformer(
        shape,
        embedding=packer.tensor(EMBEDDING),
        blocks=[packer.block(layer, shape) for layer in range(shape.num_layers)],
        norm=packer.norm("model.norm.weight", shape.norm_eps),
        lm_head=head.linear("lm_head", _output_module(shape)),
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
    packer = open_packer(folder, scheme, dtype=dtype, device=device, absmax=absmax)
    return build_transformer(shape, packer, lm_head)


def load_lm_head(
    folder: Path, scheme: Scheme, *, dtype: torch.dtype, device: torch.device
) -> QuantLinear:
    """Read a folder's output projection alone, in a scheme of its own."""
    packer = open_packer(folder, scheme, dtype=dtype, device=device)
    return packer.linear("lm_head", _output_module(read_shape(read_config(folder))))


def open_packer(
    folder: Path,
    scheme: Scheme,
    *,
    dtype: torch.dtype,
    device: torch.device,
    absmax: Mapping[str, Tensor] | None = None,
) -> Packer:
    """Make a packer of a folder's weights, however they are stored."""
    weights = Weights(folder, device=device)
    quantization = _quantization(read_config(folder), weights)
    return Packer(
        weights, scheme, dtype=dtype, device=device, quantization=quantization, absmax=absmax
    )


def _quantization(config: Mapping[str, Any], weights: Weights) -> Quantization | None:
    with naming(weights.folder):
        return read_quantization(config, weights.keys())


def _output_module(shape: Shape) -> str:
    return (EMBEDDING if shape.tied else "lm_head.weight").removesuffix(".weight")
