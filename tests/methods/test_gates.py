"""A model whose kernel gates by itself: for which reads it does, and that nothing else changes."""

from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from methods.fused import silu_mul
from quant.kernels.gated import GatedLinear
from quant.kernels.kernel import Kernel
from quant.scheme import QuantLinear
from quant.w4a16 import W4A16
from tests.family import llama_config, write_llama
from tests.methods.parts import load

MOST = 4  # rows


class Gating(Kernel):
    """The reference under another name, which gates few rows. rows: of every read that it gated."""

    name: ClassVar[str] = "cuda"

    def __init__(self) -> None:
        self.rows: list[int] = []

    def missing(self, device: torch.device) -> str:
        return ""

    def unfit(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        return ""

    def inexact(self, layer: QuantLinear, dtype: torch.dtype) -> str:
        return ""

    def fit(self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False) -> QuantLinear:
        return layer

    def fit_gated(
        self, layer: QuantLinear, dtype: torch.dtype, *, exact: bool = False
    ) -> QuantLinear:
        def gated(x: Tensor) -> Tensor:
            self.rows.append(len(x))
            return silu_mul(layer.forward(x))

        return GatedLinear(layer, gated, dtype, most=None if exact else MOST)


def scheme(kernel: str) -> W4A16:
    return W4A16(group_size=32, symmetric=True, range_search=False, kernel=kernel)


@pytest.mark.parametrize("exact", [False, True])
def test_feed_forward_layers_alone_gate_and_give_the_same(
    tmp_path: Path, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gating = Gating()
    monkeypatch.setattr("quant.kernels.choice.AVAILABLE", (gating,))
    folder = write_llama(tmp_path, llama_config(), seed=1)
    plain = load(folder, scheme("reference"), torch.float32)
    model = load(folder, scheme("cuda"), torch.float32, exact=exact)
    gate_ups = {name for name, made in model.linears.items() if isinstance(made, GatedLinear)}
    layers = model.shape.num_layers
    assert gate_ups == {f"blocks.{i}.mlp.gate_up" for i in range(layers)}
    assert model.weight_bytes == plain.weight_bytes
    for n in (1, MOST, MOST + 1):
        gating.rows.clear()
        tokens = torch.arange(n)[None]
        found, expected = (m(tokens, torch.arange(n), m.cache(n)).hidden for m in (model, plain))
        assert torch.equal(found, expected), n
        assert gating.rows == ([n] * layers if exact or n <= MOST else [])
