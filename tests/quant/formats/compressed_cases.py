"""What llm-compressor is asked to write, as plain values: the schemes of linear layers."""

from dataclasses import dataclass, field
from typing import Any

DYNAMIC_TOKENS = {"num_bits": 8, "type": "int", "dynamic": True, "strategy": "token"}
DYNAMIC_FLOATS = DYNAMIC_TOKENS | {"type": "float"}


def group(
    weights: dict[str, Any], inputs: dict[str, Any] | None = None, *targets: str
) -> dict[str, Any]:
    return {
        "targets": list(targets or ("Linear",)),
        "weights": weights,
        "input_activations": inputs,
    }


def integers(bits: int, group_size: int | None = None, *, symmetric: bool = True) -> dict[str, Any]:
    placed = {"strategy": "group", "group_size": group_size} if group_size else CHANNEL
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, **placed}


CHANNEL = {"strategy": "channel"}
TENSOR = {"strategy": "tensor"}
FLOATS = {"num_bits": 8, "type": "float", "symmetric": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A checkpoint. label: how it is named here; preset: of the package, in place of groups.

    inputs: what activations are rounded to.
    """

    label: str = ""
    inputs: str = ""
    groups: list[dict[str, Any]] = field(default_factory=list)
    preset: str = ""
    dtype: str = "bfloat16"
    ignore: tuple[str, ...] = ("lm_head",)
    gptq: bool = False
    rotation: str = ""


LOADS = {
    "w4a16-sym-g32": Case(label="w4a16-g32", groups=[group(integers(4, 32))]),
    "w4a16-sym-g32-fp16": Case(label="w4a16-g32", groups=[group(integers(4, 32))], dtype="float16"),
    "w4a16-sym-g32-fp32": Case(label="w4a16-g32", groups=[group(integers(4, 32))], dtype="float32"),
    "w4a16-asym-g32": Case(
        label="w4a16-g32-asym", groups=[group(integers(4, 32, symmetric=False))]
    ),
    "w4a16-sym-channel": Case(label="w4a16-channel", groups=[group(integers(4))]),
    "w4a16-asym-channel": Case(
        label="w4a16-channel-asym", groups=[group(integers(4, symmetric=False))]
    ),
    "w4a16-tensor": Case(
        label="w4a16-channel", groups=[group({"num_bits": 4, "type": "int", **TENSOR})]
    ),
    "w4a16-preset-g128": Case(label="w4a16-g128", preset="W4A16"),
    "w4a16-asym-preset-g128": Case(label="w4a16-g128-asym", preset="W4A16_ASYM"),
    "w4a16-gptq-static-order": Case(
        label="w4a16-g32", groups=[group(integers(4, 32) | {"actorder": "static"})], gptq=True
    ),
    "w8a16-sym-g32": Case(label="w8a16-g32", groups=[group(integers(8, 32))]),
    "w8a16-asym-g32": Case(
        label="w8a16-g32-asym", groups=[group(integers(8, 32, symmetric=False))]
    ),
    "w8a16-preset-g128": Case(label="w8a16-g128", preset="W8A16"),
    "w8a8-preset": Case(label="w8a8", inputs="int", preset="W8A8"),
    "w8a8-tensor": Case(
        label="w8a8",
        inputs="int",
        groups=[group(integers(8) | TENSOR, DYNAMIC_TOKENS)],
        dtype="float16",
    ),
    "w4a8-channel": Case(
        label="w4a8-qqq-channel", inputs="int", groups=[group(integers(4), DYNAMIC_TOKENS)]
    ),
    "fp8-preset-dynamic": Case(label="fp8", inputs="float", preset="FP8_DYNAMIC"),
    "fp8-tensor-dynamic": Case(
        label="fp8", inputs="float", groups=[group(FLOATS | TENSOR, DYNAMIC_FLOATS)]
    ),
    "w8a16-channel": Case(label="w8a16-channel", groups=[group(integers(8))]),
    "w4a16-lm_head": Case(label="w4a16-g32", groups=[group(integers(4, 32))], ignore=()),
    "two-schemes": Case(
        label="w4a16-g32+w8a8",
        inputs="int",
        groups=[
            group(integers(4, 32), None, "re:.*(gate|up|q|k|v)_proj$"),
            group(integers(8), DYNAMIC_TOKENS, "re:.*layers.0.*down_proj"),
        ],
        ignore=("lm_head", "re:.*layers[.]1[.]self_attn[.]q_proj"),
    ),
    "w4a16-rotated-r1-r2": Case(
        label="w4a16-g32", groups=[group(integers(4, 32))], rotation="R1 R2"
    ),
}

# The reason, as a pattern, stands beside what is written.
REFUSED = {
    "w4a8-preset-group": (Case(preset="W4A8"), "strategy must be channel or tensor, got 'group'"),
    "w4afp8-preset": (Case(preset="W4AFP8"), "strategy must be channel or tensor, got 'group'"),
    "int8-preset-asym-inputs": (
        Case(groups=[group(integers(8), DYNAMIC_TOKENS | {"symmetric": False})]),
        "input_activations: symmetric must be True, got False",
    ),
    "w8a8-asym-weights": (
        Case(groups=[group(integers(8, symmetric=False), DYNAMIC_TOKENS)]),
        "weights: symmetric must be True, got False",
    ),
    "w8a8-tensor-inputs": (
        Case(groups=[group(integers(8), DYNAMIC_TOKENS | TENSOR)]),
        "input_activations: strategy must be token, got 'tensor'",
    ),
    "fp8-preset-block": (
        Case(preset="FP8_BLOCK"),
        "weights: strategy must be channel or tensor, got 'block'",
    ),
    "fp8-weights-alone": (
        Case(groups=[group(FLOATS | CHANNEL)]),
        "input_activations must be quantised beside naive-quantized weights",
    ),
    "w3a16": (Case(groups=[group(integers(3, 32))]), "num_bits must be 4 or 8, got 3"),
    "nvfp4a16-preset": (Case(preset="NVFP4A16"), "format must be .*got 'nvfp4-pack-quantized'"),
    "mxfp4-preset": (Case(preset="MXFP4"), "format must be .*got 'mxfp4-pack-quantized'"),
    "w4a16-rotated-r4": (
        Case(groups=[group(integers(4, 32))], rotation="R1 R2 R4"),
        "R4 must be folded into the weights, got one applied while the model runs, at input",
    ),
}
