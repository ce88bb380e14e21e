"""Folders that outlive a process: what was compiled and measured on this machine.

A folder that cannot be written is replaced by a temporary one: it is a convenience, and never a
reason to stop.
"""

import os
import tempfile
from pathlib import Path

OWN = "specquant"


def cache_folder() -> Path:
    """Where this user's caches of ours lie, by the XDG rule; it may not exist."""
    said = os.environ.get("XDG_CACHE_HOME", "")
    # The rule passes over a relative path.
    base = Path(said) if Path(said).is_absolute() else Path.home() / ".cache"
    return base / OWN


def writable_folder(name: str) -> Path:
    """Give a folder below the cache that can be written, or a new temporary one."""
    folder = cache_folder() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        return temporary_folder(name)


def temporary_folder(name: str) -> Path:
    """Give an empty folder of this process's own."""
    return Path(tempfile.mkdtemp(prefix=f"{OWN}-{name}-"))
