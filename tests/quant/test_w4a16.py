import numpy as np
import pytest
import torch

from quant.w4a16 import W4A16
from tests.quant import oracle

SYMMETRIC = W4A16(group_size=32, symmetric=True, range_search=False)
ASYMMETRIC = W4A16(group_size=32, symmetric=False, range_search=False)
CHANNEL = W4A16(group_size=-1, symmetric=True, range_search=True)


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC, CHANNEL])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_forward_is_the_product_with_codes_less_zero_times_scale(
    scheme: W4A16, dtype: torch.dtype, limit: float
) -> None:
    torch.manual_seed(0)
    stored = scheme.pack(torch.randn(48, 96))
    x = torch.randn(5, 96, dtype=dtype)
    zeros = oracle.spread(stored["zeros"], 96) if "zeros" in stored else 8
    weight = (oracle.nibbles(stored["packed"]) - zeros) * oracle.spread(stored["scales"], 96)
    expected = x.double().numpy() @ weight.T
    assert oracle.worst(scheme.layer(stored)(x), expected) < limit
    assert scheme.layer(stored).dequantize().double().numpy().tolist() == weight.tolist()


def test_half_precision_rounds_the_weight_before_the_product() -> None:
    torch.manual_seed(0)
    stored = SYMMETRIC.pack(torch.randn(48, 96))
    codes = torch.from_numpy(oracle.nibbles(stored["packed"]) - 8).bfloat16()
    weight = codes * stored["scales"].bfloat16().repeat_interleave(32, 1)
    x = torch.randn(5, 96).bfloat16()
    assert torch.equal(SYMMETRIC.layer(stored)(x), x @ weight.t())


def test_a_group_written_out() -> None:
    weight = torch.tensor([[-7.5, -0.4, 0.6, 3.5], [0.0, 1.5, 2.5, 15.0]])
    symmetric = W4A16(group_size=-1, symmetric=True, range_search=False).pack(weight)
    assert symmetric["scales"].tolist() == [[1.0], [2.0]]
    # -7.5 and 3.5 are ties: even multiples of the step, and 15.0 is half a step past the end.
    assert oracle.nibbles(symmetric["packed"]).tolist() == [[0, 8, 9, 12], [8, 9, 9, 15]]
    asymmetric = W4A16(group_size=-1, symmetric=False, range_search=False).pack(weight[1:])
    assert asymmetric["scales"].tolist() == [[1.0]]
    assert asymmetric["zeros"].tolist() == [[0]]
    assert oracle.nibbles(asymmetric["packed"]).tolist() == [[0, 2, 2, 15]]


@pytest.mark.parametrize("scheme", [SYMMETRIC, ASYMMETRIC])
def test_error_is_half_a_step_of_its_group(scheme: W4A16) -> None:
    torch.manual_seed(0)
    weight = torch.randn(48, 96) * torch.logspace(-3, 1, 48)[:, None]
    stored = scheme.pack(weight)
    error = (scheme.layer(stored).dequantize() - weight).abs().numpy()
    assert bool((error <= 0.51 * oracle.spread(stored["scales"], 96)).all())


def test_asymmetric_is_finer_on_one_sided_weights() -> None:
    weight = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    errors = [
        float((s.layer(s.pack(weight)).dequantize() - weight).norm())
        for s in (ASYMMETRIC, SYMMETRIC)
    ]
    assert errors[0] < 0.6 * errors[1]


def test_a_zero_off_by_one_is_noticed() -> None:
    torch.manual_seed(0)
    weight = torch.randn(16, 64)
    stored = ASYMMETRIC.pack(weight)
    zeros = stored["zeros"].numpy().copy()
    zeros[3, 1] += 1 if zeros[3, 1] < 15 else -1
    off = ASYMMETRIC.layer(stored | {"zeros": torch.from_numpy(zeros)}).dequantize() - weight
    bound = 0.51 * oracle.spread(stored["scales"], 64)
    outside = np.argwhere(np.abs(off.numpy()) > bound)
    assert set(map(tuple, outside[:, :1].tolist())) == {(3,)}


def test_groups_that_do_not_fill_a_row_are_refused() -> None:
    with pytest.raises(ValueError, match="K must be a multiple of group_size=32, got K=40"):
        SYMMETRIC.pack(torch.randn(4, 40))


@pytest.mark.parametrize("group_size", [0, -2, 3])
def test_impossible_group_sizes_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match="group_size must be -1 or even and positive"):
        W4A16(group_size=group_size, symmetric=True, range_search=False)


def test_a_zero_beyond_four_bits_is_refused() -> None:
    stored = ASYMMETRIC.pack(torch.randn(4, 64))
    with pytest.raises(ValueError, match=r"zeros must be 0 \.\.\. 15, got 16"):
        ASYMMETRIC.layer(stored | {"zeros": torch.full((4, 2), 16, dtype=torch.uint8)})
