"""Files that the packages write once a session, each in a process of its own."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from bench.build import ROOT


def written_by(module: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Let the packages write into a folder, which the workers of a session share."""
    for package in ("gptqmodel", "awq"):
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed, which writes these files")
    base = tmp_path_factory.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / module
    with FileLock(f"{out}.lock"):
        if not out.is_dir():
            out.mkdir()
            run(module, out)
    return out


def run(module: str, out: Path) -> None:
    """Run python -m tests.quant.formats.<module> OUT."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.quant.formats.{module}", str(out)],
        cwd=out,
        # GPTQModel fails on two cores unless it is told how many workers to take, and compiles
        # unless it is told not to, once in C++ and once through torch.
        env=os.environ
        | {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "GPTQMODEL_CPU_WORKERS": "2",
            "GPTQMODEL_DISABLE_PACK_EXT": "1",
            "TORCHDYNAMO_DISABLE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Single layers, as tests.quant.formats.cases names them."""
    return written_by("write_layers", tmp_path_factory)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole folders, as tests.quant.formats.write_models names them."""
    return written_by("write_models", tmp_path_factory)
