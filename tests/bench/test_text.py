"""A running text: how it is joined, encoded and cut into windows."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from bench.build import ROOT
from bench.text import Evaluation, Text, Window, encode, windows
from tests.bench.tasks import byte_level


def evaluation(window: int, stride: int, limit: int | None = None) -> Evaluation:
    return Evaluation(window=window, stride=stride, limit=limit, kl=True, reference=None)


def text_of(path: Path) -> Text:
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / "task" / "perplexity.yaml"))
    assert isinstance(node, dict)
    del node["_target_"]
    text = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Text), node, {"path": str(path)})
    )
    assert isinstance(text, Text)
    return text


def test_windows_by_hand() -> None:
    assert list(windows(11, evaluation(5, 2))) == [
        Window(number=0, start=0, first=1, end=5),
        Window(number=1, start=2, first=5, end=7),
        Window(number=2, start=4, first=7, end=9),
        Window(number=3, start=6, first=9, end=11),
    ]


@pytest.mark.parametrize("num_tokens", [2, 5, 6, 31, 32, 33, 97])
@pytest.mark.parametrize(("window", "stride"), [(5, 2), (5, 4), (32, 16), (2, 1)])
def test_every_token_but_the_first_is_scored_once_with_its_context(
    num_tokens: int, window: int, stride: int
) -> None:
    cut = list(windows(num_tokens, evaluation(window, stride)))
    scored = [token for w in cut for token in range(w.first, w.end)]
    assert scored == list(range(1, num_tokens))
    assert all(w.end - w.start <= window for w in cut)
    assert all(w.first - w.start >= window - stride for w in cut if w.start)


@pytest.mark.parametrize(
    ("window", "stride", "limit", "message"),
    [
        (1, 1, None, "window must be 2 or more, got 1"),
        (8, 0, None, "stride must be 1 or more, got 0"),
        (8, 8, None, "stride must be below window=8, got 8"),
        (8, 4, 1, "limit must be 2 or more, got 1"),
    ],
)
def test_windows_that_score_nothing_are_refused(
    window: int, stride: int, limit: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluation(window, stride, limit)


def test_a_reference_without_a_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="reference must be null where kl is false, got dense"):
        Evaluation(window=8, stride=4, limit=None, kl=False, reference="dense")


def test_rows_are_joined_with_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a"}\n{"text": ""}\n{"text": "b\\n"}\n')
    assert text_of(path).read() == "a\n\n\n\nb\n"


def test_a_plain_file_is_the_text_itself(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("a\n\nb\n")
    assert text_of(path).read() == "a\n\nb\n"


def test_a_text_of_blanks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(" \n")
    with pytest.raises(ValueError, match="task perplexity: the data must have a text, got none"):
        text_of(path).read()


def test_a_text_begins_with_one_bos_and_has_no_other(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "The answer"}\n{"text": "is 8."}\n')
    tokenizer = byte_level()
    bos = tokenizer.bos_token_id
    ids = encode(tokenizer, text_of(path))
    assert ids[0] == bos
    assert bos not in ids[1:]
    assert tokenizer.decode(ids[1:]) == "The answer\n\nis 8."


def test_the_evaluation_text_of_the_lab_family_is_its_held_out_modules() -> None:
    text = text_of(ROOT / "models" / "lab" / "perplexity.jsonl")
    rows = text.rows()
    held_out = OmegaConf.load(ROOT / "models" / "lab" / "corpus.json")["held_out_modules"]
    named = [str(row.get("module")).removesuffix(".py").split("/")[0] for row in rows]
    assert named == list(held_out)
    assert text.path is not None
    assert Path(text.path).stat().st_size < 400_000
