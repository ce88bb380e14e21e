"""Block floating point: what rounding keeps, how digits lie, and the kernel bit for bit."""

import pytest
import torch
from torch import Tensor

from quant import block_float
from quant.block_float import BLOCK, HIGHEST, BlockFloat, round_blocks, values
from tests.quant.interpreted import interpreted

SHAPES = [(1, 128), (3, 4160), (9, 1344), (2, 40)]  # n and K, with blocks that are filled up
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def draw(n: int, k: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal values times powers of two over most of float16, with outliers and zeros."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(n, k, generator=generator)
    x *= (
        2.0
        ** torch.randint(-20, 11, (n, -(-k // 16)), generator=generator).repeat_interleave(
            16, dim=1
        )[:, :k]
    )
    x[:, ::37] *= 30
    x[:, ::11] = 0
    x[-1, :BLOCK] = 0
    return x.to(dtype)


def largest(x: Tensor) -> Tensor:
    """Of each value's block. [n, K] -> [n, K]."""
    n, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % BLOCK)).view(n, -1, BLOCK)
    return padded.abs().amax(-1, keepdim=True).expand_as(padded).reshape(n, -1)[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_nothing_is_farther_off_than_half_a_step_of_its_block(n: int, k: int, dtype: str) -> None:
    x = draw(n, k, DTYPES[dtype]).double()
    error = (values(round_blocks(x.to(DTYPES[dtype])), k) - x).abs()
    # Half a step, of which the largest value has more than 16,319.
    assert bool((error <= largest(x) / 32639).all())


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_large_values_of_float16_are_exact(n: int, k: int) -> None:
    x = draw(n, k, torch.float16)
    large = x.abs() >= largest(x) / 8
    assert bool(large.any())
    assert torch.equal(values(round_blocks(x), k)[large], x.double()[large])


@pytest.mark.parametrize("power", [-60, -14, 0, 15, 100])
def test_a_block_takes_the_finest_step_that_holds_its_largest(power: int) -> None:
    # The largest is 32,639 steps and no more.
    for top, steps in ((HIGHEST / 2**14, 1.0), (32640 / 2**14, 2.0), (1.0, 1.0), (-1.5, 1.0)):
        x = torch.zeros(1, BLOCK)
        x[0, 5] = top
        rounded = round_blocks(x * 2.0**power)
        assert rounded.scales[0, 0] == steps * 2.0 ** (power - 14)
        assert values(rounded, BLOCK)[0, 5] == top * 2.0**power


def test_ties_go_to_even_and_digits_carry() -> None:
    x = torch.zeros(1, BLOCK)
    x[0, :7] = torch.tensor([16384.0, 0.5, 1.5, -2.5, 127.0, 128.0, -129.0])
    rounded = round_blocks(x)
    assert rounded.scales[0, 0] == 1
    assert values(rounded, BLOCK)[0, :7].tolist() == [16384, 0, 2, -2, 127, 128, -129]
    places = [block_float.ORDER.index(i) for i in range(7)]
    assert rounded.digits[0, 0, places].tolist() == [64, 0, 0, 0, 0, 1, -1]
    assert rounded.digits[1, 0, places].tolist() == [0, 0, 2, -2, 127, -128, 127]


def test_digits_stand_as_a_thread_multiplies_them() -> None:
    # PTX ISA, m16n8k16: thread c has inputs 2c, 2c + 1 and, 8 on, two more.
    order = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]
    x = torch.arange(256.0).view(2, BLOCK)
    x[:, 127] = 16384  # steps of one
    whole = round_blocks(x).digits.int()
    found = (whole[0] * 256 + whole[1]).view(2, -1, 16)
    assert torch.equal(found, x.int().view(2, -1, 16)[..., order])


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_k_and_n_are_filled_up(n: int, k: int) -> None:
    digits, scales = round_blocks(draw(n, k) + 1)
    blocks = -(-k // BLOCK)
    assert digits.shape == (2, n, blocks * BLOCK)
    assert scales.shape == (blocks, -(-n // 8) * 8)
    assert (digits.dtype, scales.dtype) == (torch.int8, torch.float32)
    whole = torch.empty(n, blocks * BLOCK).view(n, -1, 16)
    whole[..., block_float.ORDER] = digits.abs().sum(0).float().view(n, -1, 16)
    assert bool((whole.view(n, -1)[:, k:] == 0).all())


def test_a_block_of_zeros_is_zeros_with_a_finite_scale() -> None:
    digits, scales = round_blocks(torch.zeros(2, 256))
    assert not digits.any()
    assert bool(scales[:, :2].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_makes_its_own_blocks_scale_nan(bad: float, dtype: str) -> None:
    x = torch.ones(3, 300, dtype=DTYPES[dtype])
    x[1, 130] = bad
    scales = round_blocks(x).scales[:, :3]
    assert scales.isnan().nonzero().tolist() == [[1, 1]]


def test_values_too_small_for_a_step_become_zeros() -> None:
    x = torch.full((1, BLOCK), 1e-44)
    assert bool((values(round_blocks(x), BLOCK) == 0).all())
    x[0, 3] = 2.0**-100
    assert values(round_blocks(x), BLOCK)[0, 3] == 2.0**-100


def same(found: BlockFloat, expected: BlockFloat) -> bool:
    """Bit for bit, but for what nothing reads: scales of no token, digits under a NaN."""
    n = found.digits.shape[1]
    scales, wanted = found.scales[:, :n], expected.scales[:, :n]
    bad = wanted.isnan()
    read = ~bad.t().repeat_interleave(BLOCK, dim=1)
    return (
        found.scales.shape == expected.scales.shape
        and torch.equal(scales.isnan(), bad)
        and torch.equal(scales[~bad], wanted[~bad])
        and torch.equal(found.digits[:, read], expected.digits[:, read])
    )


def check(dtype: str, device: str) -> None:
    """Compare the kernel with the reference. On a CPU not in bfloat16, which is cut off there."""
    from quant.kernels import blocks_triton

    for n, k in [*SHAPES, (70, 1024), (5, 14336 if device == "cuda" else 2048)]:
        x = draw(n, k, DTYPES[dtype]).to(device)
        assert same(blocks_triton.round_blocks(x), round_blocks(x)), (n, k)
        wide = torch.cat([x, x], dim=1)[:, :k]  # rows that lie apart
        assert same(blocks_triton.round_blocks(wide), round_blocks(x)), (n, k)
        for column, bad in ((0, float("nan")), (k - 1, float("inf")), (k // 2, float("-inf"))):
            x[n // 2, column] = bad
        assert same(blocks_triton.round_blocks(x), round_blocks(x)), (n, k)
    if dtype == "float32":
        for power in (-149, -126, -101, -100, 0, 126, 127):
            x = (draw(2, 256).clamp(-1, 1) * 2.0**power).to(device)
            assert same(blocks_triton.round_blocks(x), round_blocks(x)), power


INTERPRETED = """
import sys
from tests.quant.test_block_float import check
check(sys.argv[1], "cpu")
"""


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_interpreted_kernel_rounds_to_the_references_bits(dtype: str) -> None:
    pytest.importorskip("triton")
    interpreted(INTERPRETED, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_rounds_to_the_references_bits(dtype: str) -> None:
    check(dtype, "cuda")
