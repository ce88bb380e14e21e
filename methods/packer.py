"""Weights of a folder, by the names in its files -> layers in a scheme."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from methods.architecture import FUSED, GATE_UP, QKV
from methods.drafter import Mark, unmarked
from methods.norm import HeadNorm, RMSNorm
from methods.transformer import MLP, Attention, Block, Shape
from methods.values import naming
from quant.formats import Layout, Quantization
from quant.scheme import QuantLinear, Scheme, is_finite, pick, stack
from quant.stacked import StackedLinear

ROWS = 4096  # of a weight packed at once


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
        mark: Mark = unmarked,
        exact: bool = False,
    ) -> None:
        """quantization: how the weights are stored, where they are not dense.

        mark: told `weights`, `rounding` and `layout` as a layer has been read, rounded and laid out
        for its kernel; `kernels` in place of the last where a layer is the first of its shape, for
        which kernels are compiled or loaded. exact: rows of a layer's product do not depend on how
        many are read (`Scheme.linear`).
        """
        self.weights = weights
        self.quantization = quantization
        self.scheme = scheme
        self.dtype = dtype
        self.device = device
        self.absmax = absmax or {}
        self.mark = mark
        self.exact = exact
        self._seen: set[tuple[str, int, int]] = set()

    def of(self, scheme: Scheme) -> "Packer":
        """The same weights in another scheme."""
        return Packer(
            self.weights,
            scheme,
            dtype=self.dtype,
            device=self.device,
            quantization=self.quantization,
            absmax=self.absmax,
            mark=self.mark,
            exact=self.exact,
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

    def linear(
        self, label: str, *modules: str, biased: bool = False, rows: Tensor | None = None
    ) -> QuantLinear:
        """One layer from those of the file, stacked. label: its name in our model.

        biased: whether the file's layers have biases, which the model adds itself. rows: which
        outputs to take of each; None = all.
        """
        stored = [self._stored(module, biased=biased) for module in modules]
        if rows is not None:
            stored = [(layout, pick(tensors, rows)) for layout, tensors in stored]
        kept = any(layout is not None for layout, _ in stored)
        try:
            layer = self._made(stored, label)
        except ValueError as error:
            place = ", ".join(modules) if kept else f"{label} in {self.scheme.label}"
            raise ValueError(f"{place}: {error}") from error
        made = (self.scheme.label, layer.out_features, layer.in_features)
        self.mark("layout" if made in self._seen else "kernels")
        self._seen.add(made)
        return layer

    def _made(
        self, stored: list[tuple[Layout | None, dict[str, Tensor]]], label: str
    ) -> QuantLinear:
        """Empties `stored` as it goes: of a large layer there is no room for every form of it."""
        if any(layout is not None for layout, _ in stored):
            self.mark("weights")
            return self._taken(stored)
        parts = [tensors["weight"] for _, tensors in stored]
        stored.clear()
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        parts.clear()
        self.mark("weights")
        packed = self._packed(whole, label)
        del whole
        self.mark("rounding")
        return self._fitted(self.scheme, packed)

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
        with naming(module):
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
            return self._fitted(schemes[0], whole)
        return StackedLinear([self._fitted(*part) for part in zip(schemes, parts, strict=True)])

    def _fitted(self, scheme: Scheme, stored: Mapping[str, Tensor]) -> QuantLinear:
        return scheme.linear(stored, dtype=self.dtype, device=self.device, exact=self.exact)

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
