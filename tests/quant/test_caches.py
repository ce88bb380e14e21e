"""What was compiled and is kept: torn, read-only or not there, it is never a reason to stop."""

import os
import struct
from pathlib import Path

import pytest
import torch

from quant.kernels import cache, humming_build, triton_cache
from quant.kernels.cache import cache_folder, writable
from quant.kernels.humming_build import drop_torn


def test_a_relative_cache_folder_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert cache_folder() == Path.home() / ".cache" / "specquant"


def binary(*lengths: int) -> bytes:
    """An ELF file of sections one after the other, and their table at the end."""
    body, table, at = b"", b"", 64
    for length in lengths:
        table += struct.pack("<IIQQQQIIQQ", 0, 1, 0, 0, at, length, 0, 0, 1, 0)
        body += b"x" * length
        at += length
    start = b"\x7fELF\x02\x01" + b"\0" * 34 + struct.pack("<Q", at) + b"\0" * 10
    return start + struct.pack("<HHH", 64, len(lengths), 0) + body + table


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """A folder that nobody writes into, root neither: a mount would need more than a test may."""
    folder = tmp_path / "kept"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "kernel.cubin").write_bytes(binary(40, 60))
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Refuse to write below a folder."""
    allowed = cache.is_writable

    def is_writable(asked: Path) -> bool:
        return not asked.is_relative_to(folder) and allowed(asked)

    monkeypatch.setattr(cache, "is_writable", is_writable)


def test_a_folder_that_is_no_folder_gives_way_to_a_temporary_one(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = writable(tmp_path / "file" / "humming", "humming")
    assert folder.is_dir()
    assert tmp_path not in folder.parents


def test_a_read_only_folder_is_copied_to_where_it_can_be_written(
    read_only: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (read_only, read_only / "a"):
        path.chmod(0o500)
    forbid(monkeypatch, read_only)
    copy = writable(read_only, "humming")
    assert (copy / "a" / "kernel.cubin").read_bytes() == binary(40, 60)
    assert [path.stat().st_mode & 0o777 for path in (copy, copy / "a")] == [0o700, 0o700]
    read_only.chmod(0o700)


def test_humming_keeps_its_files_where_they_can_be_written(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (read_only / "torn").mkdir()
    (read_only / "torn" / "kernel.cubin").write_bytes(binary(40, 60)[:100])
    forbid(monkeypatch, read_only)
    monkeypatch.setenv("HUMMING_CACHE_DIR", str(read_only))
    monkeypatch.setenv("HUMMING_TMP_DIR", str(tmp_path / "locks"))
    humming_build._choose_folders()
    kept = Path(os.environ["HUMMING_CACHE_DIR"])
    assert os.environ["HUMMING_TMP_DIR"] == str(tmp_path / "locks")
    assert not kept.is_relative_to(tmp_path)
    assert [path.parent.name for path in kept.glob("*/kernel.cubin")] == ["a"]
    assert (read_only / "torn" / "kernel.cubin").is_file()


def test_humming_keeps_its_files_in_our_cache_where_nobody_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("HUMMING_CACHE_DIR", "HUMMING_TMP_DIR"):
        monkeypatch.setenv(name, "")
    humming_build._choose_folders()
    assert os.environ["HUMMING_CACHE_DIR"] == str(tmp_path / "specquant" / "humming" / "cache")
    assert os.environ["HUMMING_TMP_DIR"] == str(tmp_path / "specquant" / "humming" / "tmp")


def test_what_fails_twice_is_told_with_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []
    monkeypatch.setattr(humming_build, "_afresh", lambda: tries.append("afresh"))

    def make() -> None:
        tries.append("make")
        raise RuntimeError("CUDA error: device kernel image\nis invalid")

    told = "N=64, K=128, got CUDA error: device kernel image is invalid; kernel=torch or"
    with pytest.raises(ValueError, match=told):
        humming_build.retried(make, n=64, k=128)
    assert tries == ["make", "afresh", "make"]
    assert humming_build.retried(lambda: 5, n=64, k=128) == 5


def test_memory_that_ran_out_is_no_broken_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(humming_build, "_afresh", lambda: pytest.fail("it is not torn"))

    def make() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        humming_build.retried(make, n=64, k=128)


TRITON = {
    "k.json": b'{"hash": "1"}',
    "__grp__k.json": b'{"child_paths": {}}',
    "k.ttir": b"module {}",
    "lock": b"",
}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("k.json", b'{"hash": '),
        ("__grp__k.json", b""),
        ("k.ttir", b""),
        ("k.cubin", b"\x7fELF\x02\x01"),
        ("launcher.so", b""),
    ],
)
def test_a_torn_kernel_of_tritons_is_deleted_and_a_whole_one_kept(
    name: str, content: bytes, tmp_path: Path
) -> None:
    whole = TRITON | {"k.cubin": binary(40, 60), "launcher.so": binary(8)}
    for entry, files in (("WHOLE", whole), ("TORN", whole | {name: content})):
        (tmp_path / entry / "tmp.pid_1").mkdir(parents=True)
        (tmp_path / entry / "tmp.pid_1" / "k.cubin").write_bytes(b"not yet")
        for file, held in files.items():
            (tmp_path / entry / file).write_bytes(held)
    triton_cache.drop_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["WHOLE"]


def test_tritons_folder_is_its_own_where_it_can_be_written_and_a_copy_elsewhere(
    read_only: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "own"))
    triton_cache.prepare()
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "own")
    forbid(monkeypatch, read_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(read_only))
    triton_cache.prepare()
    copy = Path(os.environ["TRITON_CACHE_DIR"])
    assert copy != read_only
    assert (copy / "a" / "kernel.cubin").is_file()


@pytest.mark.parametrize("cut", [0, 10, 64, 100, 290])
def test_a_binary_that_was_cut_short_is_deleted_and_a_whole_one_kept(
    cut: int, tmp_path: Path
) -> None:
    whole = binary(40, 60)
    assert len(whole) == 64 + 100 + 2 * 64
    for name, content in (("whole", whole), ("torn", whole[:cut])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kernel.cubin").write_bytes(content)
    drop_torn(tmp_path)
    assert [path.parent.name for path in tmp_path.rglob("*.cubin")] == ["whole"]


def test_a_section_beyond_the_end_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    path = tmp_path / "kept" / "kernel.cubin"
    content = bytearray(binary(40, 60))
    content[-64 + 32 : -64 + 40] = struct.pack("<Q", 10**6)  # the last section's length
    path.write_bytes(bytes(content))
    drop_torn(tmp_path)
    assert not path.exists()
