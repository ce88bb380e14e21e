"""GPTQModel behind `specquant quantize`."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from methods.checkpoint import stored_in
from methods.weights import read_config
from quant.stored import AsStored
from tests.bench.quantize.door import Door


@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs the extra `quantize`")
@pytest.mark.parametrize(
    ("quantizer", "scheme", "label"),
    [("gptqmodel", "w4a16", "w4a16-g32+gptq"), ("awq", "w4a16_asym", "w4a16-g32-asym+awq")],
)
def test_gptqmodel_writes_a_folder_that_reads_as_asked(
    world: list[str], tmp_path: Path, door: Door, quantizer: str, scheme: str, label: str
) -> None:
    out = tmp_path / "out"
    kept = [o for o in world if o != "quant=w4a16"]
    code, _, told = door(*kept, f"quant={scheme}", f"quantizer={quantizer}", f"out={out}")
    assert (code, told) == (0, "")
    assert stored_in(out, AsStored(), AsStored()).label == label
    assert read_config(out)["specquant"]["calibration"]["samples"] == 8
    report = json.loads((out / "quality.json").read_text(encoding="utf-8"))
    errors = [row["output_error"] for row in report["layers"]]  # of the stream: they add up
    assert len(errors) == 5
    assert 0 < errors[0] < 0.1
    assert errors == sorted(errors)
    assert not list(tmp_path.glob(".out.*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["quant=w8a8"], "GPTQModel's gptq must write W4A16 or W8A16, got w8a8"),
        (["quant=w4a16", "quant.lm_head=w8a8"], "quant.lm_head must be checkpoint with a toolkit"),
    ],
)
@pytest.mark.skipif(find_spec("gptqmodel") is None, reason="needs the extra `quantize`")
def test_what_gptqmodel_does_not_write_is_refused(
    world: list[str], tmp_path: Path, door: Door, changes: list[str], message: str
) -> None:
    kept = [o for o in world if not o.startswith("quant")]
    code, _, told = door(*kept, *changes, "quantizer=gptqmodel", f"out={tmp_path / 'out'}")
    assert code == 2
    assert message in told
