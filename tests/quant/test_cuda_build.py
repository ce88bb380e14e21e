"""Kept binaries of our CUDA kernels: found again whole, or not at all; compiled on a GPU."""

from pathlib import Path

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
