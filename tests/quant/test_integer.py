import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from quant.integer import _float_matmul, int_matmul

SHAPES = [
    (n, k, width) for n in (0, 1, 7, 17, 60) for k in (1, 2, 129, 768) for width in (1, 5, 64)
]


def _random(rows: int, k: int) -> Tensor:
    return torch.randint(-128, 128, (rows, k), dtype=torch.int8)


@pytest.mark.parametrize(("n", "k", "width"), SHAPES)
def test_product_is_exact(n: int, k: int, width: int) -> None:
    torch.manual_seed(0)
    a, w = _random(n, k), _random(width, k)
    product = int_matmul(a, w)
    assert product.dtype == torch.int32
    assert torch.equal(product.long(), a.long() @ w.long().t())


@pytest.mark.parametrize("k", [1024, 1026, 14336])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, -128), (127, 127)])
def test_largest_sums_are_exact(k: int, left: int, right: int) -> None:
    a = torch.full((3, k), left, dtype=torch.int8)
    w = torch.full((2, k), right, dtype=torch.int8)
    w[1, 0] = 1  # an odd sum, which a format short of one bit would round
    expected = [k * left * right, (k - 1) * left * right + left]
    assert int_matmul(a, w).tolist() == [expected] * 3
    assert _float_matmul(a, w).tolist() == [expected] * 3


def test_a_row_does_not_depend_on_the_other_rows() -> None:
    torch.manual_seed(0)
    a, w = _random(40, 256), _random(96, 256)
    alone = torch.cat([int_matmul(row[None], w) for row in a])
    assert torch.equal(int_matmul(a, w), alone)


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_product_is_exact_on_processors_without_integer_dot_products(instructions: str) -> None:
    # There oneDNN saturates in 16 bits; a fresh process, because it looks once.
    program = (
        "import torch; from quant.integer import int_matmul\n"
        "a = torch.full((20, 256), 127, dtype=torch.int8)\n"
        "print(int_matmul(a, a[:3]).unique().tolist())"
    )
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == str([256 * 127 * 127])


@pytest.mark.gpu
@pytest.mark.parametrize("k", [8, 12, 256, 1032])
@pytest.mark.parametrize("width", [5, 8, 768])
def test_product_is_exact_on_cuda(k: int, width: int) -> None:
    torch.manual_seed(0)
    w = _random(width, k)
    for n in (0, 1, 2, 15, 16, 17, 31, 32, 33, 60, 100):
        a = _random(n, k)
        assert torch.equal(int_matmul(a.cuda(), w.cuda()).cpu().long(), a.long() @ w.long().t())
