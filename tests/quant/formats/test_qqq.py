"""QQQ's layers, as GPTQModel packs them in the test run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.quant.formats.cases import QQQ, Case, N
from tests.quant.formats.reading import layout_of, load_case, opened

# The first test waits for the packages to write.
pytestmark = pytest.mark.timeout(900)

GROUPS = Case(package="gptqmodel_qqq", group_size=128)


@pytest.mark.parametrize("case", [case for case in QQQ if case.group_size != case.k], ids=str)
def test_a_layer_opens_to_the_weight_its_package_opens(written: Path, case: Case) -> None:
    tensors, reference = load_case(written, case)
    assert torch.equal(opened(case.config, tensors, case.k), reference)


def test_a_group_as_long_as_a_row_which_is_packed_as_a_row_is_refused(written: Path) -> None:
    case = next(case for case in QQQ if case.group_size == case.k)
    tensors, _ = load_case(written, case)
    assert "s_group" not in tensors
    with pytest.raises(ValueError, match="group_size of a QQQ layer must be below K, or -1"):
        layout_of(case.config).specs(N, case.k)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits must be 4, got 8"),
        ({"wbits": 3}, "wbits must be 4, got 3"),
        ({"format": "gptq"}, "format must be 'qqq', got 'gptq'"),
        ({"group_size": None}, "group_size must be of type int, got None"),
        ({"rotation": "hadamard"}, "rotation must be absent"),
        ({"dynamic": {"down": {"sym": False}}}, "sym must be True, got False"),
    ],
)
def test_what_no_scheme_computes_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_of(GROUPS.config | changes)
