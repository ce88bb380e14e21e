"""What a machine or a shape cannot do is one line that ends with what works, before weights."""

import json
import re
from pathlib import Path

import pytest
import torch

from bench import gpu, kernel_check, machine, preflight
from bench.config import parse, resolve
from bench.gpu import Gpu
from bench.plan import Planner
from methods.values import read_json
from quant.kernels import humming, humming_build
from quant.kernels.choice import named
from tests.bench.tiny import composed, planned, write_world
from tests.family import VOCAB
from tests.made_up import write_random_family

CUDA = ("device=cuda", "dtype=float16")
GIB = 2**30


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


@pytest.fixture
def _hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch)


def have(
    patch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (9, 0), free: int = 80 * GIB
) -> None:
    """Put a GPU into this machine, as the driver would describe it."""
    found = Gpu(name="NVIDIA X", capability=capability, free_bytes=free)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(gpu, "ask", lambda index: found)
    patch.setattr(machine, "find_spec", lambda name: object())
    patch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")


def refusal(world: list[str], *overrides: str, planner: Planner | None = None) -> str:
    with pytest.raises(ValueError) as refused:
        planned(world, *overrides, planner=planner).blocks()
    told = str(refused.value)
    assert "\n" not in told
    return told


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(read_json(path) | changes), encoding="utf-8")


def test_no_gpu(world: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = refusal(world, *CUDA)
    assert told == "device must exist, got 'cuda' of 0 GPUs; device=cpu works"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert f", since torch {torch.__version__} has no CUDA; device=cpu works" in refusal(
        world, *CUDA
    )


@pytest.mark.usefixtures("_hopper")
def test_no_such_gpu(world: list[str]) -> None:
    told = refusal(world, "device=cuda:3", "dtype=float16")
    assert told == "device must exist, got 'cuda:3' of 1 GPUs; device=cuda works"


def test_too_old_a_gpu(world: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, capability=(7, 5))
    assert refusal(world, *CUDA) == (
        "device must have compute capability 8.0 or above, got NVIDIA X with 7.5; device=cpu works"
    )
    have(monkeypatch, capability=(8, 0))
    planned(world, *CUDA).blocks()


@pytest.mark.usefixtures("_hopper")
def test_no_triton(world: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    told = refusal(world, *CUDA)
    assert told == "device=cuda needs the package triton, got none; device=cpu works"


@pytest.mark.usefixtures("_hopper")
@pytest.mark.parametrize(("named_by", "got"), [(None, "none"), ("icc", "CC=icc")])
def test_no_c_compiler(
    world: list[str], monkeypatch: pytest.MonkeyPatch, named_by: str | None, got: str
) -> None:
    monkeypatch.delenv("CC", raising=False)
    if named_by:
        monkeypatch.setenv("CC", named_by)
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert refusal(world, *CUDA) == (
        "device=cuda needs a C compiler, which Triton calls: gcc or clang, or CC naming one, got "
        f"{got}; device=cpu works"
    )


@pytest.mark.parametrize(
    ("installed", "capability", "compiler", "told"),
    [
        (None, (9, 0), "", "the packages humming-kernels and triton, got no humming-kernels; "),
        ("1", (7, 5), "", "compute capability 8.0, got 7.5; kernel=reference works"),
        ("1", (9, 0), "RuntimeError no nvcc", "nvcc or NVRTC, of the CUDA toolkit, got RuntimeErr"),
        ("1", (9, 0), "", ""),
    ],
)
def test_what_humming_lacks(
    monkeypatch: pytest.MonkeyPatch,
    installed: str | None,
    capability: tuple[int, int],
    compiler: str,
    told: str,
) -> None:
    monkeypatch.setattr(humming, "installed", lambda package: installed)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(humming_build, "compiler_problem", lambda: compiler)
    found = named("humming").missing(torch.device("cuda"))
    assert found.startswith(f"kernel=humming needs {told}" if told else "")
    assert not found or (" works" in found and "\n" not in found)
    assert bool(found) == bool(told)


@pytest.mark.usefixtures("_hopper")
def test_a_named_kernel_that_the_gpu_lacks(
    world: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks = "kernel=humming needs nvcc or NVRTC, of the CUDA toolkit, got none; kernel=torch works"
    monkeypatch.setattr(kernel_check, "lacking", lambda kernel, device: lacks)
    assert refusal(world, *CUDA, "quant=w4a16", "quant.kernel=humming") == lacks


@pytest.mark.parametrize(
    ("quant", "absent", "told"),
    [
        ("w4a16", {"humming", "triton"}, []),  # cuda takes it
        ("w4a16", {"cuda"}, ["cuda"]),
        ("w4a16", {"cuda", "humming"}, ["cuda", "humming"]),
        ("w8a8", {"cuda", "humming"}, ["humming"]),  # none of cuda's
        ("dense", {"cuda", "humming"}, []),
    ],
)
@pytest.mark.usefixtures("_hopper")
def test_what_keeps_auto_from_faster_kernels(
    world: list[str],
    monkeypatch: pytest.MonkeyPatch,
    quant: str,
    absent: set[str],
    told: list[str],
) -> None:
    lacks = {name: f"kernel={name} needs more" for name in absent}
    monkeypatch.setattr(kernel_check, "lacking", lambda kernel, device: lacks.get(kernel, ""))
    config = parse(resolve(composed(*world, *CUDA, f"quant={quant}")))
    kernels = next(f for f in preflight.inspect(config) if f.what == "kernels")
    assert kernels.detail.split("; ")[1:] == [lacks[name] for name in told]


def test_too_little_memory(world: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, free=2**20)
    (block,) = planned(world, *CUDA).blocks()
    (told,) = [arm.problem for arm in block.arms]
    assert told.startswith("memory: 0.00 GiB are needed at least, ")
    assert told.endswith("; cuda has 0.00 GiB: nothing here fits")
    assert "\n" not in told


def test_groups_that_do_not_fill_k(world: list[str]) -> None:
    told = refusal(world, "quant=w4a16", "quant.group_size=96")
    assert told == (
        "quant: qkv of K=128, N=256: K must be a multiple of group_size=96, got K=128; "
        "quant.group_size=128 works"
    )
    planned(world, "quant=w4a16", "quant.group_size=128").blocks()


@pytest.mark.parametrize(
    ("name", "method", "told"),
    [
        ("small", "chain", "method.draft_scheme: down of K=192, N=128"),
        ("target-eagle2", "eagle2", "method.draft_scheme: layers.0.mlp.down_proj.weight of K=192"),
    ],
)
def test_groups_that_do_not_fill_what_drafts(
    tmp_path: Path, name: str, method: str, told: str
) -> None:
    write_random_family(tmp_path)
    edit(tmp_path / name, intermediate_size=192)
    world = [
        *("model=llama3_8b", "task=random", f"task.draw_below={VOCAB}", "task.draw_lengths=[5]"),
        f"model.target={tmp_path / 'target'}",
        f"model.heads.eagle2={tmp_path / 'target-eagle2'}",
        f"+model.small.target={tmp_path / 'small'}",
        "+model.small.heads={}",
        f"results_dir={tmp_path / 'results'}",
        "accept=constant",
    ]
    planner = Planner("bench.cell")
    words = (f"method={method}", "method.draft_scheme=w4a16")
    config = composed(*world, *words)
    names = {"model": "llama3_8b", "quant": "dense", "method": method, "task": "random"}
    planner.add(config, names=names, overrides=list(words))
    with pytest.raises(ValueError) as refused:
        planner.blocks()
    found = str(refused.value)
    assert found.startswith(told)
    assert "K must be a multiple of group_size=128, got K=192; method.draft_scheme=" in found
    (offered,) = re.findall(r"; (method\.draft_scheme=\w+) works$", found)
    planner = Planner("bench.cell")
    planner.add(composed(*world, words[0], offered), names=names, overrides=[words[0], offered])
    assert [arm.problem for block in planner.blocks() for arm in block.arms] == ["", ""]


@pytest.mark.parametrize(
    ("kernel", "words", "told"),
    [
        ("triton", ("quant.group_size=32",), "kernel=triton needs N in multiples of 64 and K of "),
        ("humming", ("quant.group_size=16",), "kernel=humming needs group_size -1 or in multiples"),
        ("torch", (), "kernel=torch needs dtype=bfloat16 for 4-bit weights, got torch.float16; "),
    ],
)
@pytest.mark.usefixtures("_hopper")
def test_shapes_that_no_tile_of_a_named_kernel_fits(
    world: list[str],
    monkeypatch: pytest.MonkeyPatch,
    kernel: str,
    words: tuple[str, ...],
    told: str,
) -> None:
    monkeypatch.setattr(kernel_check, "lacking", lambda kernel, device: "")
    found = refusal(world, *CUDA, "quant=w4a16", f"quant.kernel={kernel}", *words)
    assert found.startswith(f"quant: qkv of K=128, N=256: {told}")
    assert found.endswith("; kernel=reference works")


def test_a_sweep_goes_on_over_what_fits(world: list[str]) -> None:
    planner = planned(world, "quant=w8a8")
    planned(world, "quant=w4a16", "quant.group_size=96", planner=planner)
    problems = [arm.problem for block in planner.blocks() for arm in block.arms]
    assert problems[0] == ""
    assert problems[1].endswith("quant.group_size=128 works")
