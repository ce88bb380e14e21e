"""The layer that both our kernels for 4-bit weights are behind, with their products in torch."""

import pytest
import torch
from torch import Tensor

from quant.block_float import BlockFloat, round_blocks, values
from quant.kernels import w4a16_hopper
from quant.kernels.cuda_kernel import CudaInt4
from quant.kernels.exact import Tiles
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


def multiply(x: BlockFloat, weight: w4a16_hopper.Prepared, dtype: torch.dtype) -> Tensor:
    """In float64, as `w4a16_hopper.multiply` would."""
    return w4a16_hopper.reference(values(x, K), weight).to(dtype)


def test_our_cuda_kernel_reads_digits_of_few_tokens_in_their_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(w4a16_hopper, "multiply", multiply)
    own = stored(zeros=True, ordered=False)
    layer, _ = laid_out("cuda", own, monkeypatch)
    assert layer.reads_digits(1)
    assert not layer.reads_digits(layer.most_tokens + 1)
    assert not laid_out("cuda", stored(zeros=True, ordered=True), monkeypatch)[0].reads_digits(1)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(0)).half()
    tiled = Tiles(layer, torch.float16, rows=2, padded=False)
    assert [tiled.reads_digits(n) for n in (1, 2, 3)] == [True, True, False]
    assert not Tiles(layer, torch.float16, rows=2, padded=True).reads_digits(1)
    for read in (layer, tiled):
        y = read(round_blocks(x))
        assert y.dtype == torch.float16
        assert float((y.double() - own(x.double())).norm() / own(x.double()).norm()) < 1e-3


def test_digits_that_do_not_fit_a_layer_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(w4a16_hopper, "multiply", multiply)
    layer, _ = laid_out("cuda", stored(zeros=False, ordered=False), monkeypatch)
    digits, scales = round_blocks(torch.zeros(9, K))
    told = r"digits must be of shape \[2, n, 256\], scales of \[2, n or more\], got "
    with pytest.raises(ValueError, match=told + r"\[2, 9, 384\] and \[3, 16\]"):
        layer(round_blocks(torch.zeros(9, K + 1)))
    with pytest.raises(ValueError, match=told + r"\[2, 9, 256\] and \[2, 8\]"):
        layer(BlockFloat(digits, scales[:, :8]))
    with pytest.raises(ValueError, match="must be on the layer's device cpu, got meta"):
        layer(BlockFloat(digits.to("meta"), scales.to("meta")))
    assert layer(BlockFloat(digits[:, :2], scales[:, :2])).shape == (2, N)


def test_a_kernel_that_reads_no_digits_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _ = laid_out("triton", stored(zeros=False, ordered=False), monkeypatch)
    assert not layer.reads_digits(1)
    with pytest.raises(ValueError, match="kernel=triton reads no digits"):
        layer(round_blocks(torch.zeros(1, K)))


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
