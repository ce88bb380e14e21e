import pytest
import torch

from methods.decode import Method, Output, generate
from methods.drafter import Drafter
from methods.recipe import Family, Parts
from methods.vanilla import Vanilla, VanillaDrafter
from methods.verify import Greedy, Rule, Sampled
from tests.family import VOCAB
from tests.methods.parts import make_parts
from tests.methods.scripted import Scripted

PROMPT = [0, 5, 17, 23, 42, 8]
LIMIT = 40


@pytest.fixture(scope="module")
def parts(family: Family) -> Parts:
    return make_parts(family)


def never(tokens: list[int]) -> int | None:
    return None


def run(parts: Parts, drafter: Drafter, rule: Rule | None = None, limit: int = LIMIT) -> Output:
    method = Method(parts.target, drafter, rule or Greedy(), context=parts.context)
    return generate(method, PROMPT, limit=limit, stop=never, seed=7)


def test_plain_decoding_equals_a_bare_argmax_loop(parts: Parts) -> None:
    tokens = list(PROMPT)
    for _ in range(LIMIT):
        read = parts.target(
            torch.tensor([tokens]), torch.arange(len(tokens)), parts.target.cache(len(tokens))
        )
        tokens.append(int(parts.target.logits(read.hidden[0, -1]).argmax()))
    output = run(parts, VanillaDrafter())
    assert output.token_ids == tokens[len(PROMPT) :]
    assert output.accepted == [0] * LIMIT


@pytest.mark.parametrize("rule", [Greedy(), Sampled(temperature=1.0)])
def test_a_drafter_that_is_always_right_changes_only_the_number_of_steps(
    parts: Parts, rule: Rule
) -> None:
    plain = run(parts, VanillaDrafter(), rule, limit=LIMIT + 10)
    script = PROMPT + plain.token_ids
    right = run(parts, Scripted(script, depth=4, error=0, vocab=VOCAB), rule)
    assert right.token_ids == plain.token_ids[:LIMIT]
    assert right.accepted == [4] * (LIMIT // 5)


@pytest.mark.parametrize("rule", [Greedy(), Sampled(temperature=1.0)])
def test_a_drafter_that_is_always_wrong_changes_nothing(parts: Parts, rule: Rule) -> None:
    plain = run(parts, VanillaDrafter(), rule, limit=LIMIT + 10)
    script = PROMPT + plain.token_ids
    wrong = run(parts, Scripted(script, depth=4, error=1, vocab=VOCAB), rule)
    assert wrong.token_ids == plain.token_ids[:LIMIT]
    assert wrong.accepted == [0] * LIMIT


def test_output_is_cut_after_the_limit_even_within_an_accepted_draft(parts: Parts) -> None:
    plain = run(parts, VanillaDrafter(), limit=20)
    script = PROMPT + plain.token_ids
    cut = run(parts, Scripted(script, depth=4, error=0, vocab=VOCAB), limit=12)
    assert cut.token_ids == plain.token_ids[:12]
    assert not cut.stopped
    assert sum(cut.accepted) + len(cut.accepted) == 15


def test_a_stop_cuts_before_the_limit(parts: Parts) -> None:
    plain = run(parts, VanillaDrafter())
    method = Vanilla().method(parts)
    output = generate(method, PROMPT, limit=LIMIT, stop=lambda new: 5 if len(new) >= 5 else None)
    assert output.token_ids == plain.token_ids[:5]
    assert output.stopped


def test_a_second_prompt_owes_nothing_to_the_first(parts: Parts) -> None:
    method = Vanilla().method(parts)
    first = generate(method, PROMPT, limit=8, stop=never)
    generate(method, [0, 9, 9, 9], limit=8, stop=never)
    assert generate(method, PROMPT, limit=8, stop=never).token_ids == first.token_ids


def test_resuming_keeps_the_shared_prefix_and_reads_the_rest_with_the_next_step(
    parts: Parts,
) -> None:
    method = Vanilla().method(parts)
    state = method.step(method.step(method.prefill(PROMPT)))
    assert method.cached == state.tokens[:-1]
    other = [*PROMPT, 50, 51, 52]
    resumed = method.resume(other)
    assert resumed.kept == len(PROMPT)
    fresh = Vanilla().method(parts)
    assert method.step(resumed).tokens == fresh.step(fresh.prefill(other)).tokens


def test_what_is_known_to_be_the_same_need_not_be_compared(parts: Parts) -> None:
    method = Vanilla().method(parts)
    state = method.step(method.step(method.prefill(PROMPT)))
    other = [*state.tokens[:-1], 50, 51]
    resumed = method.resume(other, same=len(PROMPT) - 1)
    assert resumed.kept == len(state.tokens) - 1  # the rest is compared
    assert method.resume(other, same=100).kept == resumed.kept  # no more is cached
    fresh = Vanilla().method(parts)
    assert method.step(resumed).tokens == fresh.step(fresh.prefill(other)).tokens


def test_a_step_leaves_the_state_before_it_as_it_was(parts: Parts) -> None:
    method = Vanilla().method(parts)
    before = method.prefill(PROMPT)
    after = method.step(method.step(before))
    assert before.tokens == PROMPT
    assert after.tokens[: len(PROMPT)] == PROMPT
    assert len(after.tokens) == len(PROMPT) + 2


def test_a_stop_is_told_all_new_tokens_up_to_the_limit(parts: Parts) -> None:
    plain = run(parts, VanillaDrafter(), limit=12).token_ids
    script = PROMPT + plain
    method = Method(
        parts.target, Scripted(script, depth=4, error=0, vocab=VOCAB), Greedy(), context=100
    )
    told: list[list[int]] = []
    generate(method, PROMPT, limit=12, stop=lambda new: told.append(list(new)))  # type: ignore[func-returns-value]
    assert told == [plain[:5], plain[:10], plain]


def test_a_prompt_longer_than_the_context_is_refused(parts: Parts) -> None:
    method = Method(parts.target, VanillaDrafter(), Greedy(), context=5)
    with pytest.raises(ValueError, match="1 to 5 tokens, got 6"):
        method.prefill(PROMPT)


def test_marks_come_in_the_order_of_the_stages(parts: Parts) -> None:
    marks: list[str] = []
    generate(Vanilla().method(parts), PROMPT, limit=2, stop=never, mark=marks.append)
    assert marks == ["prefill", "draft_prefill"] + ["host", "draft", "verify", "commit", "stop"] * 2
