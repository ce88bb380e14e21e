"""Triton's kept kernels, made fit for use before the first of them is asked for.

Triton believes what lies in its folder, and cannot do without one that it can write: a file that
was cut short, or a folder of another user, would end the first launch of a kernel.
"""

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from quant.kernels.cache import is_whole_elf, writable

FOLDER, VARIABLE = "triton", "TRITON_CACHE_DIR"


def prepare() -> None:
    """Delete what is torn; let Triton keep its files elsewhere, where its folder is read-only."""
    if find_spec("triton") is None:
        return
    from triton import knobs

    folder = writable(Path(knobs.cache.dir), FOLDER)
    os.environ[VARIABLE] = str(folder)
    drop_torn(folder)


def drop_torn(folder: Path) -> None:
    """Delete every kernel below a folder of which a file was cut short."""
    for entry in folder.iterdir():
        # Folders within an entry are another process's unfinished work.
        if entry.is_dir() and any(_is_torn(path) for path in entry.iterdir() if path.is_file()):
            shutil.rmtree(entry, ignore_errors=True)


def _is_torn(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return True
    if path.suffix in (".cubin", ".so"):
        return not is_whole_elf(content)
    if path.suffix == ".json":
        try:
            json.loads(content)
        except ValueError:
            return True
    return not content and path.name != "lock"
