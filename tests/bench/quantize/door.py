"""What the tests of `specquant quantize` share."""

from collections.abc import Callable
from pathlib import Path

Door = Callable[..., tuple[int, str, str]]
SETTINGS = (
    "quant=w4a16",
    "quant.group_size=32",
    "quant.range_search=false",
    "calibration.length=40",
    "quality.window=64",
    "quality.stride=32",
    "threads=1",
)


def folder_of(world: list[str], key: str = "model.target") -> Path:
    (found,) = [o.partition("=")[2] for o in world if o.startswith(f"{key}=")]
    return Path(found)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
