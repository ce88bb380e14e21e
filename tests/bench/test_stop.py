import random
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from bench.task import Stopper, cut, find_stop, stop_ids
from tests.bench.tasks import byte_fallback, byte_level, task_of, tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def tokenizer() -> "PreTrainedTokenizerFast":
    return byte_level()


def test_stop_tokens_are_eos_and_the_named_ones_of_the_vocabulary(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    ids = stop_ids(tokenizer, task_of("mt_bench"))
    assert {tokenizer.decode([i]) for i in ids} == {"</s>", "<|eot_id|>"}


def test_a_name_outside_the_vocabulary_is_not_the_unknown_token() -> None:
    llama2_like = byte_fallback()
    assert stop_ids(llama2_like, task_of("mt_bench")) == {llama2_like.eos_token_id}


def test_an_answer_ends_at_its_stop_token_which_counts_but_is_not_text(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    ids = [*tokens(tokenizer, "Eight."), eot]
    result = cut([*ids, *tokens(tokenizer, " And")], tokenizer, task_of("mt_bench"))
    assert (result.token_ids, result.text, result.stop) == (ids, "Eight.", "stop")


def test_an_answer_ends_at_its_stop_string_which_is_not_text(
    tokenizer: "PreTrainedTokenizerFast",
) -> None:
    ids = tokens(tokenizer, " The answer is 8.\n\nQ:")
    assert len(tokens(tokenizer, "\nQ:")) > 1
    result = cut([*ids, *tokens(tokenizer, " How many?")], tokenizer, task_of("gsm8k"))
    assert (result.token_ids, result.text, result.stop) == (ids, " The answer is 8.\n", "stop")


def test_an_answer_without_a_stop_ends_at_the_limit(tokenizer: "PreTrainedTokenizerFast") -> None:
    ids = tokens(tokenizer, "a b c d e f")
    result = cut(ids, tokenizer, task_of("lab", max_new_tokens=3))
    assert (result.token_ids, result.text, result.stop) == (ids[:3], "a b"[:3], "limit")


def test_the_paper_never_stops_gsm8k(tokenizer: "PreTrainedTokenizerFast") -> None:
    task = task_of("gsm8k", protocol="paper_faithful")
    ids = [*tokens(tokenizer, "8.\nQ: How"), tokenizer.eos_token_id, *tokens(tokenizer, " A")]
    assert Stopper(tokenizer, task)(ids) is None
    assert find_stop("8.\nQ: How", task) is None


def test_the_paper_stops_humaneval_at_eos_only(tokenizer: "PreTrainedTokenizerFast") -> None:
    task = task_of("humaneval", protocol="paper_faithful")
    ids = [*tokens(tokenizer, "x\n```\n"), tokenizer.eos_token_id]
    assert Stopper(tokenizer, task)(ids) == len(ids)


def test_the_paper_stops_a_chat_at_eos_and_eot_only(tokenizer: "PreTrainedTokenizerFast") -> None:
    named = {"stop_tokens": ["<|eot_id|>", "Q"]}
    ids = {
        protocol: {tokenizer.decode([i]) for i in stop_ids(tokenizer, task_of("mt_bench", **given))}
        for protocol in ("corrected", "paper_faithful")
        for given in [{**named, "protocol": protocol}]
    }
    assert ids["corrected"] == {"</s>", "<|eot_id|>", "Q"}
    assert ids["paper_faithful"] == {"</s>", "<|eot_id|>"}


def test_the_first_stop_string_is_found() -> None:
    task = task_of("gsm8k", stop=["two", "one"])
    assert find_stop("a one two", task) == 2
    assert find_stop("a three", task) is None


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
@pytest.mark.parametrize(
    "stop", [["\nQ:"], ["\n```"], ["\u3002"], [" is", "\U0001f642"], ["answer is A: Q"]]
)
def test_a_stop_is_where_the_whole_text_first_holds_it(
    make: Callable[[], "PreTrainedTokenizerFast"], stop: list[str]
) -> None:
    tokenizer = make()
    task = task_of("gsm8k", stop=stop)
    rng = random.Random(0)
    pieces = [
        "\n",
        "Q",
        ":",
        "``",
        " is",
        "answer",
        "\u65e5\u672c",
        "\U0001f642",
        "\u3002",
        "\u00e9",
        " ",
        "i",
        stop[0],
        "",
    ]
    outcomes = Counter[bool]()
    for _ in range(60):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 30)))
        ids = tokens(tokenizer, text)
        ends = (n for n in range(1, len(ids) + 1) if holds(tokenizer, ids[:n], stop))
        expected = next(ends, None)
        assert in_steps(Stopper(tokenizer, task), ids, rng) == expected
        result = cut(ids, tokenizer, task)
        assert result.token_ids == ids[:expected]
        assert not any(s in result.text for s in stop)
        assert cut(result.token_ids, tokenizer, task) == result
        outcomes[expected is None] += 1
    assert len(outcomes) == 2  # some texts stop and some do not


def holds(tokenizer: "PreTrainedTokenizerFast", ids: list[int], stop: list[str]) -> bool:
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return any(s in text for s in stop)


def in_steps(stopper: Stopper, ids: list[int], rng: random.Random) -> int | None:
    """What a decode loop gets that emits one to seven tokens a step."""
    end = 0
    while end < len(ids):
        end = min(end + rng.randint(1, 7), len(ids))
        if (keep := stopper(ids[:end])) is not None:
            return keep
    return None


def test_a_long_answer_decodes_a_window_of_it(tokenizer: "PreTrainedTokenizerFast") -> None:
    task = task_of("gsm8k")
    stopper = Stopper(tokenizer, task)
    ids = tokens(tokenizer, "\u65e5\u672c\u8a9e na\u00efve " * 400)
    assert in_steps(stopper, ids, random.Random(0)) is None
    assert len(ids) - stopper._starts[0] < 20
    assert stopper([*ids, *tokens(tokenizer, "\nQ: How")]) == len(ids) + len(
        tokens(tokenizer, "\nQ:")
    )
