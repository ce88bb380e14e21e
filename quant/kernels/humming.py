"""humming (github.com/vllm-project/humming, Apache-2.0): products compiled for a shape when needed.

    w4a16, w8a16       codes opened to x's dtype, scales in x's dtype, float32 sums
    w8a8               int32 sums
    w4a8-qqq-channel   int32 sums of a8 * c; the reference's w8 = 16 * c, its s_channel = s / 16
    w4a8-qoq-g*        int32 sums of a8 * (u - z) within a group, times s2, in float32 over groups
    fp8                e4m3 products as the tensor cores sum them

Activations are rounded by `quant.kernels.tokens_triton`, to the reference's codes and scales. What
differs is the end: humming multiplies a sum by the token's scale in float32, rounds to x's dtype,
and then multiplies by the channel's scale, rounded to x's dtype too. Three roundings for the
reference's one, no wrong integer. The first would overflow float16 where sums are large, so the
least channel's power of two goes to the token's scale: what is rounded there never exceeds y.

Two formats stay with the reference: QQQ in groups rounds code times scale to 8 bits, which no
integer scale does; QoQ per channel takes its zero off by a rounded product of its own.

Letters: n tokens, K in-features, N out-features.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from quant.fp8 import FP8Linear
from quant.kernels import humming_build as build
from quant.kernels.humming_layout import Packed, pack
from quant.kernels.kernel import Kernel, KernelLinear, Rounded
from quant.kernels.machine import HUMMING, TRITON, installed
from quant.scheme import QuantLinear
from quant.w4a8_qoq import W4A8QoQChannelLinear, W4A8QoQGroupLinear
from quant.w4a8_qqq import W4A8QQQLinear
from quant.w8a8 import W8A8Linear
from quant.weight_only import WeightOnlyLinear

CAPABILITY = (8, 0)  # the oldest GPU with bfloat16 products
FP8_CAPABILITY = (8, 9)
N_UNIT, K_UNIT = 64, 128  # of a tile of the layout
LEAST_GROUP = 32
FLOATS = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
LOCKS = 2048  # of the sums that several blocks share; each layer has its own
ROOM = 15  # float16 ends at 2^16


class HummingKernel(Kernel):
    """Kernels that are compiled by nvcc at their first use."""

    name: ClassVar[str] = "humming"

    def missing(self, device: torch.device) -> str:
        """A GPU, the package, and a compiler."""
        if device.type != "cuda":
            return self.told("a CUDA device", device)
        if absent := [name for name in (HUMMING, TRITON) if installed(name) is None]:
            return self.told(f"the packages {HUMMING} and {TRITON}", f"no {absent[0]}", "torch")
        if (has := torch.cuda.get_device_capability(device)) < CAPABILITY:
            return self.told("compute capability 8.0", ".".join(map(str, has)))
        if problem := build.compiler_problem():
            return self.told("nvcc or NVRTC, of the CUDA toolkit", problem, "torch")
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Look at dtype, shape and format."""
        if dtype not in FLOATS:
            return self.told("dtype=float16 or bfloat16", dtype)
        n, k = layer.out_features, layer.in_features
        if n % N_UNIT or k % K_UNIT:
            return self.told(f"N in multiples of {N_UNIT} and K of {K_UNIT}", f"N={n}, K={k}")
        if isinstance(layer, WeightOnlyLinear):
            return self._unfit_weight_only(layer, dtype)
        if isinstance(layer, W4A8QoQGroupLinear):
            return self._unfit_qoq(layer)
        if isinstance(layer, W4A8QoQChannelLinear):
            return self.told("a zero within the integers", "QoQ per channel, whose is rounded")
        if isinstance(layer, W4A8QQQLinear):
            grouped = layer.s_group is not None
            what = "QQQ in groups, which rounds to 8 bits again"
            return self.told("integer scales of groups", what) if grouped else ""
        if isinstance(layer, FP8Linear):
            return self._unfit_fp8(layer)
        known = isinstance(layer, W8A8Linear)
        return "" if known else self.told("a quantised format", type(layer).__name__, "torch")

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        """Every format can be: the same steps of K at every width, and no sum that is split.

        A split sum is added up in x's dtype, in the order in which its parts end.
        """
        return ""

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        """Lay out, compile and try."""
        plan = _plan(layer, dtype)
        return build.retried(
            lambda: HummingLinear(layer, plan, dtype, exact=exact),
            n=layer.out_features,
            k=layer.in_features,
        )

    def _unfit_weight_only(self, layer: WeightOnlyLinear, dtype: torch.dtype) -> str:
        if layer.bits == 8 and dtype == torch.bfloat16:
            return self.told("dtype=float16 for 8-bit weights", dtype)
        group = layer.in_features // layer.scales.shape[1]
        return self._unfit_group(group)

    def _unfit_qoq(self, layer: W4A8QoQGroupLinear) -> str:
        s2, z2 = layer.s2_scales.short(), layer.s2_zeros.short()
        zeros = torch.div(-z2, s2.clamp(min=1), rounding_mode="floor")
        whole = bool(((s2 >= 1) & (zeros * s2 == -z2) & (zeros >= 0) & (zeros <= 15)).all())
        if not whole:
            return self.told("s2_zeros that are -z * s2, z = 0 ... 15", "others")
        return self._unfit_group(layer.in_features // layer.s2_scales.shape[1])

    def _unfit_fp8(self, layer: FP8Linear) -> str:
        if not layer.weight.is_cuda:  # looked at beforehand
            return ""
        has = torch.cuda.get_device_capability(layer.weight.device)
        old = has < FP8_CAPABILITY
        return self.told("compute capability 8.9 for fp8", ".".join(map(str, has))) if old else ""

    def _unfit_group(self, group: int) -> str:
        if group < LEAST_GROUP or group % LEAST_GROUP:
            return self.told(f"group_size -1 or in multiples of {LEAST_GROUP}", group)
        return ""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layer in humming's terms.

    codes: [N, K * bits / 8] uint8, unsigned ones around their middle. scales: [N, groups], or
    [N, 1] of a channel. back: the layer from codes, scales, zeros and channel. zeros: [N, groups]
    uint8. channel: [N], above scales of groups. rounds: what activations are rounded to.
    """

    bits: int
    number: str
    codes: Tensor
    scales: Tensor
    back: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], QuantLinear]
    zeros: Tensor | None = None
    channel: Tensor | None = None
    rounds: torch.dtype | None = None
    inputs: Mapping[str, Tensor | None] = field(default_factory=dict)  # smooth, order


class HummingLinear(KernelLinear):
    """A layer in humming's layout."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    channel: Tensor | None
    smooth: Tensor | None
    order: Tensor | None

    def __init__(self, layer: QuantLinear, plan: Plan, dtype: torch.dtype, *, exact: bool) -> None:
        super().__init__(layer, kernel=HummingKernel.name, dtype=dtype)
        self.rounds = plan.rounds
        self._back = plan.back
        # What stands last in the epilogue: the channel's scale.
        last = plan.scales if plan.channel is None else plan.channel
        self.factor = 1.0 if plan.rounds is None else _factor(last)
        narrow = (last.float() / self.factor).to(dtype)
        self._rounded = Rounded(last, narrow.float() * self.factor)
        per_group = None if plan.channel is None else Rounded(plan.scales, plan.scales.to(dtype))
        assert per_group is None or per_group.exact is None, "s2 is a small integer"
        self._packed: Packed = pack(
            codes=plan.codes,
            bits=plan.bits,
            number=plan.number,
            scales=narrow if plan.channel is None else plan.scales.to(dtype),
            zeros=plan.zeros,
            channel=None if plan.channel is None else narrow,
            dtype=FLOATS[dtype],
            rounds=None if plan.rounds is None else ROUNDS[plan.rounds],
        )
        for name in ("weight", "scales", "zeros", "channel"):
            self.register_buffer(name, self._packed.tensors.pop(name, None))
        for name in ("smooth", "order"):
            self.register_buffer(name, plan.inputs.get(name))
        device = self.weight.device
        self._locks = torch.zeros(LOCKS, dtype=torch.int32, device=device)
        self._launch = build.prepared(self._packed.config, exact=exact, device=device, trial=self)

    def multiply(self, x: Tensor) -> Tensor:
        """Multiply. x: [n, K] -> [n, N]."""
        return self.launch(x, self._launch)

    def launch(self, x: Tensor, configs: Tensor) -> Tensor:
        """Multiply by compiled kernels. configs: as `build.prepared` gives them."""
        from humming import ops

        x = x if self.order is None else x.index_select(-1, self.order)
        scale = None
        if self.rounds is not None:
            from quant.kernels.tokens_triton import round_rows

            x, scale = round_rows(x, codes=self.rounds, smooth=self.smooth, factor=self.factor)
        y = torch.empty(len(x), self.out_features, dtype=self.dtype, device=x.device)
        ops.launch_kernel(
            configs=configs,
            inputs=x,
            weight=self.weight,
            weight_scale=self.scales,
            weight_scale_2=self.channel,
            input_scale=scale,
            zero_point=self.zeros,
            outputs=y,
            locks=self._locks,
        )
        return y

    def reference(self) -> QuantLinear:
        """Unpack."""
        n, k = self.out_features, self.in_features
        packed = self._packed
        codes = packed.codes(self.weight, n, k)
        scales = packed.scales(self.scales)
        zeros = None if self.zeros is None else packed.zeros(self.zeros)
        if self.channel is None:
            return self._back(codes, self._restored(scales), zeros, None)
        channel = self._restored(packed.channel(self.channel))
        return self._back(codes, scales, zeros, channel)

    def _restored(self, held: Tensor) -> Tensor:
        return self._rounded.restored(held.float() * self.factor)


ROUNDS = {torch.int8: "int8", torch.float8_e4m3fn: "float8e4m3"}


def _plan(layer: QuantLinear, dtype: torch.dtype) -> Plan:
    if isinstance(layer, WeightOnlyLinear):
        return _weight_only(layer)
    if isinstance(layer, W8A8Linear):
        return _w8a8(layer)
    if isinstance(layer, FP8Linear):
        return _fp8(layer)
    if isinstance(layer, W4A8QQQLinear):
        return _qqq(layer)
    assert isinstance(layer, W4A8QoQGroupLinear)
    return _qoq(layer)


def _weight_only(layer: WeightOnlyLinear) -> Plan:
    order, bits = layer.order, layer.bits

    def back(codes: Tensor, scales: Tensor, zeros: Tensor | None, _: Tensor | None) -> QuantLinear:
        return WeightOnlyLinear(codes, scales, zeros, order, bits=bits)

    return Plan(
        bits=bits,
        number=f"uint{bits}",
        codes=layer.packed,
        scales=layer.scales,
        zeros=layer.zeros,
        back=back,
        inputs={"order": order},
    )


def _w8a8(layer: W8A8Linear) -> Plan:
    smooth = layer.smooth

    def back(codes: Tensor, scales: Tensor, *_: Tensor | None) -> QuantLinear:
        return W8A8Linear((codes ^ 128).view(torch.int8), scales.flatten(), smooth)

    return Plan(
        bits=8,
        number="uint8",
        codes=layer.weight.view(torch.uint8) ^ 128,
        scales=layer.scales.unsqueeze(-1),
        back=back,
        rounds=torch.int8,
        inputs={"smooth": smooth},
    )


def _fp8(layer: FP8Linear) -> Plan:
    def back(codes: Tensor, scales: Tensor, *_: Tensor | None) -> QuantLinear:
        return FP8Linear(codes.view(torch.float8_e4m3fn), scales.flatten())

    return Plan(
        bits=8,
        number="float8e4m3",
        codes=layer.weight.view(torch.uint8),
        scales=layer.scales.unsqueeze(-1),
        back=back,
        rounds=torch.float8_e4m3fn,
    )


def _qqq(layer: W4A8QQQLinear) -> Plan:
    def back(codes: Tensor, scales: Tensor, *_: Tensor | None) -> QuantLinear:
        return W4A8QQQLinear(codes ^ 0x88, scales.flatten() / 16, None)

    return Plan(
        bits=4,
        number="uint4",
        codes=layer.packed ^ 0x88,  # from two's complement to codes around 8
        scales=layer.s_channel.unsqueeze(-1) * 16,
        back=back,
        rounds=torch.int8,
    )


def _qoq(layer: W4A8QoQGroupLinear) -> Plan:
    s2 = layer.s2_scales

    def back(
        codes: Tensor, scales: Tensor, zeros: Tensor | None, channel: Tensor | None
    ) -> QuantLinear:
        assert zeros is not None
        assert channel is not None
        steps = scales.to(torch.int8)
        return W4A8QoQGroupLinear(codes, channel, steps, -zeros.view(torch.int8) * steps)

    return Plan(
        bits=4,
        number="uint4",
        codes=layer.packed,
        scales=s2,
        zeros=torch.div(-layer.s2_zeros.short(), s2, rounding_mode="floor").to(torch.uint8),
        channel=layer.s1_scales,
        back=back,
        rounds=torch.int8,
    )


def _factor(scales: Tensor) -> float:
    """The power of two that leaves every scale at 1 or above, or float16's range filled."""
    least = max(float(scales.min()), float(scales.max()) * 2.0**-ROOM)
    return 2.0 ** math.floor(math.log2(least))
