"""The rooms: where packages come from, and how large a file and a function may be."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.build import ROOT

PACKAGES = ("bench", "methods", "quant")
# Modules of quant/ that know no scheme: what one is, and what is done to any.
SCHEME_FREE = (
    *("scheme", "stacked", "rounding", "gptq", "rotate", "grid", "block_float"),
    *(
        "kernels.blocks_triton",
        "kernels.kernel",
        "kernels.choice",
        "kernels.cuda_build",
        "kernels.early",
        "kernels.exact",
        "kernels.machine",
        "kernels.table",
    ),
    *("kernels", "kernels.triton_cache"),
)
MAX_FILE, MAX_KERNEL, MAX_FUNCTION = 300, 400, 60
MAX_LINE = 120  # of CUDA C++; ruff looks at the others


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def cuda_sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.cu*"))


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_those_of_this_checkout(package: str) -> None:
    file = importlib.import_module(package).__file__
    assert file is not None
    assert Path(file).resolve() == ROOT / package / "__init__.py"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_a_reader(path: Path) -> None:
    limit = MAX_KERNEL if path.parent.name == "kernels" else MAX_FILE
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit
    assert {name: lines for name, lines in functions(path) if lines > MAX_FUNCTION} == {}


@pytest.mark.parametrize("path", cuda_sources(), ids=lambda path: path.name)
def test_kernels_fit_a_reader(path: Path) -> None:
    lines = path.read_text(encoding="ascii").splitlines()
    assert len(lines) <= MAX_KERNEL
    assert max(map(len, lines)) <= MAX_LINE


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_ascii(path: Path) -> None:
    assert path.read_bytes().isascii()


def imported(path: Path) -> set[str]:
    """Modules of the checkout that a file names in its imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def targets(group: str) -> set[str]:
    """Modules that the yamls of a group name, nested ones too."""
    found = set()
    for path in (ROOT / "conf" / group).glob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        found |= {t.rpartition(".")[0] for t in re.findall(r"_target_: ([\w.]+)", text)}
    return found


@pytest.mark.parametrize("package", ["bench", "methods"])
def test_nobody_imports_a_concrete_scheme_or_format(package: str) -> None:
    fronts = {"quant", "quant.formats"} | {f"quant.{name}" for name in SCHEME_FREE}
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "quant").rglob("*.py")
    }
    for path in (ROOT / package).rglob("*.py"):
        assert imported(path) & (modules - fronts) == set(), path.name


@pytest.mark.parametrize("module", sorted(targets("method")))
def test_drafters_do_not_know_each_other(module: str) -> None:
    path = ROOT / f"{module.replace('.', '/')}.py"
    assert imported(path) & (targets("method") - {module}) == set()
