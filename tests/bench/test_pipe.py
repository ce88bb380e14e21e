"""A command ends quietly where nobody reads its output any more."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.build import ROOT
from tests.bench.made_campaign import CELL, write_cell


def closed(*arguments: str) -> tuple[int, str]:
    """Exit code and standard error of `specquant` whose output has no reader."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ended = subprocess.run(
            [sys.executable, "-m", "bench.cli", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            check=False,
        )
    finally:
        os.close(writing)
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["report", "--help"]])
def test_help_that_nobody_reads_ends_quietly(arguments: list[str]) -> None:
    assert closed(*arguments) == (141, "")


def test_a_report_that_nobody_reads_ends_quietly(tmp_path: Path) -> None:
    write_cell(tmp_path / "c" / "cell", CELL, [])
    assert closed("report", "campaign=c", f"results_dir={tmp_path}") == (141, "")
