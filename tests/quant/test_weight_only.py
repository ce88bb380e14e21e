import numpy as np
import pytest
import torch

from quant.fp8 import FP8
from quant.scheme import Scheme
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16
from quant.weight_only import WeightOnly
from tests.quant import oracle

SYMMETRIC = W8A16(group_size=32, symmetric=True, range_search=False)
ASYMMETRIC = W8A16(group_size=32, symmetric=False, range_search=False)
CHANNEL = W8A16(group_size=-1, symmetric=True, range_search=False)
WITH_SCALES: list[Scheme] = [
    W4A16(group_size=32, symmetric=False, range_search=False),
    SYMMETRIC,
    W8A8(smooth_alpha=None),
    FP8(),
]


def _order(k: int) -> torch.Tensor:
    return torch.randperm(k, generator=torch.Generator().manual_seed(5)).int()


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, CHANNEL])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_8_bit_forward_is_the_product_with_codes_less_zero_times_scale(
    scheme: W8A16, dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    stored = scheme.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    zeros = oracle.spread(stored["zeros"], 96) if "zeros" in stored else 128
    codes = stored["packed"].long().numpy()
    weight = (codes - zeros) * oracle.spread(stored["scales"], 96)
    expected = x.double().numpy() @ weight.T
    assert oracle.worst(scheme.layer(stored)(x), expected) < limit
    assert scheme.layer(stored).dequantize().double().numpy().tolist() == weight.tolist()


def test_an_8_bit_group_written_out() -> None:
    weight = torch.tensor([[-127.5, -0.4, 0.6, 3.5], [0.0, 1.5, 2.5, 255.0]])
    symmetric = W8A16(group_size=-1, symmetric=True, range_search=False).pack(weight)
    assert symmetric["scales"].tolist() == [[1.0], [2.0]]
    # -127.5 and 3.5 are ties: even multiples of the step, and 255.0 is half a step past the end.
    assert symmetric["packed"].tolist() == [[0, 128, 129, 132], [128, 129, 129, 255]]
    asymmetric = W8A16(group_size=-1, symmetric=False, range_search=False).pack(weight)
    assert asymmetric["zeros"][1].tolist() == [0]
    assert asymmetric["packed"][1].tolist() == [0, 2, 2, 255]


def test_8_bit_steps_span_nine_bits() -> None:
    stored = {
        "packed": torch.tensor([[0, 255]], dtype=torch.uint8),
        "scales": torch.ones(1, 1, dtype=torch.float16),
    }
    scheme = W8A16(group_size=-1, symmetric=False, range_search=False)
    for zero, expected in ((0, [0, 255]), (255, [-255, 0])):
        zeros = torch.tensor([[zero]], dtype=torch.uint8)
        assert scheme.layer(stored | {"zeros": zeros}).dequantize().tolist() == [expected]


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
def test_8_bit_error_is_half_a_step_of_its_group(scheme: W8A16) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96) * torch.logspace(-3, 1, 48)[:, None]
    stored = scheme.pack(weight)
    error = (scheme.layer(stored).dequantize() - weight).abs().numpy()
    # The float16 scale may fall short of the range by 2^-11 of it, an eighth of a step.
    assert bool((error <= 0.63 * oracle.spread(stored["scales"], 96)).all())


@pytest.mark.parametrize("scheme", [W4A16(group_size=32, symmetric=False, range_search=False)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_ordered_columns_meet_the_inputs_they_belong_to(
    scheme: WeightOnly, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    stored = scheme.pack(torch.randn(48, 96))
    order = _order(96)
    x = torch.randn(2, 5, 96).to(dtype)
    plain, ordered = scheme.layer(stored), scheme.layer(stored | {"order": order})
    permutation = torch.zeros(96, 96)
    permutation[order.long(), torch.arange(96)] = 1
    assert torch.equal(ordered(x), plain(x @ permutation.to(dtype)))
    expected = plain.dequantize() @ permutation.t()
    assert torch.equal(ordered.dequantize(), expected)


def test_order_counts_as_weight() -> None:
    stored = SYMMETRIC.pack(torch.randn(48, 96))
    ordered = SYMMETRIC.layer(stored | {"order": _order(96)})
    assert ordered.weight_bytes == SYMMETRIC.layer(stored).weight_bytes + 4 * 96


@pytest.mark.parametrize("wrong", [[0, 1, 2, 2], [1, 2, 3, 4], [-1, 0, 1, 2]])
def test_an_order_that_is_no_permutation_is_refused(wrong: list[int]) -> None:
    stored = CHANNEL.pack(torch.randn(3, 4))
    with pytest.raises(ValueError, match="order must name each of the 4 inputs once"):
        CHANNEL.layer(stored | {"order": torch.tensor(wrong, dtype=torch.int32)})


@pytest.mark.parametrize("scheme", WITH_SCALES, ids=lambda s: s.label)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_kept_and_used_as_a_checkpoint_brings_them(
    scheme: Scheme, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    stored = scheme.pack(torch.randn(48, 96))
    other = (stored["scales"].float() * 1.37).to(dtype)
    layer = scheme.layer(stored | {"scales": other})
    assert dict(layer.named_buffers())["scales"].dtype == dtype
    x = torch.randn(5, 96, dtype=torch.float64)
    given = scheme.layer(stored | {"scales": torch.ones_like(stored["scales"])})
    steps = given.dequantize().double().numpy()
    scales = oracle.spread(other.view(48, -1), 96)
    assert oracle.worst(layer.dequantize(), steps * scales) < 1e-6
    unit, groups = given(x.view(5, -1, 96)), other.view(48, -1).shape[1]
    if groups == 1:  # then scales come after the product
        assert oracle.worst(layer(x), (unit.squeeze(1) * other.double()).numpy()) < 1e-12
    else:
        assert oracle.worst(layer(x), np.asarray(x) @ (steps * scales).T) < 1e-12


def test_integer_scales_are_refused_by_name() -> None:
    stored = SYMMETRIC.pack(torch.randn(48, 96))
    with pytest.raises(ValueError, match=r"torch\.float16 or torch\.bfloat16 or torch\.float32"):
        SYMMETRIC.layer(stored | {"scales": stored["scales"].double()})
