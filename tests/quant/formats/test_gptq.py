"""GPTQ's layers, as AutoGPTQ and GPTQModel pack them in the test run.

A code less a zero has 9 bits at most and a scale 11, so that our float32 product is exact and the
package's weight is its rounding to the dtype of the scales; with float32 scales both round once.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quant.formats import read_quantization
from quant.grid import num_groups
from tests.quant.formats.cases import GPTQ, MODULE, SPOILT, Case, K
from tests.quant.formats.reading import layout_of, load_case, opened

# The first test waits for the packages to write.
pytestmark = pytest.mark.timeout(900)

PLAIN = Case(package="gptqmodel", version="gptq", symmetric=False, group_size=64)
SCATTERED = Case(
    package="gptqmodel", version="gptq", symmetric=False, group_size=64, act_order="scattered"
)


@pytest.mark.parametrize("case", GPTQ, ids=str)
def test_a_layer_opens_to_the_weight_its_package_opens(written: Path, case: Case) -> None:
    tensors, reference = load_case(written, case)
    weight = opened(case.config, tensors, case.k)
    assert torch.equal(weight.to(reference.dtype), reference)


@pytest.mark.parametrize("case", GPTQ, ids=str)
def test_only_scattered_groups_need_an_order(written: Path, case: Case) -> None:
    tensors, _ = load_case(written, case)
    stored = layout_of(case.config).read(tensors)
    groups = num_groups(case.k, case.group_size)
    assert ("order" in stored) == (case.act_order == "scattered" and groups > 1)
    assert ("zeros" in stored) == (not case.symmetric)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_of_the_first_format_read_as_the_second_are_off_by_one_step(
    written: Path, bits: int
) -> None:
    case = Case(package="autogptq", bits=bits, symmetric=False, group_size=64)
    tensors, reference = load_case(written, case)
    weight = opened(case.config | {"checkpoint_format": "gptq_v2"}, tensors, case.k)
    steps = tensors["scales"].t().float().repeat_interleave(64, dim=1)
    assert torch.equal(opened(case.config, tensors, case.k), weight - steps)
    assert not torch.equal(weight.to(reference.dtype), reference)


@pytest.mark.parametrize("case", SPOILT, ids=str)
def test_zeros_that_autogptq_spoils_are_refused(written: Path, case: Case) -> None:
    tensors, _ = load_case(written, case)
    top = 2**case.bits - 1
    with pytest.raises(ValueError, match=f"must be below {top}, .*its packing spoils"):
        opened(case.config, tensors, case.k)


def test_a_borrow_of_gptqmodel_comes_back_only_when_its_name_is_read(written: Path) -> None:
    tensors, _ = load_case(written, PLAIN)
    with pytest.raises(ValueError, match="qzeros must be below 15"):
        opened(PLAIN.config | {"meta": {"quantizer": ["optimum:2.3"]}}, tensors, K)


NEIGHBOURS = torch.arange(K, dtype=torch.int32) // 64


@pytest.mark.parametrize(
    ("g_idx", "message"),
    [
        (NEIGHBOURS + 1, "g_idx must be 0 ... 3, got 1 ... 4"),
        (NEIGHBOURS - 1, "g_idx must be 0 ... 3, got -1 ... 2"),
        ((torch.arange(K) + 1).clamp(max=K - 1).int() // 64, "equally, got 63 to 65 inputs"),
        (torch.zeros_like(NEIGHBOURS), "fill its groups equally, got 0 to 256 inputs"),
    ],
    ids=["past the last group", "negative", "short group", "one group only"],
)
def test_groups_that_no_order_makes_neighbours_are_refused(
    written: Path, g_idx: Tensor, message: str
) -> None:
    tensors, _ = load_case(written, PLAIN)
    with pytest.raises(ValueError, match=message):
        layout_of(PLAIN.config).read(tensors | {"g_idx": g_idx})


def test_groups_count_and_not_the_settings(written: Path) -> None:
    tensors, reference = load_case(written, SCATTERED)
    config = SCATTERED.config | {"desc_act": False, "static_groups": True}
    assert torch.equal(opened(config, tensors, K).to(reference.dtype), reference)


def test_zeros_beside_sym_true_are_refused(written: Path) -> None:
    tensors, _ = load_case(written, PLAIN)
    with pytest.raises(ValueError, match="qzeros must all mean 8 where sym is true"):
        opened(PLAIN.config | {"sym": True}, tensors, K)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 2}, "bits must be 4 or 8, got 2"),
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"bits": None}, "bits must be of type int, got None"),
        ({"bits": True}, "bits must be of type int, got True"),
        ({"group_size": "128"}, "group_size must be of type int, got '128'"),
        ({"group_size": 0}, "group_size must be -1 or even and positive, got 0"),
        ({"sym": "yes"}, "sym must be of type bool, got 'yes'"),
        ({"checkpoint_format": "gptq_p"}, "checkpoint_format must be .* got 'gptq_p'"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be .* got 'marlin'"),
        ({"format": "bitblas"}, "format must be 'gptq' or 'gptq_v2', got 'bitblas'"),
        ({"format": "gptq_v2"}, "format and checkpoint_format must agree"),
        ({"is_marlin_format": True}, "is_marlin_format must be false, got true"),
        ({"pack_dtype": "int16"}, "pack_dtype must be 'int32', got 'int16'"),
        ({"rotation": "hadamard"}, "rotation must be absent, .* got 'hadamard'"),
        ({"meta": {"rotation": "random"}}, "rotation must be absent, .* got 'random'"),
        ({"adapter": {"rank": 8}}, "adapter must be absent"),
        ({"activation": {"mode": "w4afp8"}}, "activation must be absent, .*w4afp8"),
        ({"dynamic": {"down": {"bits": 3}}}, "bits must be 4 or 8, got 3"),
        ({"dynamic": {"down": {"format": "gptq_p"}}}, r"dynamic\['down'\] may hold .*got format"),
        ({"dynamic": {"(": {"bits": 4}}}, r"dynamic\['\('\] must be a regular expression"),
        ({"dynamic": {"down": 4}}, r"dynamic\['down'\] must be an object, got 4"),
        ({"modules_in_block_to_quantize": [[4]]}, "modules_in_block_to_quantize must hold names"),
        ({"quant_method": "exl2"}, "quant_method must be one of .* got 'exl2'"),
        ({"quant_method": "bitblas"}, "quant_method must be one of .* got 'bitblas'"),
        ({"quant_method": "marlin"}, "quant_method must be one of .* got 'marlin'"),
    ],
)
def test_what_no_scheme_computes_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _ = layout_of(PLAIN.config | changes).scheme


@pytest.mark.parametrize(
    ("n", "k", "message"),
    [
        (60, 256, "N and K must be multiples of 8, got N=60"),
        (64, 250, "N and K must be multiples of 8, got N=64 and K=250"),
        (64, 160, "K must be a multiple of group_size=64, got K=160"),
    ],
)
def test_a_shape_that_the_words_do_not_fit_is_refused(n: int, k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(PLAIN.config).specs(n, k)


def test_the_first_pattern_that_matches_the_start_of_a_name_counts() -> None:
    config = PLAIN.config | {
        "lm_head": True,
        "dynamic": {
            r"-:model\.layers\.1\.mlp\.": {},
            r"+:.*mlp\.down": {"bits": 8, "group_size": 32, "mse": 2.4},
            r".*down_proj": {"bits": 4, "sym": True},
            r"lm_head": {"bits": 8},
            r"mlp\.up": {"bits": 8},
        },
    }
    quantization = read_quantization({"quantization_config": config}, frozenset())
    assert quantization is not None
    labels = {
        module: None if (layout := quantization.layout(module)) is None else layout.scheme.label
        for module in (
            MODULE,
            "model.layers.1.mlp.down_proj",
            "model.layers.0.mlp.up_proj",
            "lm_head",
        )
    }
    assert labels == {
        MODULE: "w8a16-g32-asym",
        "model.layers.1.mlp.down_proj": None,
        "model.layers.0.mlp.up_proj": "w4a16-g64-asym",
        "lm_head": "w8a16-g64-asym",
    }
    assert quantization.label == "w4a16-g64-asym+gptq+dynamic"


def test_layers_that_optimum_does_not_name_are_dense() -> None:
    config = PLAIN.config | {"modules_in_block_to_quantize": [["mlp.down_proj"], ["self_attn.q"]]}
    quantization = read_quantization({"quantization_config": config}, frozenset())
    assert quantization is not None
    assert quantization.layout(MODULE) is not None
    assert quantization.layout("model.layers.0.mlp.up_proj") is None
    assert quantization.layout("lm_head") is None


def test_a_label_tells_rounding_to_nearest_from_gptq() -> None:
    meta = PLAIN.config["meta"] | {"weight_only": {"smooth": None}}
    quantization = read_quantization(
        {"quantization_config": PLAIN.config | {"meta": meta}}, frozenset()
    )
    assert quantization is not None
    assert quantization.label == "w4a16-g64-asym+rtn"
