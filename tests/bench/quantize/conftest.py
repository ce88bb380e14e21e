import json
from pathlib import Path

import pytest

from bench import quantize
from tests.bench.quantize.door import SETTINGS, Door
from tests.bench.tiny import write_world


@pytest.fixture
def door(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Door:
    """`specquant quantize` in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["specquant quantize", *arguments])
        code = quantize.main()
        told = capfd.readouterr()
        return code, told.out, told.err

    return call


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    """Overrides that point the door at a tiny family and its texts."""
    models = [o for o in write_world(tmp_path) if o.startswith("model.")]
    rows = [{"text": ("abcdefghij"[i:] * 30)[:60]} for i in range(8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "calibration.jsonl").write_text(lines, encoding="utf-8")
    text = f"task.path={tmp_path / 'calibration.jsonl'}"
    return [*models, f"model.calibration={tmp_path / 'calibration.jsonl'}", text, *SETTINGS]
