"""Folders that outlive a process: what was compiled and measured on this machine.

A folder that cannot be written is replaced by a temporary one: it is a convenience, and never a
reason to stop.
"""

import os
import shutil
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

OWN = "specquant"
ELF, ELF_HEADER, ELF_SECTION, NO_BITS = b"\x7fELF\x02\x01", 64, 64, 8  # 64 bits, little-endian


def cache_folder() -> Path:
    """Where this user's caches of ours lie, by the XDG rule; it may not exist."""
    said = os.environ.get("XDG_CACHE_HOME", "")
    # The rule passes over a relative path.
    base = Path(said) if Path(said).is_absolute() else Path.home() / ".cache"
    return base / OWN


def writable(folder: Path, name: str) -> Path:
    """Give a folder where it can be written, else a temporary one that holds the same files."""
    if is_writable(folder):
        return folder
    copy = temporary_folder(name)
    with suppress(OSError, shutil.Error):  # what cannot be read is made anew
        shutil.copytree(folder, copy, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for place in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
        place.chmod(0o700)  # not as the original forbids it
    return copy


def is_writable(folder: Path) -> bool:
    """Tell whether files can be written into a folder, which is made where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def temporary_folder(name: str) -> Path:
    """Give an empty folder of this process's own."""
    return Path(tempfile.mkdtemp(prefix=f"{OWN}-{name}-"))


def is_whole_elf(binary: bytes) -> bool:
    """Tell whether a binary, of a GPU or of the host, holds its section table and all it lists."""
    if len(binary) < ELF_HEADER or not binary.startswith(ELF):
        return False
    (table,) = struct.unpack_from("<Q", binary, 0x28)
    size, count = struct.unpack_from("<HH", binary, 0x3A)
    if count == 0 or size < ELF_SECTION or table + size * count > len(binary):
        return False
    for at in range(table, table + size * count, size):
        (kind,) = struct.unpack_from("<I", binary, at + 4)
        start, length = struct.unpack_from("<QQ", binary, at + 24)
        if kind != NO_BITS and start + length > len(binary):
            return False
    return True
