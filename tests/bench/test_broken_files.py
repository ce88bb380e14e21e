"""A tokenizer's, a calibration's and a run's own files: torn or made up, they are named."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench.check import check_fit
from bench.config import parse, resolve
from bench.load import Loader, load_tokenizer
from bench.record import read_lines
from tests.bench.tiny import composed, write_tokenizer, write_world

DEEP = b"[" * 10**5
ZEROS = bytes(64)  # as a power cut leaves a file
BROKEN = {
    "nested": DEEP,
    "a list": b"[]",
    "Latin-1": b'{"model": "\xe4"}',
    "zeros": ZEROS,
    "of another form": b'{"model": 1, "tokenizer_class": ["x"]}',
}


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_tokenizer_is_named_in_one_line(tmp_path: Path, file: str, what: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / file).write_bytes(BROKEN[what])
    with pytest.raises(ValueError, match="must have a tokenizer: ") as refused:
        load_tokenizer(tmp_path)
    assert str(refused.value).startswith(str(tmp_path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("what", BROKEN)
def test_a_vocabulary_that_cannot_be_compared_is_named(tmp_path: Path, what: str) -> None:
    config = parse(resolve(composed(*write_world(tmp_path), "method=chain")))
    path = tmp_path / "small" / "tokenizer.json"
    path.write_bytes(BROKEN[what])
    with pytest.raises(ValueError, match=f"^{path} must be a "):
        check_fit(config, [tmp_path / "small"])


@pytest.mark.parametrize(
    ("line", "message"),
    [(b"[]", "a line must be a JSON object"), (b'{"words": "a"}', "must have the key 'text'")],
)
def test_a_calibration_line_without_a_text_is_named(
    tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(b'{"text": "abc"}\n' + line + b"\n")
    world = write_world(tmp_path)
    config = parse(resolve(composed(*world, "quant=w8a8_smooth", f"model.calibration={path}")))
    with pytest.raises(ValueError, match=f"^{path}:2: .*{message}"):
        Loader(config)


def test_calibration_text_of_tokens_that_the_model_lacks_is_named(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "abc"}\n', encoding="utf-8")
    world = write_world(tmp_path)
    write_tokenizer(tmp_path / "target", ids_from=90)
    config = parse(resolve(composed(*world, "quant=w8a8_smooth", f"model.calibration={path}")))
    told = f"^{tmp_path / 'target'}: the tokenizer must give ids below vocab_size=96 .*, got 156$"
    with pytest.raises(ValueError, match=told):
        Loader(config)


LINES: dict[str, Callable[[bytes], bytes]] = {
    "cut in two": lambda line: line[:5],
    "zeros": lambda line: ZEROS,
    "no text": lambda line: line[:5] + b"\xff\xfe",
}


@pytest.mark.parametrize("what", LINES)
def test_a_torn_last_record_is_passed_over_and_any_other_is_named(
    tmp_path: Path, what: str
) -> None:
    path = tmp_path / "records.jsonl"
    whole = b'{"a": 1}'
    torn = LINES[what](whole)
    path.write_bytes(whole + b"\n" + torn)
    assert list(read_lines(path, torn_tail=True)) == [{"a": 1}]
    path.write_bytes(torn + b"\n" + whole + b"\n")
    with pytest.raises(ValueError, match=f"^{path}:1 must be a JSON object: "):
        list(read_lines(path, torn_tail=True))


def test_a_record_is_an_object(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text("[1]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"^{path}:1 must be a JSON object, got list"):
        list(read_lines(path))
