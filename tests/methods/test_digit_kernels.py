"""Kernels that give digits give those of what they give without, from one launch."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from methods import fused
from quant.block_float import BlockFloat, round_blocks
from tests.methods.kernel_parts import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ON_GPU,
    base_of,
    draw,
    kernel,
    random_parents,
    run_interpreted,
)
from tests.quant.test_block_float import same

if INTERPRETED or ON_GPU:
    from methods.kernels import attention, combine, gate, norm
    from quant.kernels import blocks_triton

# Of them 4160, 1344 and 72 fill no whole blocks; 40 is less than half of one.
WIDTHS = [4096, 4160, 1344, 72, 40]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def spread(n: int, width: int, dtype: torch.dtype) -> Tensor:
    """Values whose blocks are of unlike sizes, a few of them large."""
    x = draw(n, width) * 2.0 ** torch.randint(-9, 4, (n, width), device=DEVICE)
    x[:, ::97] *= 50
    return x.to(dtype)


def of_plain(found: Tensor | BlockFloat, plain: Tensor | BlockFloat) -> bool:
    """Whether digits are those of a plain result, by the reference and by the kernel."""
    assert isinstance(found, BlockFloat)
    assert isinstance(plain, Tensor)
    return same(found, round_blocks(plain)) and same(found, blocks_triton.round_blocks(plain))


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_norms_digits_are_those_of_its_rows(
    n: int, width: int, added: bool, dtype: torch.dtype
) -> None:
    x, weight = spread(n, width, dtype), draw(width, dtype=dtype)
    x[-1, -3:] = 0
    residual = spread(n, width, dtype) if added else None
    normed, summed = norm.add_norm(x, residual, weight, 1e-5)
    digits, total = norm.add_norm(x, residual, weight, 1e-5, digits=True)
    assert torch.equal(total, summed)
    assert of_plain(digits, normed)


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [*WIDTHS, 1024, 1100])
@pytest.mark.parametrize("n", [1, 3])
def test_a_gates_digits_are_those_of_its_rows(n: int, inner: int, dtype: torch.dtype) -> None:
    gate_up = spread(n, 2 * inner, dtype)
    assert of_plain(gate.silu_mul(gate_up, digits=True), gate.silu_mul(gate_up))


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("few", [0, 10**9])
@pytest.mark.parametrize(("heads", "groups", "dim"), [(4, 2, 128), (3, 1, 64), (1, 1, 32)])
@pytest.mark.parametrize(("n", "base"), [(1, 70), (3, 300)])
def test_attentions_digits_are_those_of_its_rows(
    n: int,
    base: int,
    heads: int,
    groups: int,
    dim: int,
    few: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "FEW", few)  # whole splits, or steps
    queries = draw(n, heads, dim, dtype=dtype)
    cache = spread(2 * groups * (base + n), dim, dtype).view(2, groups, -1, dim)
    for paths in (None, fused.ancestry(random_parents(n), n)[2]):
        plain, digits = (
            attention.attend(queries, cache, base_of(base), 0, ancestors=paths, digits=wanted)
            for wanted in (False, True)
        )
        assert of_plain(digits, plain)


@kernel
def test_what_is_not_finite_reaches_a_products_scales() -> None:
    gate_up = draw(3, 2 * 300, dtype=torch.float16)
    gate_up[1, 300 + 130] = torch.inf
    digits = gate.silu_mul(gate_up, digits=True)
    assert digits.scales[:, :3].isnan().nonzero().tolist() == [[1, 1]]
    x = draw(2, 300, dtype=torch.float16)
    x[0, 5] = torch.nan
    digits, _ = norm.add_norm(x, None, x[1], 1e-5, digits=True)
    assert digits.scales[:, :2].isnan().tolist() == [[True, False]] * 3


@kernel
def test_digits_take_no_launch_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[tuple[int, ...]] = []

    def count(x: Tensor) -> BlockFloat:
        rounded.append(tuple(x.shape))
        return round_blocks(x)

    for module in (norm, combine):
        monkeypatch.setattr(module, "round_blocks", count)
    x = draw(2, 256, dtype=torch.float16)
    norm.add_norm(x, None, x[0], 1e-5, digits=True)
    gate.silu_mul(x, digits=True)
    for dim in (128, 64):
        queries, cache = draw(2, 2, dim).half(), draw(2, 1, 8, dim).half()
        attention.attend(queries, cache, base_of(4), 0, ancestors=None, digits=True)
    assert rounded == [(2, 128)]  # heads that are no blocks


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 8, 32])
def test_a_captured_step_in_digits_gives_those_of_one_that_is_not(
    n: int, dtype: torch.dtype
) -> None:
    heads, groups, dim, width = 32, 8, 128, 4096
    queries, x = draw(n, heads, dim, dtype=dtype), spread(n, width, dtype)
    cache, gate_up = draw(2, groups, 700, dim, dtype=dtype), spread(n, 2 * 14336, dtype)
    base, weight = base_of(600), draw(width, dtype=dtype)

    def step(*, digits: bool) -> list[Tensor | BlockFloat]:
        mixed = fused.attend(queries, cache, base, 0, ancestors=None, digits=digits)
        normed, _ = fused.add_norm(x, x, weight, 1e-5, digits=digits)
        return [mixed, normed, fused.silu_mul(gate_up, digits=digits)]

    step(digits=True)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(digits=True)
    for length in (600, 64, 650):
        base.fill_(length)
        graph.replay()
        for found, plain in zip(captured, step(digits=False), strict=True):
            assert of_plain(found, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_the_cpu_rounds_what_plain_torch_gives(dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 200).to(dtype), torch.randn(200).to(dtype)
    queries, cache = torch.randn(3, 2, 64).to(dtype), torch.randn(2, 1, 9, 64).to(dtype)

    def both(give: Callable[[bool], Tensor | BlockFloat]) -> tuple[BlockFloat, BlockFloat]:
        found, plain = give(True), give(False)
        assert isinstance(found, BlockFloat)
        assert isinstance(plain, Tensor)
        return found, round_blocks(plain)

    base = torch.tensor([6])
    for give in (
        lambda digits: fused.silu_mul(x, digits=digits),
        lambda digits: fused.add_norm(x, x, weight, 1e-5, digits=digits)[0],
        lambda digits: fused.attend(queries, cache, base, 0, ancestors=None, digits=digits),
    ):
        assert same(*both(give))


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run here as they are")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_pass_interpreted() -> None:
    run = run_interpreted(__file__)
    assert run.returncode == 0, run.stdout[-3000:]
