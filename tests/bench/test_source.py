import gzip
import json
import sys
from pathlib import Path

import pytest

from bench.source import Row, read_file, read_hub, spread

LINES = '{"text": "a"}\n\n{"text": "b"}\n'
ROWS = [{"text": "a"}, {"text": "b"}]


def test_a_row_knows_its_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(LINES)
    assert read_file(path) == [
        Row(place=f"{path}:1", values={"text": "a"}),
        Row(place=f"{path}:3", values={"text": "b"}),
    ]


def test_a_gzip_file_reads_as_the_plain_one(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(LINES.encode()))
    assert [row.values for row in read_file(path)] == ROWS


def test_a_plain_file_is_one_row(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\n\nb\n")
    assert read_file(path) == [Row(place=f"{path}:1", values={"text": "a\n\nb\n"})]


def test_a_plain_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"x\.txt must be UTF-8: "):
        read_file(path)


def test_a_parquet_file_reads_as_the_lines_it_was_made_of(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    assert [(row.place, row.values) for row in read_file(path)] == [
        (f"{path}:1", ROWS[0]),
        (f"{path}:2", ROWS[1]),
    ]


def test_a_data_set_folder_reads_as_the_file_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "test.jsonl").write_text(LINES)
    rows = read_hub(str(tmp_path / "data"), config=None, split="test")
    assert [row.values for row in rows] == ROWS
    assert rows[1].place == f"{tmp_path}/data/test:2"


def test_an_unreachable_data_set_names_the_way_out(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match=r"absent .*split test.*cannot.*task\.path=<file>"):
        read_hub(str(tmp_path / "absent"), config=None, split="test")


def test_the_hub_needs_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"a/b needs .*specquant\[data\].*task\.path=<file>"):
        read_hub("a/b", config=None, split="test")


def test_parquet_needs_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"x.parquet needs .*specquant\[data\]"):
        read_file(tmp_path / "x.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", r"must end in \.jsonl, \.jsonl\.gz, \.parquet or \.txt, got .*x\.csv"),
        ("x.parquet", "text", r"x\.parquet must be a Parquet file"),
        ("x.jsonl.gz", "text", r"x\.jsonl\.gz must be a gzip file"),
        ("x.jsonl", '\n{"text":\n', r"x\.jsonl:2: a line must be a JSON object"),
        ("x.jsonl", "[" * 10**5, r"x\.jsonl:1: a line must be a JSON object: .* nested 64 deep"),
        ("x.jsonl", "[1]\n", r"x\.jsonl:1: a line must be a JSON object, got b'\[1\]'"),
    ],
)
def test_a_broken_file_is_refused(name: str, content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_file(tmp_path / name)


def row(**values: object) -> Row:
    return Row(place="x.jsonl:7", values=values)


def test_a_null_is_a_missing_key() -> None:
    with pytest.raises(ValueError, match=r"x.jsonl:7: a row must have the key 'text'"):
        row(text=None).get("text")


def test_one_string_is_a_list_of_one() -> None:
    assert row(turns="a").texts("turns") == ["a"]
    assert row(turns=["a", "b"]).texts("turns") == ["a", "b"]


@pytest.mark.parametrize("value", [7, [], ["a", 7]])
def test_what_is_not_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"x.jsonl:7: 'turns' must be a string or a list"):
        row(turns=value).texts("turns")


def test_a_reference_is_nothing_a_text_or_json() -> None:
    assert row(a="x").reference([], mark=None) is None
    assert row(a="x", b=2).reference(["a"], mark=None) == "x"
    assert json.loads(row(a="x", b=2).reference(["a", "b"], mark=None) or "") == {"a": "x", "b": 2}


def test_a_marked_reference_is_the_bare_number_after_the_last_mark() -> None:
    assert row(a="5 #### 5\n#### $2,125 ").reference(["a"], mark="####") == "2125"


def test_a_reference_without_its_mark_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x.jsonl:7: 'a' must contain '####'"):
        row(a="5").reference(["a"], mark="####")


def test_categories_take_turns_and_keep_even_distances() -> None:
    assert spread(["a", "a", "a", "a", "b", "c"], 4) == [0, 2, 4, 5]


def test_a_small_category_leaves_its_share_to_the_others() -> None:
    assert spread(["a", "b", "b", "b", "b", "b"], 5) == [0, 1, 2, 3, 4]


def test_a_limit_beyond_the_data_keeps_all() -> None:
    assert spread(["b", "a", "b"], 9) == [0, 1, 2]
