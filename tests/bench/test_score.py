import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.record import Generation, write_json
from bench.score import Unscored, judge
from methods.values import read_json as read
from tests.bench.tasks import task_of
from tests.bench.test_run import work
from tests.bench.test_sandbox import can_isolate
from tests.bench.tiny import generations, planned, write_world

REFERENCE = {"prompt": "def f(x):\n", "entry_point": "f"}
RIGHT = "```python\ndef f(x):\n    return x + 1\n```\n"
HUMANEVAL = {
    "_target_": "bench.humaneval.HumanEval",
    "timeout_s": 5,
    "memory_mib": 256,
    "processes": 2,
    "files": 32,
    "file_mib": 1,
}


def world(root: Path, scorer: dict[str, object], *, rows: Sequence[dict[str, object]]) -> list[str]:
    """A run's overrides: a tiny chat model, whose answers all begin with RIGHT."""
    lines = write_world(root)
    path = root / "target" / "tokenizer_config.json"
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    write_json(path, read(path) | {"chat_template": template})
    text = "".join(json.dumps(row | {"prompt_id": f"p{i}"}) + "\n" for i, row in enumerate(rows))
    (root / "prompts.jsonl").write_text(text, encoding="utf-8")
    prefix = json.dumps(RIGHT).replace("\\n", "\n").replace("'", "")
    settings = (f"++task.scorer.{key}={value}" for key, value in scorer.items())
    return [*lines, "task.form=chat", f"task.answer_prefix={prefix}", *settings]


def code_rows(tests: Sequence[str]) -> list[dict[str, object]]:
    return [
        {"text": "abc", **REFERENCE, "test": f"def check(f):\n    assert {test}\n"}
        for test in tests
    ]


KEYS = "task.reference_keys=[prompt,entry_point,test]"


def scored(folder: Path) -> list[Generation]:
    return generations(folder)


@pytest.mark.skipif(not can_isolate(), reason="no namespaces on this machine")
def test_a_run_records_which_programs_passed(tmp_path: Path) -> None:
    rows = code_rows(["f(1) == 2", "f(1) == 3"])
    line = [*world(tmp_path, HUMANEVAL, rows=rows), KEYS, "score.execute=true"]
    vanilla, eagle2 = work(line, "vanilla", "eagle2")
    for folder in (vanilla, eagle2):
        found = generations(folder)
        assert [g.correct for g in found] == [True, False]
        assert [g.scored for g in found] == ["pass@1", "pass@1"]
        assert [g.reason for g in found] == ["", "failed: AssertionError"]
        assert all("net" in g.sandbox.split("+") for g in found)
        assert found[0].answer == "def f(x):\n    return x + 1\n"


def test_programs_that_may_not_run_are_not_scored(tmp_path: Path) -> None:
    line = [*world(tmp_path, HUMANEVAL, rows=code_rows(["f(1) == 2"])), KEYS]
    (vanilla,) = work(line, "vanilla")
    (found,) = generations(vanilla)
    assert (found.correct, found.scored) == (None, "no: score.execute is false")
    assert len(found.token_ids) == 10


def test_whether_programs_run_is_part_of_a_cells_identity(tmp_path: Path) -> None:
    line = [*world(tmp_path, HUMANEVAL, rows=code_rows(["f(1) == 2"])), KEYS]
    hashes = set()
    for execute in ("true", "false"):
        (block,) = planned([*line, f"score.execute={execute}"]).blocks()
        hashes.add(block.arms[0].cell.config_hash)
    assert len(hashes) == 2


def test_a_number_is_scored_without_running_anything(tmp_path: Path) -> None:
    scorer: dict[str, object] = {"_target_": "bench.gsm8k.Gsm8k", "filter": "strict"}
    rows: list[dict[str, object]] = [{"text": "abc", "answer": n} for n in ("7", "8")]
    line = world(tmp_path, scorer, rows=rows)
    prefix = 'task.answer_prefix="#### 7\n"'
    (vanilla,) = work([*line, "task.reference_keys=[answer]", prefix], "vanilla")
    found = generations(vanilla)
    assert [(g.correct, g.scored, g.answer) for g in found] == [
        (True, "strict", "7"),
        (False, "strict", "7"),
    ]


def test_an_answer_that_was_never_decoded_is_not_scored(tmp_path: Path) -> None:
    scorer: dict[str, object] = {"_target_": "bench.gsm8k.Gsm8k", "filter": "strict"}
    rows: list[dict[str, object]] = [{"text": t, "answer": "7"} for t in ("abc", "abc" * 90)]
    line = [*world(tmp_path, scorer, rows=rows), "task.reference_keys=[answer]"]
    (vanilla,) = work(line, "vanilla")
    _, second = generations(vanilla)
    assert (second.status, second.correct, second.scored) == ("too_long", None, "no: too_long")


def test_a_task_without_a_rule_keeps_answers_unjudged() -> None:
    for name in ("mt_bench", "spec_bench", "lab"):
        verdict = judge(task_of(name).scorer, "Eight.", None, execute=True)
        assert (verdict.correct, verdict.scored) == (None, "no: the task has no scorer")


def test_a_record_from_before_there_were_scores_is_read() -> None:
    old = {
        "schema": 1,
        "prompt_id": "p",
        "turn": 0,
        "category": "c",
        "status": "ok",
        "prompt_tokens": 3,
    }
    found = Generation.parse(old)
    assert (found.correct, found.scored) == (None, "")


def test_two_turns_are_not_scored_as_one(tmp_path: Path) -> None:
    scorer: dict[str, object] = {"_target_": "bench.gsm8k.Gsm8k", "filter": "strict"}
    rows: list[dict[str, object]] = [{"text": ["abc", "de"], "answer": "7"}]
    line = [*world(tmp_path, scorer, rows=rows), "task.reference_keys=[answer]"]
    with pytest.raises(ValueError, match=re.escape("prompts.jsonl:1: a plain, prefixed or scored")):
        planned([*line, "task.answer_prefix=''"])


def test_unscored_takes_any_reference() -> None:
    Unscored().check(None)
    Unscored().check("anything")
