"""The layer that both our kernels for 4-bit weights are behind, with their products in torch."""

import pytest
import torch
from torch import Tensor

from quant.kernels import w4a16_hopper
from quant.kernels.cuda_kernel import CudaInt4
from quant.kernels.int4 import Int4Linear, require_prepared, require_rows
from quant.weight_only import WeightOnlyLinear

N, K = 512, 256


def stored(*, zeros: bool, ordered: bool) -> WeightOnlyLinear:
    generator = torch.Generator().manual_seed(0)
    packed = torch.randint(0, 256, (N, K // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(N, K // 128, generator=generator) * 0.01 + 0.01).half()
    offsets = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    order = torch.randperm(K, generator=generator).int() if ordered else None
    return WeightOnlyLinear(packed, scales, offsets if zeros else None, order, bits=4)


def laid_out(
    kernel: str, layer: WeightOnlyLinear, monkeypatch: pytest.MonkeyPatch
) -> tuple[Int4Linear, list[int]]:
    """A layer whose kernel multiplies in float64, and how many rows it was given, call by call."""
    rows: list[int] = []
    if kernel == "cuda":
        module = w4a16_hopper
        monkeypatch.setattr(module, "build", lambda weight, dtype, exact: None)
    else:
        module = pytest.importorskip("quant.kernels.w4a16_triton")

    def matmul(x: Tensor, weight: object, **_: object) -> Tensor:
        rows.append(len(x))
        product: Tensor = module.reference(x, weight)
        return product.to(x.dtype)

    monkeypatch.setattr(module, "matmul", matmul)
    if kernel == "cuda":
        return CudaInt4(layer, torch.float16), rows
    from quant.kernels.triton_kernel import TritonInt4

    return TritonInt4(layer, torch.float16), rows


@pytest.mark.parametrize("kernel", ["cuda", "triton"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
def test_narrow_reads_are_the_kernels_and_wide_ones_are_not(
    kernel: str, zeros: bool, ordered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = stored(zeros=zeros, ordered=ordered)
    layer, rows = laid_out(kernel, own, monkeypatch)
    for n in (1, layer.most_tokens, layer.most_tokens + 1):
        x = torch.randn(n, K, generator=torch.Generator().manual_seed(n)).half()
        expected = own(x.double())
        assert float((layer(x).double() - expected).norm() / expected.norm()) < 1e-3
    assert rows == [1, layer.most_tokens]
    assert torch.equal(layer.dequantize(), own.dequantize())
    assert layer.kernel == kernel


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (torch.zeros(1, 128), "x must be float16 or bfloat16, got torch.float32"),
        (torch.zeros(0, 128).half(), r"x must be \[n, 128\] with n of 1 ... 8, got \[0, 128\]"),
        (torch.zeros(9, 128).half(), r"with n of 1 ... 8, got \[9, 128\]"),
        (torch.zeros(128, 2).half().t(), "contiguous and aligned to 16 bytes"),
    ],
)
def test_rows_that_a_kernel_cannot_copy_are_told(x: Tensor, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        require_rows(x, 128, most=8)


def test_a_weight_that_was_turned_since_is_told() -> None:
    with pytest.raises(ValueError, match="weight must be contiguous as prepared"):
        require_prepared(torch.zeros(1, 8), [None, torch.zeros(8, 4).t()])
