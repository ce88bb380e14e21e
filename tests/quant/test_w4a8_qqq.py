import numpy as np
import pytest
import torch

from quant.w4a8_qqq import W4A8QQQ, W4A8QQQLinear
from tests.quant import oracle

CHANNEL = W4A8QQQ(group_size=-1, range_search=False)
GROUPS = W4A8QQQ(group_size=32, range_search=False)


def _opened(stored: dict[str, torch.Tensor]) -> oracle.Integers:
    codes = oracle.nibbles(stored["packed"])
    if "s_group" not in stored:
        return np.where(codes > 7, codes - 16, codes) * 16
    return np.rint((codes - 8) * oracle.spread(stored["s_group"], codes.shape[1])).astype(np.int64)


@pytest.mark.parametrize("scheme", [CHANNEL, GROUPS])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_forward_is_the_integer_product_times_both_scales(
    scheme: W4A8QQQ, dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    stored = scheme.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    layer = scheme.layer(stored)
    assert layer.opened().tolist() == _opened(stored).tolist()
    codes, scale = oracle.tokens(x)
    expected = codes @ _opened(stored).T * oracle.column(stored["s_channel"]) * scale
    assert oracle.worst(layer(x), expected) < limit


def test_channel_codes_written_out() -> None:
    stored = CHANNEL.pack(torch.tensor([[-7.0, 2.6, 0.5, 1.5]]))
    assert stored["s_channel"].tolist() == [1 / 16]
    assert CHANNEL.layer(stored).opened().tolist() == [[-112, 48, 0, 32]]
    assert stored["packed"].tolist() == [[0x39, 0x20]]


def test_groups_written_out() -> None:
    weight = torch.zeros(1, 64)
    weight[0, :3] = torch.tensor([-7.5, 3.0, 1.0])
    weight[0, 32:34] = torch.tensor([0.75, -0.5])
    stored = GROUPS.pack(weight)
    # Steps 1.0 and 0.1; the largest value the codes give is 8 steps of the first group.
    assert stored["s_channel"].tolist() == pytest.approx([8 / 127])
    assert stored["s_group"].flatten().tolist() == pytest.approx([127 / 8, 12.7 / 8], rel=2**-11)
    assert GROUPS.layer(stored).opened()[0, :3].tolist() == [-127, 48, 16]
    assert GROUPS.layer(stored).opened()[0, 32:34].tolist() == [11, -8]


@pytest.mark.parametrize("kind", ["normal", "heavy", "one group"])
def test_groups_stay_within_int8(kind: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(256, 96) ** (5 if kind == "heavy" else 1)
    if kind == "one group":
        weight[:, 32:] *= 1e-6
    stored = GROUPS.pack(weight)
    assert np.abs(_opened(stored)).max() == 127


@pytest.mark.parametrize("range_search", [False, True])
def test_error_is_bounded_by_both_roundings(range_search: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96) * torch.logspace(-3, 1, 48)[:, None]
    scheme = W4A8QQQ(group_size=32, range_search=range_search)
    stored = scheme.pack(weight)
    s_channel = stored["s_channel"].numpy()[:, None]
    step = oracle.spread(stored["s_group"], 96) * s_channel
    error = np.abs(scheme.layer(stored).dequantize().numpy() - weight.numpy())
    clipped = np.maximum(np.abs(weight.numpy()) - 7 * step, 0) if range_search else 0
    assert bool((error <= 0.51 * step + 0.5 * s_channel + clipped).all())


def test_channel_error_is_half_a_step() -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96)
    stored = CHANNEL.pack(weight)
    error = (CHANNEL.layer(stored).dequantize() - weight).abs()
    assert bool((error <= 0.501 * 16 * stored["s_channel"][:, None]).all())


def test_groups_and_rows_of_zeros_come_back_as_zeros() -> None:
    weight = torch.zeros(3, 64)
    weight[0, :32] = 1e-9
    weight[1, 32:] = 5e4
    given = GROUPS.layer(GROUPS.pack(weight)).dequantize()
    assert bool(torch.isfinite(given).all())
    assert torch.equal(given == 0, weight == 0)


def test_scales_that_overflow_int8_are_refused() -> None:
    stored = GROUPS.pack(torch.randn(4, 64))
    with pytest.raises(ValueError, match="must stay within 127"):
        GROUPS.layer(stored | {"s_group": stored["s_group"] * 1.2})


def test_layers_are_of_one_class() -> None:
    assert isinstance(CHANNEL.layer(CHANNEL.pack(torch.randn(4, 64))), W4A8QQQLinear)
    assert isinstance(GROUPS.layer(GROUPS.pack(torch.randn(4, 64))), W4A8QQQLinear)
