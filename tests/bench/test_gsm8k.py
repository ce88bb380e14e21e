import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench.gsm8k import FILTERS, Gsm8k
from bench.source import read_file
from bench.task import Prompt, load
from tests.bench import lm_eval_oracle as harness
from tests.bench.tasks import DATA, FILES, published, task_of

RIGHT = {"strict": "#### {}", "strict_cot": "The answer is {}.", "flexible": "So it is {}."}
RIGHT["paper"] = "2 + 3 = 5 and 7 is left. The answer is {}.\n\nQ: 9 birds. The answer is 4."


def found(name: str, text: str) -> str:
    return Gsm8k(filter=name).score(text, "0").answer


def is_right(name: str, text: str, reference: str) -> bool:
    verdict = Gsm8k(filter=name).score(text, reference)
    assert verdict.scored == name
    assert verdict.correct is not None
    return verdict.correct


@pytest.fixture(scope="module")
def problems() -> Sequence[Prompt]:
    return load(published("gsm8k"))


@pytest.mark.parametrize("name", harness.NAMES)
def test_a_text_gets_the_verdict_that_the_harness_gave(name: str) -> None:
    kept = json.loads(harness.VERDICTS.read_text(encoding="utf-8"))
    pairs = list(itertools.product(harness.texts(), harness.REFERENCES))
    assert len(pairs) == kept["pairs"], "the verdicts are of other texts: make them again"
    right = {tuple(pair) for pair in kept["right"][name]}
    assert 0 < len(right) < len(pairs)
    assert {(text, ref) for text, ref in pairs if is_right(name, text, ref)} == right


@pytest.mark.parametrize("name", harness.NAMES)
def test_the_harness_itself_agrees_on_every_problem(name: str, problems: Sequence[Prompt]) -> None:
    pytest.importorskip("lm_eval")
    references = [p.reference or "" for p in problems]
    answers = [
        RIGHT[name].format(reference if i % 3 else f"{reference}1")
        for i, reference in enumerate(references)
    ]
    mine = [is_right(name, a, r) for a, r in zip(answers, references, strict=True)]
    assert mine == list(harness.verdicts(name, answers, references))
    assert mine.count(False) == 440


@pytest.mark.parametrize("name", FILTERS)
def test_planted_answers_are_counted_over_all_problems(
    name: str, problems: Sequence[Prompt]
) -> None:
    references = [p.reference or "" for p in problems]
    right = [is_right(name, RIGHT[name].format(r), r) for r in references]
    wrong = [is_right(name, RIGHT[name].format(f"{r}1"), r) for r in references]
    none = [is_right(name, "I do not know.", r) for r in references]
    assert (sum(right), sum(wrong), sum(none), len(right)) == (1319, 0, 0, 1319)


def test_the_published_solutions_are_right_by_their_mark() -> None:
    path = published("gsm8k").path
    assert path is not None
    solutions = [row.get("answer") for row in read_file(DATA / FILES["gsm8k"])]
    references = [p.reference or "" for p in load(published("gsm8k"))]
    for name, right in (("strict", 1319), ("flexible", 1319), ("paper", 1319), ("strict_cot", 0)):
        pairs = zip(solutions, references, strict=True)
        assert sum(is_right(name, text, reference) for text, reference in pairs) == right, name


@pytest.mark.parametrize(
    ("text", "number"),
    [
        (" 3 + 4 = 7. The answer is 7.", "7"),
        ("THE ANSWER IS 1,234 of 9.", "1234"),
        ("The answer is $-2.50 each", "-2.50"),
        ("The answer is 5. Or 6? The answer is 7.", "5"),
        ("3 and 4. The answer is unknown. The answer is 7.", ""),  # nothing between the two
        ("It is 3, then 4.", "4"),
        ("It is 3.50", "3.50"),
        ("I do not know.", ""),
        ("", ""),
    ],
)
def test_the_papers_rule_by_hand(text: str, number: str) -> None:
    assert found("paper", text) == number


def test_numbers_are_compared_as_text() -> None:
    assert not is_right("paper", "The answer is 18.00", "18")
    assert is_right("paper", "The answer is 18", "18")


def test_an_unknown_filter_is_refused() -> None:
    with pytest.raises(ValueError, match=r"filter must be one of strict, .* got 'mine'"):
        Gsm8k(filter="mine")
    with pytest.raises(ValueError, match=r"task\.scorer: filter must be one of"):
        task_of("gsm8k", scorer={"_target_": "bench.gsm8k.Gsm8k", "filter": "mine"})


def test_a_reference_that_is_no_number_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"question": "a", "answer": "#### eight"}')
    with pytest.raises(ValueError, match=r"x.jsonl:1: the reference must be a number, got 'eight'"):
        load(task_of("gsm8k", path="x.jsonl", data_dir=str(tmp_path)))


def test_the_chat_form_reads_the_same_problems_without_worked_ones(
    problems: Sequence[Prompt],
) -> None:
    chat = load(published("gsm8k_chat"))
    assert [p.reference for p in chat] == [p.reference for p in problems]
    assert all(p.turns[0].endswith("The answer is <number>.") for p in chat)
    assert all(len(p.turns[0]) < 1300 for p in chat)
