"""The W8A8 kernel against the reference, bit for bit: on a GPU, and in Triton's interpreter."""

import pytest
import torch
from torch import Tensor

from quant.kernels.triton_kernel import TritonKernel
from quant.w8a8 import W8A8, W8A8Linear
from tests.quant.interpreted import interpreted

pytest.importorskip("triton")
kernel = pytest.importorskip("quant.kernels.w8a8_triton")


def layer(n: int, k: int, *, seed: int = 0) -> W8A8Linear:
    """Random codes with no pattern, scales around 0.015."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randint(-127, 128, (n, k), generator=generator, dtype=torch.int8)
    scales = (torch.rand(n, generator=generator) * 0.01 + 0.01).half()
    return W8A8Linear(weight, scales, None)


def inputs(n: int, k: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(n)).to(dtype)


INTERPRETED = """
import sys, torch
from quant.grid import round_tokens
from quant.kernels import w8a8_triton as kernel
from tests.quant.test_w8a8_triton import inputs, layer
n, k = map(int, sys.argv[1:])
own, x = layer(128, k), inputs(n, k, torch.float32)
tokens = round_tokens(x)
counted = kernel.counters(128, torch.device("cpu"))
for _ in range(2):  # the second time on counters that the first has left
    y = kernel.matmul(tokens.codes, tokens.scale, own.weight, own.scales, counted, x.dtype)
    assert torch.equal(y, own(x)), "bits differ"
    assert counted.abs().max() == 0
"""


@pytest.mark.parametrize(("n", "k"), [(1, 1280), (5, 256), (17, 1280), (66, 512), (128, 768)])
def test_interpreted_kernel_gives_the_references_bits(n: int, k: int) -> None:
    # 1280 inputs are five chunks, which eight splits share unevenly: the last have none.
    interpreted(INTERPRETED, n, k)


def refusal(**changes: Tensor) -> str:
    own = layer(64, 512)
    given = {
        "codes": torch.zeros(2, 512, dtype=torch.int8),
        "token_scales": torch.ones(2, 1),
        "weight": own.weight,
        "scales": own.scales,
        "counted": kernel.counters(64, torch.device("cpu")),
    }
    with pytest.raises(ValueError) as refused:
        kernel.matmul(**(given | changes), dtype=torch.float16)
    return str(refused.value)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weight": torch.zeros(32, 512).to(torch.int8)}, "N a multiple of 64 and K of 256"),
        ({"weight": torch.zeros(64, 384).to(torch.int8)}, "got 64, 384"),
        ({"codes": torch.zeros(2, 256).to(torch.int8)}, "codes must be [n, 512]"),
        ({"codes": torch.zeros(129, 512).to(torch.int8)}, "1 ... 128, got [129, 512]"),
        ({"codes": torch.zeros(0, 512).to(torch.int8)}, "got [0, 512]"),
        ({"codes": torch.zeros(2, 512)}, "must be int8, got torch.float32 and torch.int8"),
        ({"codes": torch.zeros(512, 2).to(torch.int8).t()}, "got strides (1, 2)"),
        ({"token_scales": torch.ones(2, 1).half()}, "must be float32 and int32"),
        ({"scales": torch.ones(64, device="meta")}, "on meta"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], what: str) -> None:
    assert what in refusal(**changes)


def test_a_layer_keeps_its_tensors_and_names_its_limits() -> None:
    weight = torch.randn(128, 512, generator=torch.Generator().manual_seed(0))
    scheme = W8A8(smooth_alpha=0.5)
    own = scheme.layer(scheme.pack(weight, torch.rand(512) + 1))
    own_kernel = TritonKernel()
    assert own_kernel.unfit(own, torch.float16) == ""
    fitted = own_kernel.fit(own, torch.float16)
    assert fitted.kernel == "triton"
    assert torch.equal(fitted.dequantize(), own.dequantize())
    assert 0 <= fitted.weight_bytes - own.weight_bytes <= 64
    assert "got N=96, K=512" in own_kernel.unfit(layer(96, 512), torch.float16)
    assert "dtype=float16 or bfloat16" in own_kernel.unfit(layer(64, 512), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(512, 256), (1024, 2816), (28672, 512)])
def test_kernel_gives_the_references_bits_at_every_width(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    own = layer(*shape).to("cuda")
    fitted = TritonKernel().fit(own, dtype)
    for n in (1, 3, 16, 17, 33, 64, 65, 128, 129):
        x = inputs(n, shape[1], dtype).cuda()
        # What the allocator gives next holds NaN: an element that is not written shows.
        poisoned = [torch.full((n, shape[0]), torch.nan, dtype=dtype, device="cuda")]
        del poisoned
        assert torch.equal(fitted(x), own(x)), n


@pytest.mark.gpu
def test_replays_of_a_graph_leave_the_counters_as_they_were() -> None:
    fitted = TritonKernel().fit(layer(512, 2816).to("cuda"), torch.float16)
    x = inputs(60, 2816, torch.float16).cuda()
    expected = fitted(x)
    torch.cuda.synchronize()  # noqa: TID251
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fitted(x)
    for _ in range(20):
        y.fill_(torch.nan)
        graph.replay()
        assert torch.equal(y, expected)
