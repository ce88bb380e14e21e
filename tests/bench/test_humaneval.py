import json
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from bench.humaneval import HumanEval, before, find_program
from bench.score import Verdict
from bench.source import read_file
from bench.task import load
from tests.bench.tasks import DATA, FILES, published, task_of
from tests.bench.test_sandbox import can_isolate

needs_sandbox = pytest.mark.skipif(not can_isolate(), reason="no namespaces on this machine")

Problem = dict[str, Any]
PROMPT = 'import math\n\n\ndef g(x):\n    return x\n\n\ndef f(x):\n    """Add one."""\n'
WHOLE = "def f(x):\n    return x + 1\n"


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    published("humaneval")  # or skip
    return [row.values for row in read_file(DATA / FILES["humaneval"])]


def scorer() -> HumanEval:
    found = task_of("humaneval").scorer
    assert isinstance(found, HumanEval)
    return found


def verdicts(answers: Iterable[tuple[Problem, str]]) -> list[Verdict]:
    """Score in as many processes as there are cores; the threads only wait for them."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda pair: scorer().score(pair[1], json.dumps(pair[0])), answers))


def full(problem: Problem) -> str:
    return str(problem["prompt"] + problem["canonical_solution"])


def bare(problem: Problem) -> str:
    """The function alone, without the imports and functions that the prompt gave."""
    return full(problem)[len(before(problem["prompt"], problem["entry_point"])) :]


FORMS: list[Callable[[Problem], str]] = [
    lambda p: str(p["canonical_solution"]),
    lambda p: dedent(p["canonical_solution"]),
    lambda p: str(p["canonical_solution"]).strip(),
    full,
    lambda p: (
        f"Sure! First, a sketch:\n\n```python\ndef sketch(x):\n    pass\n```\n\nNow the whole:"
        f"\n\n```python\n{full(p)}```\n\nTry it:\n\n```\n{p['entry_point']}(None)\n```\nGood luck."
    ),
    lambda p: f"The function:\n\n```python\n{bare(p)}\nprint({p['entry_point']}())\n```",
    lambda p: f"The function:\n\n```python\n{bare(p)}\n\ndef half_a_li",
    lambda p: (
        f"```python\n{p['prompt']}    pass\n\n{bare(p)}\nassert {p['entry_point']}() == 1\n```"
    ),
]


@needs_sandbox
def test_all_164_published_solutions_pass_in_whatever_form(problems: list[Problem]) -> None:
    found = verdicts((p, FORMS[i % len(FORMS)](p)) for i, p in enumerate(problems))
    wrong = [(p["task_id"], v) for p, v in zip(problems, found, strict=True) if not v.correct]
    assert (wrong, len(found)) == ([], 164)


@needs_sandbox
def test_planted_wrong_programs_are_counted_exactly(problems: list[Problem]) -> None:
    """Every fourth problem: of 41 answers 11 right, 10 empty, 10 of the next problem, 10 broken."""
    plants: list[Callable[[Problem, Problem], str]] = [
        lambda p, _: full(p),
        lambda _, __: "    return None\n",
        lambda p, q: f"```python\n{bare(q).replace(q['entry_point'], p['entry_point'])}```",
        lambda p, _: f"```python\n{p['prompt']}    raise NotImplementedError\n```",
    ]
    chosen = problems[::4]
    answers = [(p, plants[i % 4](p, problems[(4 * i + 1) % 164])) for i, p in enumerate(chosen)]
    found = verdicts(answers)
    assert [v.correct for v in found] == [i % 4 == 0 for i in range(41)]
    assert {v.scored for v in found} == {"pass@1"}


@needs_sandbox
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("import os\nwhile True:\n    os.fork()\n", "failed: BlockingIOError"),
        ("x = bytearray(10 * 10**9)\n", "failed: MemoryError"),
        ("x = open('/usr/planted', 'w')\n", "failed: OSError: [Errno 30]"),
        ("import socket\nx = socket.create_connection(('127.0.0.1', 9))\n", "failed: OSError"),
        ("while True:\n    pass\n", "timeout: the time is up"),
        ("import os\nx = os._exit(0)\n", "failed: the program ended before its tests"),
    ],
)
def test_a_harmful_answer_is_a_failure(answer: str, reason: str) -> None:
    problem = {
        "prompt": PROMPT,
        "entry_point": "f",
        "test": "def check(f):\n    assert f(1) == 2\n",
    }
    text = f"```python\n{answer}{WHOLE}```"
    quick = HumanEval(timeout_s=1, memory_mib=256, processes=4, files=32, file_mib=4)
    verdict = quick.score(text, json.dumps(problem))
    assert verdict.correct is False
    assert verdict.reason.startswith(reason)


@needs_sandbox
def test_every_problem_may_be_scored_from_what_its_prompt_carries() -> None:
    (prompt,) = load(published("humaneval", limit=1))
    body = (
        "    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])"
    )
    assert scorer().score(body, prompt.reference or "").correct is True


HEAD = "import math\n\n\ndef g(x):\n    return x\n"
BODY = "def f(x):\n    return x + 1\n"
STUB = 'def f(x):\n    """Add one."""\n    return x + 1\n'


@pytest.mark.parametrize(
    ("text", "program"),
    [
        (WHOLE, BODY),
        (f"Prose.\n```python\n{WHOLE}```\nMore prose, it's a test.", BODY),
        (f"```\nnot code here\n```\n```py\n{WHOLE}```", BODY),
        (f"```python\n{WHOLE}```\n```python\ndef f(x):\n    return 0\n```", BODY),  # the first
        (f"```python\ndef f(x):\n    return 0\n\n{WHOLE}```", "def f(x):\n    return 0\n\n" + BODY),
        (f"````python\n{WHOLE}````", BODY),
        (f"~~~\n{WHOLE}~~~", BODY),
        (f"{WHOLE}print(f(1))\nassert f(1) == 3\n'end'\n", BODY),
        (f"{WHOLE}\nThis adds one to it.", BODY),
        (f"```python\n{WHOLE}\ndef cut(", BODY),
        (f"import re\nn = 1\n{WHOLE}", "import re\nn = 1\n\n" + BODY),
        ("    return x + 1\n", STUB),
        ("return x + 1\n", STUB),
        ("  return x + 1", STUB),
        ("```python\n    return x + 1\n```", STUB),
        ("Well:\n```python\nreturn x + 1\n```\nDone.", STUB),
    ],
)
def test_a_program_is_found(text: str, program: str) -> None:
    found = find_program(text, PROMPT, "f")
    assert found is not None
    assert found.replace("\n", "") == (HEAD + program).replace("\n", "")
    compile(found, "program.py", "exec")


@pytest.mark.parametrize(
    "text",
    ["", "I cannot do that.", "```python\n```", "def f(x", "\0"],
)
def test_a_text_without_the_function_has_no_program(text: str) -> None:
    assert find_program(text, PROMPT, "f") is None


def test_no_program_is_a_wrong_answer_that_runs_nothing() -> None:
    reference = json.dumps({"prompt": PROMPT, "entry_point": "f", "test": ""})
    for text in ("I cannot do that.", f"def f(x):\n    return {'-' * 5000}x\n"):
        verdict = scorer().score(text, reference)
        assert (verdict.correct, verdict.reason) == (False, "no program in the answer")
        assert verdict.sandbox == ""


def test_a_reference_without_tests_is_refused_by_line(tmp_path: Path) -> None:
    row = {"task_id": 1, "prompt": PROMPT, "entry_point": "f", "test": 7}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"x.jsonl:1: the reference must have .* lacks test"):
        load(task_of("humaneval", path="x.jsonl", data_dir=str(tmp_path)))
