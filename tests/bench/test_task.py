import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from omegaconf import OmegaConf

from bench.task import (
    FORMS,
    ROOT,
    Prompt,
    Task,
    encode,
    load,
)
from bench.text import Text
from tests.bench.tasks import TEMPLATE, byte_level, published, task_of, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerFast":
    return byte_level()


@pytest.fixture
def lab_file(tmp_path: Path) -> Path:
    path = tmp_path / "heldout.jsonl"
    rows = [
        {
            "prompt_id": f"ast/{i}",
            "module": "ast",
            "python": "3.11.7",
            "text": f"def f{i}(x):\n    ",
        }
        for i in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_mt_bench_is_80_questions_of_two_turns_in_8_categories() -> None:
    prompts = load(published("mt_bench"))
    assert len(prompts) == 80
    assert sum(len(p.turns) for p in prompts) == 160
    assert set(Counter(p.category for p in prompts).values()) == {10}
    assert prompts[0].prompt_id == "81"
    assert prompts[0].turns[1].startswith("Rewrite your previous response.")


def test_spec_bench_is_6_categories_of_80_and_560_turns() -> None:
    prompts = load(published("spec_bench"))
    names = ["mt_bench", "translation", "summarization", "qa", "math_reasoning", "rag"]
    assert Counter(p.category for p in prompts) == dict.fromkeys(names, 80)
    assert sum(len(p.turns) for p in prompts) == 560


def test_gsm8k_is_1319_problems_with_numbers_for_references() -> None:
    prompts = load(published("gsm8k"))
    assert len(prompts) == 1319
    assert (prompts[0].prompt_id, prompts[0].reference) == ("gsm8k/0", "18")
    assert all(re.fullmatch(r"-?\d+(\.\d+)?", p.reference or "") for p in prompts)


def test_gsm8k_reads_eight_worked_problems_before_its_own() -> None:
    (prompt,) = load(published("gsm8k", limit=1))
    (text,) = prompt.turns
    assert text.startswith("Q: There are 15 trees in the grove.")
    assert text.count("The answer is ") == 8
    assert text.count("\n\nQ: ") == 8
    assert "The answer is 8.\n\nQ: Janet" in text
    assert text.endswith(" at the farmers' market?\nA:")


def test_humaneval_is_164_functions_with_what_running_their_tests_takes() -> None:
    prompts = load(published("humaneval"))
    assert len(prompts) == 164
    assert prompts[0].prompt_id == "HumanEval/0"
    reference = json.loads(prompts[0].reference or "")
    assert sorted(reference) == ["entry_point", "prompt", "test"]
    assert reference["entry_point"] == "has_close_elements"
    assert all(p.turns[0].endswith("\n```\n") for p in prompts)


def test_lab_reads_the_text_as_it_stands(lab_file: Path) -> None:
    prompts = load(task_of("lab", path=str(lab_file)))
    assert prompts[2] == Prompt(
        prompt_id="ast/2", category="code", turns=("def f2(x):\n    ",), reference=None
    )
    assert len(prompts) == 3


def test_a_local_path_wins_over_the_hub(lab_file: Path) -> None:
    task = task_of("lab", path=str(lab_file), hub="nobody/nothing", hub_split="test")
    assert len(load(task)) == 3


def test_a_relative_path_is_relative_to_data_dir(lab_file: Path) -> None:
    task = task_of("lab", path=lab_file.name, data_dir=str(lab_file.parent))
    assert len(load(task)) == 3


def test_a_limit_of_the_number_of_categories_covers_them() -> None:
    prompts = load(published("spec_bench", limit=6))
    assert len({p.category for p in prompts}) == 6


TWO_TURNS = Prompt(prompt_id="1", category="c", turns=("How many?", "The other?"), reference=None)
ONE_TURN = replace(TWO_TURNS, turns=("def f(x):\n",))


def test_a_chat_prompt_is_the_template_with_one_bos(tokenizer: "PreTrainedTokenizerFast") -> None:
    task = task_of("mt_bench", system="Be brief.")
    ids = encode(tokenizer, task, TWO_TURNS, [])
    assert tokenizer.decode(ids) == (
        "<s><system>Be brief.<|eot_id|><user>How many?<|eot_id|><assistant>"
    )
    assert ids.count(tokenizer.bos_token_id) == 1


def test_a_later_turn_holds_the_answers_before_it(tokenizer: "PreTrainedTokenizerFast") -> None:
    ids = encode(tokenizer, task_of("mt_bench", system=None), TWO_TURNS, ["Eight."])
    assert tokenizer.decode(ids) == (
        "<s><user>How many?<|eot_id|><assistant>Eight.<|eot_id|>"
        "<user>The other?<|eot_id|><assistant>"
    )


def test_a_template_without_bos_gets_none(tokenizer: "PreTrainedTokenizerFast") -> None:
    bare = byte_level()
    bare.chat_template = TEMPLATE.replace("{{ bos_token }}", "")
    ids = encode(bare, task_of("mt_bench"), TWO_TURNS, [])
    assert tokenizer.bos_token_id not in ids


def test_the_date_of_a_template_does_not_depend_on_the_day() -> None:
    dated = byte_level()
    dated.chat_template = (
        "{% if not date_string is defined %}{% set date_string = strftime_now('%Y') %}{% endif %}"
        "{{ date_string }}"
    )
    assert dated.decode(encode(dated, task_of("mt_bench"), TWO_TURNS, [])) == "26 Jul 2024"


def test_a_plain_prompt_has_one_bos_whether_or_not_the_tokenizer_adds_it(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    silent = byte_level()
    silent.backend_tokenizer.post_processor = None
    expected = [tokenizer.bos_token_id, *tokens(tokenizer, "def f(x):\n")]
    assert tokenizer("def f(x):\n")["input_ids"] == expected
    assert encode(tokenizer, task_of("lab"), ONE_TURN, []) == expected
    assert encode(silent, task_of("lab"), ONE_TURN, []) == expected


def test_a_plain_prompt_has_no_bos_where_the_tokenizer_has_none(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    without = byte_level()
    without.bos_token = None
    assert encode(without, task_of("lab"), ONE_TURN, []) == tokens(tokenizer, "def f(x):\n")


def test_humaneval_opens_the_code_block_of_the_answer(tokenizer: "PreTrainedTokenizerFast") -> None:
    task = task_of("humaneval")
    prompt = replace(ONE_TURN, turns=(task.template.replace("{prompt}", "def f(x):\n"),))
    ids = encode(tokenizer, task, prompt, [])
    text = tokenizer.decode(ids)
    assert text.startswith("<s><user>Complete this Python function.")
    assert "\n```python\ndef f(x):\n```\n<|eot_id|><assistant>" in text
    assert text.endswith(":\n\n```python\n")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_paper_reads_humaneval_with_two_bos(tokenizer: "PreTrainedTokenizerFast") -> None:
    paper = task_of("humaneval", protocol="paper_faithful")
    ids = encode(tokenizer, paper, ONE_TURN, [])
    assert ids == [tokenizer.bos_token_id, *encode(tokenizer, task_of("humaneval"), ONE_TURN, [])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "prose"}, r"form must be one of \('plain', 'chat'\), got 'prose'"),
        ({"protocol": "mine"}, "protocol must be one of .* got 'mine'"),
        ({"limit": 0}, "limit must be 1 or more, or null for all, got 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"template": "Q:"}, r"template must contain \{prompt\}, got 'Q:'"),
        ({"system": "Be brief."}, "must be empty where form is plain"),
        ({"stop": [""]}, "stop must not contain an empty string"),
        (
            {"scorer": {"_target_": "bench.gsm8k.Gsm8k", "filter": "paper"}},
            "reference_keys must be given where answers are scored",
        ),
    ],
)
def test_a_wrong_value_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task_of("lab", **change)


@pytest.mark.parametrize("change", [{"limit": "six"}, {"stop": "\nQ:"}, {"fold": 3}, {"depth": 1}])
def test_a_wrong_type_or_name_is_refused_by_field(change: dict[str, Any]) -> None:
    (field,) = change
    with pytest.raises(ValueError, match=rf"task\.{field}: "):
        task_of("lab", **change)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "task lab: the data must have a prompt or more, got none"),
        ('{"prompt_id": 1, "text": "a"}\n{"prompt_id": 2}\n', "x.jsonl:2: .* the key 'text'"),
        ('{"text": "a"}\n', "x.jsonl:1: a row must have the key 'prompt_id'"),
        ('{"prompt_id": 1, "text": ["a", "b"]}\n', "x.jsonl:1: .* has 1 turn, got 2"),
        ('{"prompt_id": 1, "text": "a"}\n' * 2, "x.jsonl:2: prompt ids must differ.*x.jsonl:1"),
    ],
)
def test_a_broken_file_is_refused_by_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load(task_of("lab", path="x.jsonl", data_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gsm8k", {"path": "no.jsonl"}, "no.jsonl .task.path=null reads openai/gsm8k from the hub"),
        ("spec_bench", {"path": "no.jsonl"}, "no.jsonl .no hub copy"),
        ("spec_bench", {}, "task spec_bench has no hub data set: give task.path=<file>"),
        ("gsm8k", {"hub_split": None}, "hub_split must be given"),
        ("gsm8k", {"path": "a.jsonl", "preamble": "no.txt"}, "preamble must be a file"),
    ],
)
def test_a_wrong_source_is_refused(
    name: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "#### 1"}')
    with pytest.raises(ValueError, match=message):
        load(task_of(name, data_dir=str(tmp_path), **changes))


def test_a_chat_task_needs_a_chat_template() -> None:
    bare = byte_level()
    bare.chat_template = None
    message = r"template, .* none: take .* task=gsm8k or task=lab or task=random$"
    with pytest.raises(ValueError, match=message):
        encode(bare, task_of("mt_bench"), TWO_TURNS, [])


def test_a_template_that_refuses_a_system_prompt_says_so() -> None:
    strict = byte_level()
    strict.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match=r"task mt_bench: .* refuses: System role not supported"):
        encode(strict, task_of("mt_bench"), TWO_TURNS, [])


def test_every_task_file_spells_out_every_field() -> None:
    kinds = {"bench.task.Task": Task, "bench.text.Text": Text}
    for path in sorted((ROOT / "conf" / "task").glob("*.yaml")):
        node = OmegaConf.load(path)
        names = set(kinds[node["_target_"]].__dataclass_fields__) | {"_target_"}
        assert set(node) == names, path.name
        assert node["name"] == path.stem
        assert node["_target_"] != "bench.task.Task" or task_of(path.stem).form in FORMS


def test_importing_tasks_leaves_the_slow_packages_out() -> None:
    code = (
        "import sys, bench.task; "
        "assert not sys.modules.keys() & {'torch', 'transformers', 'datasets', 'pyarrow'}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
