"""AWQ's layers, as AutoAWQ and GPTQModel pack them in the test run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from quant.formats import read_quantization
from tests.quant.formats.cases import AWQ, MODULE, Case
from tests.quant.formats.reading import layout_of, load_case, opened

# The first test waits for the packages to write.
pytestmark = pytest.mark.timeout(900)

PLAIN = Case(package="autoawq", symmetric=False, group_size=64)


@pytest.mark.parametrize("case", AWQ, ids=str)
def test_a_layer_opens_to_the_weight_its_package_opens(written: Path, case: Case) -> None:
    tensors, reference = load_case(written, case)
    weight = opened(case.config, tensors, case.k)
    assert torch.equal(weight.to(reference.dtype), reference)


def test_the_names_of_older_files_mean_the_same(written: Path) -> None:
    tensors, reference = load_case(written, PLAIN)
    config = {
        "quant_method": "awq",
        "zero_point": True,
        "q_group_size": 64,
        "w_bit": 4,
        "version": "GEMM",
    }
    assert torch.equal(opened(config, tensors, PLAIN.k).to(reference.dtype), reference)


def test_zeros_beside_zero_point_false_are_refused(written: Path) -> None:
    tensors, _ = load_case(written, PLAIN)
    with pytest.raises(ValueError, match="qzeros must all be 8 where zero_point is false"):
        opened(PLAIN.config | {"zero_point": False}, tensors, PLAIN.k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "gemv"}, "version must be 'gemm', got 'gemv'"),
        ({"version": "GEMV_fast"}, "version must be 'gemm', got 'gemv_fast'"),
        ({"version": "marlin"}, "version must be 'gemm', got 'marlin'"),
        ({"version": "exllama"}, "version must be 'gemm', got 'exllama'"),
        ({"format": "llm-awq"}, "format must be 'gemm', got 'llm-awq'"),
        ({"backend": "llm-awq"}, "backend must be 'autoawq', got 'llm-awq'"),
        ({"bits": 8}, "bits must be 4, got 8"),
        ({"bits": 3}, "bits must be 4, got 3"),
        ({"zero_point": None}, "must hold zero_point or sym, got neither"),
        ({"rotation": "hadamard"}, "rotation must be absent"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert must hold names, got 1"),
        ({"dynamic": {"down": {"bits": 8}}}, "bits must be 4, got 8"),
    ],
)
def test_what_no_scheme_computes_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(PLAIN.config | changes)


def test_a_shape_that_the_words_do_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="N must be a multiple of 8, got N=60"):
        layout_of(PLAIN.config).specs(60, 256)


def test_layers_whose_names_hold_a_piece_are_dense() -> None:
    config = PLAIN.config | {"modules_to_not_convert": ["layers.0.mlp", "lm_head"]}
    quantization = read_quantization({"quantization_config": config}, frozenset())
    assert quantization is not None
    assert quantization.layout(MODULE) is None
    assert quantization.layout("lm_head") is None
    assert quantization.layout("model.layers.1.mlp.down_proj") is not None
    assert quantization.label == "w4a16-g64-asym+awq"
