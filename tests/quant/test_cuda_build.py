"""Kept binaries of our CUDA kernels: found again whole, or not at all; compiled on a GPU."""

import tempfile
from functools import partial
from pathlib import Path
from threading import Barrier
from time import sleep

import pytest
import torch

from quant.kernels import cuda_build

SOURCE = """
extern "C" __global__ void fill(float* to, int value) { to[threadIdx.x] = value; }
"""
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_a_kept_binary_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "a.cubin"
    cuda_build._keep(path, b"binary")
    assert cuda_build._read(path) == b"binary"
    assert [found.name for found in tmp_path.iterdir()] == ["a.cubin"]


@pytest.mark.parametrize("kept", [0, 10, 35, 37])
def test_a_torn_binary_is_none(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.cubin"
    cuda_build._keep(path, b"binary")
    path.write_bytes(path.read_bytes()[:kept])
    assert cuda_build._read(path) is None


def test_what_cannot_be_kept_is_no_reason_to_stop(tmp_path: Path) -> None:
    cuda_build._keep(tmp_path / "absent" / "a.cubin", b"binary")
    assert cuda_build._read(tmp_path / "absent" / "a.cubin") is None


def made_from(number: int) -> cuda_build.Function:
    return cuda_build.Function(number, torch.device("cpu"))


def test_functions_are_made_beside_each_other_and_a_refusal_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_build, "_folder", lambda: tmp_path)
    monkeypatch.setattr(cuda_build.os, "cpu_count", lambda: 2)
    both = Barrier(2, timeout=30)  # broken where the second maker waits for the first

    def together() -> cuda_build.Function:
        return made_from(both.wait())

    def refused() -> cuda_build.Function:
        raise RuntimeError("NVRTC refused")

    cuda_build.at_once([together, together])
    with pytest.raises(RuntimeError, match="NVRTC refused"):
        cuda_build.at_once([partial(made_from, 1), refused])


def test_threads_do_not_each_make_a_folder_where_ours_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(cuda_build.os, "cpu_count", lambda: 4)
    cuda_build._folder.cache_clear()
    all_here, choose = Barrier(4, timeout=30), cuda_build.writable

    def slowly(folder: Path, name: str) -> Path:
        sleep(0.1)  # so that all threads come while the first chooses
        return choose(folder, name)

    def make() -> cuda_build.Function:
        all_here.wait()
        return made_from(len(str(cuda_build._folder())))

    monkeypatch.setattr(cuda_build, "writable", slowly)

    cuda_build.at_once([make] * 4)
    cuda_build._folder.cache_clear()
    assert [path.is_dir() for path in tmp_path.iterdir()].count(True) == 1


@pytest.mark.gpu
@needs_gpu
def test_a_refused_source_is_told_in_the_compilers_words() -> None:
    with pytest.raises(RuntimeError, match=r"NVRTC refused a kernel: .*undefined"):
        cuda_build.compiled("__global__ void f() { nothing(); }", "sm_90a")


@pytest.mark.gpu
@needs_gpu
def test_a_torn_binary_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_build, "_folder", lambda: tmp_path)
    device = torch.device("cuda", torch.cuda.current_device())
    for value in (1, 2):
        made = cuda_build.function(SOURCE, "fill", shared_bytes=0, device=device)
        assert made.handle
        (kept,) = tmp_path.iterdir()
        assert cuda_build._read(kept) is not None
        if value == 1:
            kept.write_bytes(kept.read_bytes()[:100])
