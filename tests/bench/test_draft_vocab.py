"""Lists of tokens that a head may draft: read, refused, made, labelled, hashed and decoded with."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import preflight, run, vocab
from bench.draft_vocab import Ranking, read_ranking
from bench.plan import Planner
from bench.record import Cell
from bench.rows import arm_label
from methods.random_weights import even_ids
from methods.values import read_json
from tests.bench.tiny import LIMIT, composed, generations, planned, write_tokenizer, write_world
from tests.family import VOCAB
from tests.made_up import write_random_family

EAGLE = ("method=eagle2", "method.depth=3", "method.top_k=4", "method.nodes=14")
LISTED = [60, 3, 95, 41, 8, 17, 77, 30, 52, 0, 12, 64]


@pytest.fixture
def world(tmp_path: Path) -> list[str]:
    return write_world(tmp_path)


def write_list(path: Path, found: object) -> str:
    path.write_text(json.dumps(found), encoding="utf-8")
    return f"method.draft_vocab={path}"


@pytest.mark.parametrize("name", ["ids.json", "ids.pt", "tensor.pt"])
def test_a_list_is_read_in_every_form_that_it_is_published_in(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "ids.json":
        write_list(path, LISTED)
    else:
        torch.save(torch.tensor(LISTED) if name == "tensor.pt" else LISTED, path)
    assert read_ranking(path).ids == LISTED


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "a draft vocabulary must list token ids, got none"),
        ('{"ids": []}', "a draft vocabulary must list token ids, got none"),
        ("[3, 5, 3]", "token ids must differ, got 3 twice"),
        ("[3, -1]", "token ids must be integers from 0 on, got -1"),
        ("[3, 5.0]", "token ids must be integers from 0 on, got 5.0"),
        ("[true, 5]", "token ids must be integers from 0 on, got True"),
        ('["the"]', "token ids must be integers from 0 on, got 'the'"),
        ("not json", "must be JSON, or .pt, of token ids: "),
        ('{"text": "x"}', "must be a JSON array of token ids, or an object with ids, got {"),
        ('{"ids": [1], "words": 2}', "must be a list of token ids: "),
        ('{"ids": [1], "counts": [2, 3]}', "counts must be an integer for each of 1 ids"),
        ('{"ids": [1], "counts": "2"}', "counts must be an integer for each of 1 ids"),
    ],
)
def test_what_is_no_list_is_told_in_one_line(
    world: list[str], tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "ids.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError) as refused:
        planned(world, *EAGLE, f"method.draft_vocab={path}")
    assert str(refused.value).startswith(f"{path}: {message}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x80\x02cos\nsystem\n."])
def test_a_torn_or_hostile_pickle_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ids.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_ranking(path)
    assert str(refused.value).startswith(f"{path}: must be a whole pickle of nothing but token ids")
    assert "\n" not in str(refused.value)


def test_a_missing_list_is_named(world: list[str], tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        planned(world, *EAGLE, f"method.draft_vocab={tmp_path / 'none'}")
    told = f"method.draft_vocab must be a file of token ids, got {tmp_path / 'none'}"
    assert str(refused.value) == told


@pytest.mark.parametrize(
    ("found", "extra", "message"),
    [
        ([3, 5, VOCAB], (), "token ids must be below 96, as "),
        ({"ids": LISTED, "vocab_size": 97}, (), "vocab_size must be 96, that of "),
        ({"ids": LISTED, "tokenizer": "x"}, (), "the list must be counted with the tokenizer of "),
        (LISTED[:3], (), "top_k must be within the head's vocabulary, cut by draft_vocab, of 3"),
        (LISTED, ("method.draft_vocab_size=13",), "draft_vocab_size must be within the list "),
        (LISTED, ("quant.lm_head=w8a8_smooth",), "method.draft_lm_head must be given where "),
    ],
)
def test_a_list_that_does_not_fit_is_told_in_one_line(
    world: list[str], tmp_path: Path, found: object, extra: tuple[str, ...], message: str
) -> None:
    chosen = write_list(tmp_path / "ids.json", found)
    text = write_list(tmp_path / "text.jsonl", {"text": "abc"}).partition("=")[2]
    words = (*EAGLE, chosen, f"model.calibration={text}", *extra)
    with pytest.raises(ValueError) as refused:
        planned(world, *words).blocks()
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method.draft_vocab_size=0",), "method: draft_vocab_size must be 1 or more, got 0"),
        (("method.draft_vocab_size=4",), "draft_vocab must be a file of token ids where "),
        (("method.draft_vocab_size=few",), "method.draft_vocab_size: Value 'few'"),
    ],
)
def test_a_size_alone_is_for_random_weights(
    world: list[str], words: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError) as refused:
        planned(world, *EAGLE, *words).blocks()
    assert str(refused.value).startswith(message)


def test_what_has_no_head_takes_no_list(world: list[str], tmp_path: Path) -> None:
    chosen = write_list(tmp_path / "ids.json", LISTED)
    planner = planned(world, "method=chain", chosen)
    planned(world, "method=vanilla", chosen, planner=planner)
    (block,) = planner.blocks()
    vanilla, chain = block.arms
    assert "draft_vocab must be null where no draft head drafts" in chain.problem
    assert (vanilla.problem, vanilla.cell.draft_scheme) == ("", "")
    assert vanilla == planned(world, "method=vanilla").blocks()[0].arms[0]


def test_a_list_is_named_and_hashed(world: list[str], tmp_path: Path) -> None:
    chosen = write_list(tmp_path / "ids.json", LISTED)
    (block,) = planned(world, *EAGLE, chosen, "method.draft_vocab_size=8").blocks()
    vanilla, cut = block.arms
    assert cut.cell.draft_scheme == "dense+vocab:ids-8"
    assert cut.cell.method == "eagle2[depth=3,nodes=14,top_k=4]"
    assert cut.name.endswith(
        "method.draft_vocab=ids.json.method.draft_vocab_size=8.method.nodes=14.method.top_k=4"
    )
    assert not any("ids.json" in name for name in vanilla.cell.weight_hashes)
    (path,) = (name for name in cut.cell.weight_hashes if name.endswith("ids.json"))
    write_list(tmp_path / "ids.json", LISTED[::-1])
    (again,) = planned(world, *EAGLE, chosen, "method.draft_vocab_size=8").blocks()
    assert again.arms[1].cell.config_hash == cut.cell.config_hash
    assert again.arms[1].cell.weight_hashes[path] != cut.cell.weight_hashes[path]


def test_a_list_elsewhere_is_the_same_cell(world: list[str], tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    arms = [
        planned(world, *EAGLE, write_list(tmp_path / place, LISTED)).blocks()[0].arms[1]
        for place in ("ids.json", "other/ids.json")
    ]
    assert arms[0].name == arms[1].name
    assert arms[0].cell.config_hash == arms[1].cell.config_hash
    assert sorted(arms[0].cell.weight_hashes.values()) == sorted(
        arms[1].cell.weight_hashes.values()
    )


def test_what_is_unusual_about_a_drafter_is_in_the_columns_name() -> None:
    assert arm_label("eagle2", "dense") == "eagle2"
    assert arm_label("eagle2", "dense+vocab:ids-8") == "eagle2, drafter dense+vocab:ids-8"
    assert arm_label("eagle2", "dense+lm_head:w8a8") == "eagle2, drafter dense+lm_head:w8a8"


def test_a_list_that_was_counted_on_the_prompts_is_refused(
    world: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "own.json"
    assert count(world, f"task.path={tmp_path / 'prompts.jsonl'}", f"out={out}") == 0
    with pytest.raises(ValueError) as refused:
        planned(world, *EAGLE, f"method.draft_vocab={out}")
    assert str(refused.value) == (
        "method.draft_vocab must be counted on another text than the prompts of task lab, "
        "got prompts.jsonl"
    )


def count(world: list[str], *words: str) -> int:
    """`specquant vocab` in this process."""
    models = [o for o in world if o.startswith("model.")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["specquant vocab", *models, *words])
        return vocab.main()


def test_the_door_lists_the_most_frequent_first(
    world: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "corpus.jsonl"
    rows = ["abca", "cab!", "zz"]
    text.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows), encoding="utf-8")
    out = tmp_path / "frequent.json"
    assert count(world, f"task.path={text}", "size=4", f"out={out}") == 0
    ids = Counter(ord(c) - ord("!") for c in "".join(rows))
    found = read_ranking(out)
    order = sorted(ids, key=lambda token: (-ids[token], token))
    assert found.ids == order[:4]
    assert found.counts == [3, 2, 2, 2]
    assert (found.tokens, found.vocab_size, found.text) == (10, VOCAB, "corpus.jsonl")
    assert found.covers(4) == pytest.approx(0.9)
    assert found.covers(1) == pytest.approx(0.3)
    told = capsys.readouterr().out
    assert told.startswith("4 of 96 tokens are 90.00% of the 10 in corpus.jsonl\n")
    assert told.endswith(f"method.draft_vocab={out}\n")


def test_rows_beyond_the_limit_are_not_counted(world: list[str], tmp_path: Path) -> None:
    text = tmp_path / "corpus.jsonl"
    text.write_text("".join(json.dumps({"text": r}) + "\n" for r in ("ab", "cd")), encoding="utf-8")
    out = tmp_path / "frequent.json"
    assert count(world, f"task.path={text}", "limit=1", f"out={out}") == 0
    assert read_ranking(out).tokens == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("size=0",), "size must be 1 or more, or null, got 0"),
        (("size=9",), "size must be within the 3 different tokens of training, got 9"),
        (("task.path=null",), "task training has no hub data set: give task.path=<file>"),
        (("task.path=none.jsonl",), "task training: path must be a file, got "),
        (("task=lab",), "task._target_ must be a Text, got bench.task.Task"),
        (("out=there.json",), "out must be a new file, one for each list, got "),
        (("out=nowhere/x.json",), "out must be in a folder that is there, got "),
    ],
)
def test_what_cannot_be_counted_is_told_in_one_line(
    world: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("there.json").write_text("[]", encoding="utf-8")
    Path("corpus.jsonl").write_text(json.dumps({"text": "abc"}), encoding="utf-8")
    given = [f"task.path={tmp_path / 'corpus.jsonl'}", "out=new.json"]
    keys = [word.partition("=")[0] for word in words]
    kept = [word for word in given if word.partition("=")[0] not in keys]
    assert count(world, *kept, *words) == 2
    told = capfd.readouterr().err
    assert told.startswith(f"error: {message}")
    assert told.count("\n") == 1
    assert not Path("new.json").exists()


Run = Callable[..., dict[str, Path]]


@pytest.fixture
def ran(world: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`specquant run` in this process: the folders of its cells by method."""

    def call(*words: str) -> dict[str, Path]:
        small = (f"task.max_new_tokens={LIMIT}", "threads=1")
        monkeypatch.setattr("sys.argv", ["specquant run", *world, *small, *words])
        assert run.main() == 0
        folders = [p.parent for p in (tmp_path / "results" / "c").glob("*/cell.json")]
        return {Cell.parse(read_json(p / "cell.json")).method.split("[")[0]: p for p in folders}

    return call


def texts(folder: Path) -> list[list[int]]:
    return [answer.token_ids for answer in generations(folder)]


@pytest.mark.parametrize("method", ["eagle2", "hierarchical"])
def test_a_run_with_a_list_gives_plain_decodings_tokens_and_tells_of_it(
    ran: Run, tmp_path: Path, method: str
) -> None:
    chosen = write_list(tmp_path / "ids.json", {"ids": LISTED, "text": "t"})
    inner = "method.inner" if method == "hierarchical" else "method"
    tree = [f"{inner}.{key}" for key in ("depth=2", "top_k=3", "nodes=6")]
    folders = ran(f"method={method}", *tree, chosen, "method.draft_lm_head=w8a8")
    assert texts(folders[method]) == texts(folders["vanilla"])
    context = read_json(folders[method] / "context.json")
    told = context["draft_vocab"]
    assert (told["file"], told["size"], told["of"], told["text"]) == ("ids.json", 12, VOCAB, "t")
    assert len(told["sha256"]) == 64
    assert "draft_vocab" not in read_json(folders["vanilla"] / "context.json")
    cell = Cell.parse(read_json(folders[method] / "cell.json"))
    assert cell.draft_scheme == "dense+lm_head:w8a8+vocab:ids"


def test_random_weights_take_a_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_random_family(tmp_path)
    words = [
        *("model=llama3_8b", "task=random", "accept=constant", "accept.tau=3", "campaign=c"),
        f"model.target={tmp_path / 'target'}",
        f"model.heads.eagle2={tmp_path / 'target-eagle2'}",
        *(f"task.draw_below={VOCAB}", "task.draw_lengths=[12,20,9,30]", "task.max_new_tokens=60"),
        *("method=eagle2", "method.top_k=4", "method.nodes=24", "method.draft_vocab_size=24"),
        f"results_dir={tmp_path / 'results'}",
    ]
    monkeypatch.setattr("sys.argv", ["specquant run", *words])
    assert run.main() == 0
    (folder,) = (tmp_path / "results" / "c").glob("*draft_vocab_size=24*")
    cell = Cell.parse(read_json(folder / "cell.json"))
    assert (cell.draft_scheme, cell.acceptance) == ("dense+vocab:24", "replay:constant(tau=3)")
    assert read_json(folder / "context.json")["draft_vocab"] == {
        "size": 24,
        "of": VOCAB,
        "file": None,
    }
    steps = [kept for answer in generations(folder) for kept in answer.accepted]
    assert 1 < sum(steps) / len(steps) < 3


def test_tokens_at_even_distances_differ_and_lie_within() -> None:
    assert even_ids(4, 10).tolist() == [0, 2, 5, 7]
    assert even_ids(5, 5).tolist() == [0, 1, 2, 3, 4]


def test_a_size_beyond_the_vocabulary_is_refused(tmp_path: Path) -> None:
    write_random_family(tmp_path)
    words = [
        *("model=llama3_8b", "task=random", f"model.target={tmp_path / 'target'}", "campaign=c"),
        f"model.heads.eagle2={tmp_path / 'target-eagle2'}",
        *(f"task.draw_below={VOCAB}", f"results_dir={tmp_path / 'results'}", "baseline=false"),
        "task.max_new_tokens=10",
    ]
    own = ("method=eagle2", "method.draft_vocab_size=97")
    planner = Planner("bench.cell")
    names = {"model": "llama3_8b", "quant": "dense", "method": "eagle2", "task": "random"}
    planner.add(composed(*words, *own), names=names, overrides=own)
    with pytest.raises(ValueError, match="draft_vocab_size must be within the vocabulary of 96"):
        planner.blocks()


def test_check_tells_how_many_tokens_may_be_drafted(
    world: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chosen = write_list(tmp_path / "ids.json", LISTED)
    small = (f"task.max_new_tokens={LIMIT}", "threads=1")
    monkeypatch.setattr("sys.argv", ["specquant check", *world, *small, *EAGLE, chosen])
    assert preflight.main() == 0
    lines = capfd.readouterr().out.splitlines()
    (line,) = (line for line in lines if " method: " in line)
    assert line.endswith("of target-eagle2, 12 of 96 tokens to draft")


def test_a_list_of_another_tokenizer_is_told_by_its_tokens(
    world: list[str], tmp_path: Path
) -> None:
    text = tmp_path / "corpus.jsonl"
    text.write_text(json.dumps({"text": "abcdefgh"}), encoding="utf-8")
    out = tmp_path / "frequent.json"
    assert count(world, f"task.path={text}", f"out={out}") == 0
    planned(world, *EAGLE, f"method.draft_vocab={out}").blocks()
    write_tokenizer(tmp_path / "target", first='"')
    with pytest.raises(ValueError, match=r"must be counted with the tokenizer of .*target, got"):
        planned(world, *EAGLE, f"method.draft_vocab={out}").blocks()


def test_shares_are_unknown_where_nobody_counted() -> None:
    facts: dict[str, Any] = {"ids": LISTED}
    assert Ranking(**facts).covers(3) is None
