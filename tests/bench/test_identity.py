import os
from pathlib import Path

import pytest

from bench.identity import WeightHashes, code_hash, config_hash

SOURCES = {
    "bench/__init__.py": "",
    "bench/cell.py": "from bench.record import Cell\nimport methods.decode\n",
    "bench/record.py": "import json\n",
    "bench/plot.py": "import numpy\n",
    "methods/__init__.py": "",
    "methods/decode.py": "def f():\n    from quant import kernels\n",
    "methods/eagle2.py": "from methods import decode\n",
    "quant/__init__.py": "",
    "quant/kernels/__init__.py": "",
    "quant/kernels/mm.cu": "",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in SOURCES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("edited", "matters"),
    [
        ("bench/cell.py", True),
        ("bench/record.py", True),
        ("bench/__init__.py", True),
        ("methods/decode.py", True),
        ("quant/kernels/__init__.py", True),
        ("quant/kernels/mm.cu", True),
        ("bench/plot.py", False),
        ("methods/eagle2.py", False),
    ],
)
def test_an_edit_matters_where_it_is_imported(checkout: Path, edited: str, matters: bool) -> None:
    before = code_hash(["bench.cell"], root=checkout)
    with (checkout / edited).open("a", encoding="utf-8") as file:
        file.write("# edited\n")
    assert (code_hash(["bench.cell"], root=checkout) != before) == matters


def test_a_named_method_is_part_of_the_code(checkout: Path) -> None:
    alone = code_hash(["bench.cell"], root=checkout)
    assert code_hash(["bench.cell", "methods.eagle2"], root=checkout) != alone


def test_where_results_lie_is_no_part_of_a_configuration() -> None:
    config = {"campaign": "a", "results_dir": "x", "seed": 0, "tie_threshold_nats": 0.1}
    moved = config | {"campaign": "b", "results_dir": "y", "tie_threshold_nats": 0.2}
    assert config_hash(config, "p") == config_hash(moved, "p")
    assert config_hash(config, "p") != config_hash(config | {"seed": 1}, "p")
    assert config_hash(config, "p") != config_hash(config, "other prompts")


def test_weights_are_known_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "lab" / "target"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"abc")
    (folder / "training.log").write_bytes(b"not read")
    memory = tmp_path / "hashes.json"
    hashes = WeightHashes(memory)
    found = hashes.of([folder])
    # sha256 of "abc", from FIPS 180-4
    assert found == {
        "lab/target/model.safetensors": (
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        )
    }
    hashes.save()
    assert WeightHashes(memory).of([folder]) == found
    (folder / "model.safetensors").write_bytes(b"abd")
    assert WeightHashes(memory).of([folder]) != found


def test_what_is_named_like_weights_but_is_no_file_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "link.bin").symlink_to("nowhere")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    found = WeightHashes(None).of([tmp_path])
    assert [name.rpartition("/")[2] for name in found] == ["model.safetensors"]


def test_a_rewritten_file_of_the_same_size_and_time_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"abc")
    time = path.stat().st_mtime_ns
    hashes = WeightHashes(tmp_path / "hashes.json")
    first = hashes.of([tmp_path])
    hashes.save()
    assert WeightHashes(tmp_path / "hashes.json").of([tmp_path]) == first
    path.write_bytes(b"abd")
    os.utime(path, ns=(time, time))  # as rsync leaves a rewritten file: same size, same mtime
    assert hashes.of([tmp_path]) != first
