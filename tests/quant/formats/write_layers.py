"""Write layers with the packages themselves: python -m tests.quant.formats.write_layers OUT.

In a process of its own: the packages patch torch and transformers, set thread pools and warn.
Each file holds a layer's tensors and, as `reference`, the weight that the package makes of them,
[N, K] in the dtype it computes in.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.quant.formats.cases import AWQ, GPTQ, QQQ, SPOILT, Case, N

Tensors = dict[str, Tensor]


def write_layers(out: Path) -> None:
    """Write every case whose package is installed."""
    torch.set_num_threads(1)
    auto_gptq = _auto_gptq_packer()
    for seed, case in enumerate(GPTQ + SPOILT + AWQ + QQQ):
        if case.package == "autogptq" and auto_gptq is None:
            continue
        torch.manual_seed(seed)
        given = _given(case)
        if case.package == "autogptq":
            tensors = _pack_auto_gptq(auto_gptq, case, *given)
        else:
            tensors = PACKERS[case.package](case, *given)
        save_file({k: t.contiguous() for k, t in tensors.items()}, out / f"{case}.safetensors")


def _given(case: Case) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """Give a layer of representable weights, scales and zeros [N, groups], and g_idx [K]."""
    group = case.k if case.group_size == -1 else case.group_size
    groups, top = case.k // group, 2**case.bits - 1
    g_idx = torch.arange(case.k) // group
    if case.act_order == "scattered":
        g_idx = g_idx[torch.randperm(case.k)]
    scales = (torch.rand(N, groups) * 0.01 + 0.002).half().float()
    zeros = torch.full((N, groups), float(2 ** (case.bits - 1)))
    if not case.symmetric:
        lowest = 1 if case.package == "autogptq" and case not in SPOILT else 0
        zeros = torch.randint(lowest, top + 1, (N, groups)).float()
        zeros[0, 0], zeros[1, 0] = lowest, top
    codes = torch.randint(0, top + 1, (N, case.k)).float()
    linear = nn.Linear(case.k, N, bias=False)
    linear.weight.data = (codes - zeros[:, g_idx]) * scales[:, g_idx]
    return linear, scales, zeros, g_idx.int()


def _auto_gptq_packer() -> Any:  # noqa: ANN401
    """Import AutoGPTQ's packing class; its __init__ files do not import on transformers 5."""
    found = importlib.util.find_spec("auto_gptq")
    if found is None or found.origin is None:
        return None
    root = Path(found.origin).parent
    for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    return importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_cuda").QuantLinear


def _pack_auto_gptq(
    packer: Any,  # noqa: ANN401
    case: Case,
    linear: nn.Linear,
    scales: Tensor,
    zeros: Tensor,
    g_idx: Tensor,
) -> Tensors:
    dtype = getattr(torch, case.dtype)
    layer = packer(case.bits, case.group_size, case.k, N, bias=False, weight_dtype=dtype)
    layer.pack(linear.to(dtype), scales, zeros, g_idx)
    # It has no way to open a weight, but multiplies by it: by one, exactly.
    reference = layer(torch.eye(case.k, dtype=dtype)).t()
    return {**layer.state_dict(), "reference": reference}


def _pack_gptqmodel(
    case: Case, linear: nn.Linear, scales: Tensor, zeros: Tensor, g_idx: Tensor
) -> Tensors:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer = TorchLinear(
        bits=case.bits,
        group_size=case.group_size,
        sym=case.symmetric,
        desc_act=case.act_order != "none",
        in_features=case.k,
        out_features=N,
        register_buffers=True,
    )
    layer.pack_original(linear=linear, scales=scales, zeros=zeros, g_idx=g_idx)
    reference = layer.eval().dequantize_weight().t()
    if case.version == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, QuantizeConfig(bits=case.bits))
    return {**layer.state_dict(), "reference": reference}


def _pack_auto_awq(
    case: Case, linear: nn.Linear, scales: Tensor, zeros: Tensor, g_idx: Tensor
) -> Tensors:
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    layer = WQLinear_GEMM.from_linear(
        linear,
        w_bit=case.bits,
        group_size=case.group_size,
        scales=scales.t().contiguous(),
        zeros=zeros.t().contiguous(),
    )
    tensors = layer.state_dict()
    opened = dequantize_gemm(
        tensors["qweight"], tensors["qzeros"], tensors["scales"], case.bits, case.group_size
    )
    return {**tensors, "reference": opened.t()}


def _pack_gptqmodel_awq(
    case: Case, linear: nn.Linear, scales: Tensor, zeros: Tensor, g_idx: Tensor
) -> Tensors:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    layer = AwqTorchLinear(
        bits=case.bits,
        group_size=case.group_size,
        sym=case.symmetric,
        desc_act=False,
        in_features=case.k,
        out_features=N,
        register_buffers=True,
    )
    layer.pack(linear, scales.to(getattr(torch, case.dtype)), zeros)
    tensors = layer.state_dict()
    opened = dequantize_gemm(
        qweight=tensors["qweight"],
        qzeros=tensors["qzeros"],
        scales=tensors["scales"],
        bits=case.bits,
        group_size=layer.group_size,
    )
    return {**tensors, "reference": opened.t()}


def _pack_gptqmodel_qqq(
    case: Case, linear: nn.Linear, scales: Tensor, zeros: Tensor, g_idx: Tensor
) -> Tensors:
    from gptqmodel.nn_modules.qlinear.qqq import QQQTorchLinear

    layer = QQQTorchLinear(
        bits=case.bits,
        group_size=case.group_size,
        sym=True,
        desc_act=False,
        in_features=case.k,
        out_features=N,
        register_buffers=False,
    )
    per_group = layer.group_size != case.k
    if not per_group:
        scales, linear.weight.data = _whole_rows(linear.weight.data)
    s_channel = linear.weight.data.abs().amax(1) / 127
    layer.pack(linear, scales, s_extra=s_channel if per_group else None)
    weight, s_channel = layer._dequantize_weight_for_torch()
    return {**layer.state_dict(), "reference": (weight * s_channel).t()}


def _whole_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows to codes -7 ... 7. Gives scales [N, 1] and the rounded weight."""
    scales = weight.abs().amax(1, keepdim=True) / 7
    return scales, (weight / scales).round() * scales


PACKERS = {
    "gptqmodel": _pack_gptqmodel,
    "autoawq": _pack_auto_awq,
    "gptqmodel_awq": _pack_gptqmodel_awq,
    "gptqmodel_qqq": _pack_gptqmodel_qqq,
}

if __name__ == "__main__":
    write_layers(Path(sys.argv[1]))
