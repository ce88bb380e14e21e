"""The rooms: where packages come from, and how large a file and a function may be."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.build import ROOT

PACKAGES = ("bench", "methods", "quant")
MAX_FILE, MAX_KERNEL, MAX_FUNCTION = 300, 400, 60


def sources() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


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


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_sources_are_ascii(path: Path) -> None:
    assert path.read_bytes().isascii()
