"""4-bit weights opened by a kernel have the bits that the scheme opens them to."""

import pytest
import torch

from quant.kernels import w4a16_hopper
from quant.weight_only import WeightOnlyLinear
from tests.quant.interpreted import interpreted

pytest.importorskip("triton")
kernel = pytest.importorskip("quant.kernels.open_triton")

SHAPES = [  # N, K, group: what fills no block and no chunk, two groups a chunk, chunks of one group
    (512, 256, 128),
    (264, 320, 64),
    (520, 512, 256),
    (8, 72, 72),
    (1032, 640, 640),
]
SCALES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def check(n: int, k: int, group: int, scale: str, device: str) -> None:
    """Compare, bit for bit, with and without zeros.

    In float16 alone on a CPU: Triton's interpreter cuts bfloat16 off where it should round.
    """
    generator = torch.Generator().manual_seed(n)
    packed = torch.randint(0, 256, (n, k // 2), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(n, k // group, generator=generator) * 0.02 - 0.01).to(SCALES[scale])
    offsets = torch.randint(0, 16, scales.shape, generator=generator, dtype=torch.uint8)
    for zeros in (None, offsets.to(device)):
        stored = (packed.to(device), scales.to(device), zeros)
        weight = w4a16_hopper.prepare(*stored)
        for dtype in (torch.float16, torch.bfloat16)[: 1 if device == "cpu" else 2]:
            expected = WeightOnlyLinear(*stored, None, bits=4).opened(dtype)
            own = (weight.words, weight.scales, weight.zeros)
            found = kernel.opened(*own, (n, k), group=weight.group, dtype=dtype)
            assert found.dtype == dtype
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), dtype


INTERPRETED = """
import sys
from tests.quant.test_open_triton import check
check(*map(int, sys.argv[1:4]), sys.argv[4], "cpu")
"""


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "k", "group"), SHAPES)
def test_an_interpreted_kernel_opens_to_the_schemes_bits(
    n: int, k: int, group: int, scale: str
) -> None:
    interpreted(INTERPRETED, n, k, group, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("n", "k", "group"), [*SHAPES, (8192, 4096, 128)])
def test_a_weight_is_opened_to_the_schemes_bits(n: int, k: int, group: int, scale: str) -> None:
    check(n, k, group, scale, "cuda")
