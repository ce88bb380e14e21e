"""A checkpoint folder -> our modules, in any scheme."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from methods.architecture import EMBEDDING, read_shape, transformer_shapes
from methods.transformer import MLP, Attention, Block, RMSNorm, Shape, Transformer
from methods.weights import Weights, read_config
from quant.scheme import QuantLinear, Scheme


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
