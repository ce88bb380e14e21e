"""The W4A16 kernel against float64: on a GPU, and on the CPU in Triton's interpreter."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quant.pack import pack_nibbles
from tests.quant import oracle
from tests.quant.interpreted import interpreted

pytest.importorskip("triton")
kernel = pytest.importorskip("quant.kernels.w4a16_triton")

WIDTHS = (1, 4, 8, 16, 24, 32, 48, 60, 64)
GROUPS = (64, 128, 256, -1)


def stored(
    n: int, k: int, group: int, *, zeros: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random codes with no pattern, scales around 0.015, zeros over their whole range."""
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else k // group
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, groups, generator=generator) * 0.01 + 0.01).half()
    offsets = torch.randint(0, 16, (n, groups), generator=generator, dtype=torch.uint8)
    return packed, scales, offsets if zeros else None


def exact(x: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None) -> oracle.Array:
    """Multiply in float64 and integers, from the stored tensors."""
    k = packed.shape[1] * 2
    middle = 8 if zeros is None else oracle.spread(zeros, k)
    weight = (oracle.nibbles(packed) - middle) * oracle.spread(scales, k)
    return np.asarray(x.double().cpu().numpy() @ weight.T)


def on_gpu(packed: Tensor, scales: Tensor, zeros: Tensor | None) -> Any:  # noqa: ANN401
    return kernel.prepare(packed.cuda(), scales.cuda(), None if zeros is None else zeros.cuda())


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zeros", [False, True])
def test_prepared_weights_come_back_bit_for_bit(group: int, zeros: bool) -> None:
    before = stored(128, 768, group, zeros=zeros)
    after = kernel.restore(kernel.prepare(*before))
    for old, new in zip(before, after, strict=True):
        assert (old is None and new is None) or torch.equal(old, new)


def test_nibble_i_of_word_c_is_input_64_i_plus_c_of_its_chunk() -> None:
    codes = torch.zeros(64, 512, dtype=torch.int8)
    codes[3, 256 + 64 * 2 + 5] = 13
    scales = torch.ones(64, 4, dtype=torch.float16)
    words = kernel.prepare(pack_nibbles(codes), scales, None).words
    assert words.nonzero().tolist() == [[1, 3, 5]]
    assert words[1, 3, 5].item() == 13 << 8


def test_reference_is_the_product_in_float64() -> None:
    weight = stored(64, 512, 128, zeros=True)
    x = torch.randn(3, 512, generator=torch.Generator().manual_seed(1))
    assert oracle.worst(kernel.reference(x, kernel.prepare(*weight)), exact(x, *weight)) < 1e-12


INTERPRETED = """
import sys, torch
from quant.kernels import w4a16_triton as kernel
from tests.quant import oracle
from tests.quant.test_w4a16_triton import exact, stored
dtype, group, zeros, n = getattr(torch, sys.argv[1]), *map(int, sys.argv[2:])
torch.manual_seed(0)
weight = stored(128, 1280, group, zeros=bool(zeros))
prepared = kernel.prepare(*weight)
x = torch.randn(n, 1280).to(dtype)
first, again = kernel.matmul(x, prepared), kernel.matmul(x, prepared)
assert torch.equal(first, again), "a second call on the same counters differs"
assert prepared.counters.abs().max() == 0
print(oracle.worst(first.float(), exact(x, *weight)))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested below")
@pytest.mark.parametrize(
    ("dtype", "group", "zeros", "n"),
    [
        ("float16", 128, 0, 5),
        ("float16", 64, 1, 1),
        ("float16", 256, 1, 17),
        ("bfloat16", 128, 1, 3),
        ("float16", -1, 0, 66),
    ],
)
def test_interpreted_kernel_is_within_output_rounding_of_float64(
    dtype: str, group: int, zeros: int, n: int
) -> None:
    # 1280 inputs are five chunks, which four splits share unevenly: 2, 2, 1 and none.
    printed = interpreted(INTERPRETED, dtype, group, zeros, n)
    # The interpreter cuts bfloat16 off where the device rounds: a whole unit in the last place.
    assert float(printed) < (2**-7 if dtype == "bfloat16" else 2**-11)


@pytest.mark.parametrize(
    ("n", "k", "group", "what"),
    [
        (32, 512, 128, "N a multiple of 64 and K of 256, got torch.uint8 with N=32, K=512"),
        (64, 384, 128, "N a multiple of 64 and K of 256, got torch.uint8 with N=64, K=384"),
        (64, 512, 32, "group_size must be 64, 128 or a multiple of 256, got 32"),
    ],
)
def test_weights_that_do_not_fit_are_refused(n: int, k: int, group: int, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        kernel.prepare(*stored(n, k, group, zeros=False))


def test_zeros_of_another_shape_are_refused() -> None:
    packed, scales, zeros = stored(64, 512, 128, zeros=True)
    assert zeros is not None
    with pytest.raises(ValueError, match=r"zeros must be uint8 \[64, 4\], got torch.uint8 \[64, 2"):
        kernel.prepare(packed, scales, zeros[:, :2])


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.zeros(2, 512), "x must be float16 or bfloat16, got torch.float32"),
        (torch.zeros(2, 256).half(), r"x must be \[n, 512\].*got \[2, 256\]"),
        (torch.zeros(512).half(), r"x must be \[n, 512\].*got \[512\]"),
        (torch.zeros(0, 512).half(), r"n of 1 \.\.\. 128, got \[0, 512\]"),
        (torch.zeros(129, 512).half(), r"n of 1 \.\.\. 128, got \[129, 512\]"),
        (torch.zeros(512, 2).half().t(), "rows that are contiguous.*strides \\(1, 2\\)"),
        (torch.zeros(2, 515).half()[:, :512], "aligned to 16 bytes.*strides \\(515, 1\\)"),
        (torch.zeros(2, 520).half()[:, 1:513], "aligned to 16 bytes.*at offset 1"),
        (torch.zeros(2, 512, device="meta").half(), "device"),
    ],
)
def test_activations_that_do_not_fit_are_refused(x: Tensor, what: str) -> None:
    prepared = kernel.prepare(*stored(64, 512, 128, zeros=False))
    with pytest.raises(ValueError, match=what):
        kernel.matmul(x, prepared)


def test_words_of_another_dtype_are_refused() -> None:
    prepared = kernel.prepare(*stored(64, 512, 128, zeros=False))
    wide = replace(prepared, words=prepared.words.int())
    with pytest.raises(ValueError, match="words and counters must be int16 and int32"):
        kernel.matmul(torch.zeros(1, 512).half(), wide)


@pytest.mark.parametrize("shape", [(512, 1024), (1024, 2816), (40960, 512)])
def test_splits_of_k_and_their_steps_do_not_depend_on_tokens(shape: tuple[int, int]) -> None:
    assert len({kernel._tiling(n, *shape).splits for n in range(1, 129)}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("n", [1, 3, 16, 17, 33, 64, 65, 128])
def test_kernel_is_within_output_rounding_of_float64(
    dtype: torch.dtype, group: int, zeros: bool, n: int
) -> None:
    weight = stored(512, 2816, group, zeros=zeros)  # eleven chunks
    x = torch.randn(n, 2816, generator=torch.Generator().manual_seed(n)).to(dtype)
    prepared, x_gpu = on_gpu(*weight), x.cuda()
    # What the allocator gives next holds NaN: an element that is not written shows.
    poisoned = [torch.full_like(x_gpu[:, :512], float("nan")) for _ in range(64)]
    del poisoned
    y = kernel.matmul(x_gpu, prepared)
    limit = 5e-3 if dtype == torch.bfloat16 else 6e-4
    assert oracle.worst(y.cpu().float(), exact(x, *weight)) < limit


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n_out", "k"),
    [(512, 2816), (8192, 8192), (57344, 512)],  # eight splits, four, one
)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_row_has_the_same_bits_however_many_are_read(
    dtype: torch.dtype, n_out: int, k: int, zeros: bool
) -> None:
    weight = on_gpu(*stored(n_out, k, 128, zeros=zeros))
    x = torch.randn(64, k, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    whole = kernel.matmul(x, weight)
    for n in WIDTHS:
        assert torch.equal(kernel.matmul(x[:n], weight), whole[:n]), n
        assert torch.equal(kernel.matmul(x[64 - n :], weight), whole[64 - n :]), n


@pytest.mark.gpu
def test_replays_of_a_cuda_graph_give_the_same_bits() -> None:
    weight = on_gpu(*stored(512, 2816, 128, zeros=True))
    x = torch.randn(9, 2816, generator=torch.Generator().manual_seed(1)).half().cuda()
    expected = kernel.matmul(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernel.matmul(x, weight)
    for _ in range(3):
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, expected)
