"""The kernels door without a GPU: what it refuses, what it writes, what it keeps."""

import csv
from pathlib import Path

import pytest
import torch

from bench import kernel_check, kernels
from bench.build import build
from bench.config import Config, parse, resolve
from bench.kernel_timing import Layer, Product
from bench.kernels import Jobs, Planned, Row, Settings
from bench.preflight import FAILED, inspect
from methods.recipe import Family
from quant.kernels import choice
from quant.kernels.machine import Machine
from quant.kernels.table import read_table
from quant.scheme import Scheme
from tests.test_conf import composed

MACHINE = Machine(gpu="none", torch="1", triton=None, humming=None)
W4A16 = {
    "_target_": "quant.w4a16.W4A16",
    "group_size": 128,
    "symmetric": True,
    "range_search": False,
}


def planned() -> Planned:
    # Settings refuse a machine without a GPU, as they must; what comes after is looked at here.
    settings = object.__new__(Settings)
    values = {"dtype": "float16", "widths": (1, 4), "device": "cuda", "exact": False}
    for name, value in values.items():
        object.__setattr__(settings, name, value)
    scheme = build(W4A16, Scheme, key="quant")  # type: ignore[type-abstract]
    return Planned(settings=settings, scheme=scheme, model="", layers=())


def rows(kernel: str, *us: float, error: float = 1e-4) -> list[Row]:
    product = Product(
        kernel=kernel,
        weight_bytes=100,
        max_rel_error=error,
        times_us={m: [t + 1, t, t + 3] for m, t in zip((1, 4), us, strict=True)},
    )
    return list(kernels._rows(planned(), Layer(name="o", k=256, n=64), product, 4.2))


@pytest.fixture
def _a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(kernels, "check_gpu", lambda device: None)


def test_without_a_gpu_there_is_nothing_to_time() -> None:
    if torch.cuda.device_count():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match="timed on a GPU, got none: all layers are kernel=refer"):
        Jobs().add(composed("kernels"), names={}, overrides=[])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("device=cpu", "device must be cuda, where kernels are, got 'cpu'"),
        ("device=cuda:99", "device must exist, got 'cuda:99' of 1 GPUs"),
        ("dtype=float32", "dtype must be one of float16, bfloat16, got 'float32'"),
    ],
)
@pytest.mark.usefixtures("_a_gpu")
def test_what_has_no_kernels_is_refused(override: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Jobs().add(composed("kernels", "device=cpu", override), names={}, overrides=[])


@pytest.mark.usefixtures("_a_gpu")
def test_a_models_layers_are_timed_as_they_are_stacked() -> None:
    jobs = Jobs()
    jobs.add(composed("kernels", "model=llama3_8b"), names={"model": "llama3_8b"}, overrides=[])
    (planned,) = jobs.planned
    assert planned.model == "llama3_8b"
    # 32 query heads and twice 8 of keys and values, of 128; 14336 inside; 128256 tokens
    assert {layer.name: (layer.k, layer.n) for layer in planned.layers} == {
        "qkv": (4096, 6144),
        "o": (4096, 4096),
        "gate_up": (4096, 28672),
        "down": (14336, 4096),
        "lm_head": (4096, 128256),
    }


@pytest.mark.usefixtures("_a_gpu")
def test_without_a_model_the_listed_layers_are_timed() -> None:
    jobs = Jobs()
    jobs.add(composed("kernels"), names={"model": "null"}, overrides=[])
    (planned,) = jobs.planned
    assert planned.model == ""
    assert [layer.name for layer in planned.layers] == ["qkv", "o", "gate_up", "down"]
    assert planned.layers[2] == Layer(name="gate_up", k=8192, n=57344)


def test_a_row_holds_the_median_and_the_ends_of_the_replays() -> None:
    (one, four) = rows("humming", 10.0, 20.0)
    assert (one.m, one.median_us, one.min_us, one.max_us) == (1, 11.0, 10.0, 13.0)
    assert (four.m, four.median_us) == (4, 21.0)


def test_the_csv_has_the_columns_that_the_report_names(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "kernels.csv"
    kernels._write(path, rows("humming", 10.0, 20.0))
    with path.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert {"scheme", "kernel", "layer", "K", "N", "M", "median_us", "min_us", "max_us"} <= {
        *found[0]
    }
    assert [row["M"] for row in found] == ["1", "4"]


@pytest.mark.parametrize(
    ("torch_error", "kept"),
    [(1e-4, "torch"), (0.5, "humming"), (float("nan"), "humming")],
)
def test_the_least_sum_over_widths_is_kept_of_those_that_are_right(
    torch_error: float, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "machine_of", lambda device: MACHINE)
    # humming leads at one token, torch in all.
    made = [*rows("humming", 1.0, 90.0), *rows("torch", 30.0, 30.0, error=torch_error)]
    kernels._keep(made, planned(), torch.device("cpu"))
    assert read_table(MACHINE).best == {"w4a16-g128": {"256x64": {"float16": kept}}}


def cell(family: Family, *overrides: str) -> Config:
    return parse(resolve(composed("run", f"model.target={family.target}", *overrides)))


def test_a_kernel_that_the_machine_lacks_is_told_before_weights_are_read() -> None:
    found = list(inspect(parse(resolve(composed("run", "quant=w4a16", "quant.kernel=humming")))))
    failed = [finding for finding in found if finding.state == FAILED]
    assert [finding.what for finding in failed] == ["kernels", "layers"]  # float32 is none of its
    assert failed[0].detail.startswith("kernel=humming needs a CUDA device, got cpu")


def test_a_layer_that_no_tile_fits_is_told_before_weights_are_read(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_check, "lacking", lambda kernel, device: "")
    config = cell(family, "quant=w4a16", "quant.group_size=16", "quant.kernel=humming")
    told = r"quant: qkv of K=\d+, N=\d+: kernel=humming needs dtype=float16 or bfloat16"
    kernel_check.check_kernels(config)
    with pytest.raises(ValueError, match=told):
        kernel_check.check_layers(config, [])


def test_auto_needs_nothing(family: Family) -> None:
    kernel_check.check_kernels(cell(family, "quant=w4a16"))
    assert choice.missing("auto", torch.device("cpu")) == ""
