import numpy as np
import pytest
import torch
from torch import Tensor

from quant.w4a8_qoq import W4A8QoQ, W4A8QoQGroupLinear
from tests.quant import oracle

CHANNEL = W4A8QoQ(group_size=-1, range_search=False)
GROUPS = W4A8QoQ(group_size=32, range_search=False)
SEARCHED = W4A8QoQ(group_size=32, range_search=True)


def _opened(stored: dict[str, Tensor]) -> oracle.Integers:
    codes = oracle.nibbles(stored["packed"])
    k = codes.shape[1]
    opened = codes * oracle.spread(stored["s2_scales"], k) + oracle.spread(stored["s2_zeros"], k)
    return opened.astype(np.int64)


def _every_pair_of_ends() -> Tensor:
    """Integers whose first group runs from low to high, for every -119 <= low <= 0 <= high."""
    ends = torch.arange(120.0)
    low, high = -ends.repeat_interleave(120), ends.repeat(120)
    first = low[:, None] + (high - low)[:, None] * torch.linspace(0, 1, 32)
    second = torch.full((len(low), 32), 119.0)  # makes s1 exactly 1
    return torch.cat([first.round(), second], 1)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_channel_forward_takes_the_zero_off_by_the_sum_of_the_token(
    dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    stored = CHANNEL.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    codes, scale = oracle.tokens(x)
    sums = codes @ oracle.nibbles(stored["packed"]).T
    expected = (
        sums * oracle.column(stored["s1_scales"]) * scale
        - oracle.column(stored["s1_szeros"]) * codes.sum(1, keepdims=True) * scale
    )
    assert oracle.worst(CHANNEL.layer(stored)(x), expected) < limit


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_group_forward_is_the_integer_product_times_both_scales(
    dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    stored = GROUPS.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    layer = GROUPS.layer(stored)
    assert isinstance(layer, W4A8QoQGroupLinear)
    assert layer.opened().tolist() == _opened(stored).tolist()
    codes, scale = oracle.tokens(x)
    expected = codes @ _opened(stored).T * oracle.column(stored["s1_scales"]) * scale
    assert oracle.worst(layer(x), expected) < limit


def test_channel_written_out() -> None:
    stored = CHANNEL.pack(torch.tensor([[-5.0, 10.0, 0.4, 2.5]]))
    assert stored["s1_scales"].tolist() == [1.0]
    assert stored["s1_szeros"].tolist() == [5.0]
    assert oracle.nibbles(stored["packed"]).tolist() == [[0, 15, 5, 7]]


def test_groups_written_out() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([119.0, -31.0, 16.0])
    weight[0, 32:34] = torch.tensor([-90.0, 3.0])
    stored = GROUPS.pack(weight)
    assert stored["s1_scales"].tolist() == [1.0]
    # Ranges 150 and 93: steps 10 and 6, zeros at 3 and 15.
    assert stored["s2_scales"].tolist() == [[10, 6]]
    assert stored["s2_zeros"].tolist() == [[-30, -90]]
    assert oracle.nibbles(stored["packed"])[0, :3].tolist() == [15, 0, 5]
    assert GROUPS.layer(stored).dequantize()[0, :3].tolist() == [120, -30, 20]
    assert GROUPS.layer(stored).dequantize()[0, 32:34].tolist() == [-90, 0]


@pytest.mark.parametrize("scheme", [GROUPS, SEARCHED])
def test_no_pair_of_ends_overflows_int8(scheme: W4A8QoQ) -> None:
    weight = _every_pair_of_ends()[:: 1 if scheme is GROUPS else 7]
    stored = scheme.pack(weight)
    assert set(stored["s1_scales"].tolist()) == {1.0}
    codes = stored["packed"][:, :, None] >> torch.tensor([0, 4], dtype=torch.uint8) & 15
    products = codes.flatten(1).int().view(-1, 2, 32) * stored["s2_scales"].int()[..., None]
    opened = products + stored["s2_zeros"].int()[..., None]
    assert int(stored["s2_scales"].max()) <= 16
    assert int(products.max()) <= 255  # unsigned bytes hold it: no carry into a neighbour
    assert int(opened.abs().max()) <= 127
    layer = scheme.layer(stored)
    assert isinstance(layer, W4A8QoQGroupLinear)
    assert torch.equal(layer.opened().int(), opened.flatten(1))


@pytest.mark.parametrize("scheme", [GROUPS, SEARCHED])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e2])
def test_no_heavy_tailed_weight_overflows_int8(scheme: W4A8QoQ, size: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 256) ** 5 * size
    weight[:32] = weight[:32].abs()
    weight[32:64] = -weight[32:64].abs()
    weight[64:96] = weight[64:96].sign() * size
    assert np.abs(_opened(scheme.pack(weight))).max() <= 127


def test_group_error_is_half_a_step_beside_what_the_range_clips() -> None:
    weight = _every_pair_of_ends()
    stored = GROUPS.pack(weight)
    step = stored["s2_scales"].float().repeat_interleave(32, 1)
    ends = weight.view(-1, 2, 32)
    spans = ends.amax(-1).clamp(min=0) - ends.amin(-1).clamp(max=0)
    clipped = (spans - 15 * stored["s2_scales"]).clamp(min=0).repeat_interleave(32, 1)
    error = (GROUPS.layer(stored).dequantize() - weight).abs()
    assert bool((error <= step / 2 + clipped).all())


@pytest.mark.parametrize("group_size", [-1, 32])
def test_range_search_is_never_worse(group_size: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(128, 256) ** 3
    errors = []
    for range_search in (True, False):
        scheme = W4A8QoQ(group_size=group_size, range_search=range_search)
        given = scheme.layer(scheme.pack(weight)).dequantize()
        errors.append((given - weight).view(128, -1, 32).square().sum(-1))
    searched, plain = errors
    if group_size == -1:
        searched, plain = searched.sum(-1), plain.sum(-1)
    # float16 zeros and float32 sums round differently from the search's own.
    assert bool((searched <= plain * (1 + 1e-3)).all())
    assert searched.sum() < plain.sum()


def test_channel_error_is_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96) + 0.5
    stored = CHANNEL.pack(weight)
    error = (CHANNEL.layer(stored).dequantize() - weight).abs()
    assert bool((error <= 0.52 * stored["s1_scales"].float()[:, None]).all())


def test_a_zero_off_by_one_is_noticed() -> None:
    torch.manual_seed(0)
    stored = GROUPS.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=torch.float64)
    codes, scale = oracle.tokens(x)
    expected = codes @ _opened(stored).T * oracle.column(stored["s1_scales"]) * scale
    shifted = stored["s2_zeros"].clone()
    shifted[7, 1] += 1
    assert oracle.worst(GROUPS.layer(stored | {"s2_zeros": shifted})(x), expected) > 1e-4


def test_tensors_that_overflow_int8_are_refused() -> None:
    stored = GROUPS.pack(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"u \* s2 \+ z2 must stay within 127"):
        GROUPS.layer(stored | {"s2_zeros": stored["s2_zeros"] // 4})
