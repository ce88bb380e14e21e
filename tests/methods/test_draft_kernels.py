"""The kernels that choose tokens and trees against plain torch."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from methods.expansion import Expansion, Level
from methods.kernels import reference
from tests.methods.kernel_parts import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    ON_GPU,
    draw,
    kernel,
    random_parents,
    run_interpreted,
)

if INTERPRETED or ON_GPU:
    from methods.kernels import best, expansion, tree


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def with_many_equals(m: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Logits of few values, both zeros among them, a row's first half impossible."""
    logits = (draw(m, vocabulary) * 4).round().to(dtype) / 2
    logits[0, : vocabulary // 2] = -torch.inf
    return logits


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "vocabulary", "k"),
    [
        (1, 40, 1),
        (3, 5000, 10),
        (2, 4097, 32),
        (1, 16, 16),
        (2, 6151, 13),
        (1, 2304, 300),  # more than a block has chunks, and than the last block has tokens
        *[(10, 128256, 10), (64, 32003, 1), (1, 128256, 16)] * ON_GPU,
    ],
)
def test_the_best_are_those_of_a_stable_sort(
    m: int, vocabulary: int, k: int, dtype: torch.dtype
) -> None:
    equals = with_many_equals(m, vocabulary, dtype)
    for logits in (equals, draw(m, vocabulary, dtype=dtype)):
        logprobs, ids = best.best(logits, k)
        expected = logits.float().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(ids, expected.indices[:, :k])
        scores = logits.double().log_softmax(dim=-1).gather(-1, ids)
        torch.testing.assert_close(logprobs.double(), scores, rtol=1e-5, atol=1e-5)
        assert torch.equal(best.argmax(logits), expected.indices[:, 0])


@kernel
@pytest.mark.parametrize("k", range(1, 17))
def test_the_best_of_tokens_that_are_all_equal_are_the_first(k: int) -> None:
    logits = torch.zeros(1, 2100, dtype=torch.float16, device=DEVICE)
    logits[0, ::2] = -0.0
    assert best.best(logits, k)[1].tolist() == [list(range(k))]


@kernel
def test_wide_keys_order_half_precision_as_narrow_ones_do(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = with_many_equals(2, 5000, torch.float16)
    narrow = best.best(logits, 10)
    monkeypatch.setattr(best, "NARROW", 0)
    for got, expected in zip(best.best(logits, 10), narrow, strict=True):
        assert torch.equal(got, expected)


@kernel
def test_a_certain_token_has_no_probability_above_one() -> None:
    logits = torch.zeros(1, 3000, device=DEVICE)
    logits[0, 2999] = 90
    logprobs, ids = best.best(logits, 2)
    assert ids.tolist() == [[2999, 0]]
    assert logprobs[0, 0] == 0


def expanded(
    expand: Callable[..., Level],
    scores: Tensor,
    logprobs: Tensor,
    *,
    kept: Tensor | None,
    deep: int,
    column: int,
) -> list[Tensor]:
    """Everything that `expand` gives for a level behind 3 other nodes."""
    n, k = logprobs.shape
    integers, first, width = torch.arange(2 * n, device=DEVICE).view(2, n), 3, 1100
    level = Level(
        tokens=integers[0],
        positions=20 + integers[0],
        places=integers[1] if n > 1 else torch.full((1,), -1, device=DEVICE),
        scores=scores,
        hidden=torch.empty(n, width, device=DEVICE),
        ancestors=torch.arange(n * deep, dtype=torch.int32, device=DEVICE).view(n, deep),
    )
    found = Expansion.empty(first + n * k + 2, DEVICE)
    for values in (found.tokens, found.parents, found.scores):
        values.fill_(-7)
    torch.manual_seed(1)
    ids, output = torch.randint(0, 90, (n, k), device=DEVICE), draw(n, width, dtype=torch.float16)
    out = expand(level, found, output, logprobs, ids, kept, first=first, column=column, slot=11 + n)
    return [*vars(out).values(), *vars(found).values()]


@kernel
@pytest.mark.parametrize("k", range(1, 17))
@pytest.mark.parametrize("below_root", [False, True])
@pytest.mark.parametrize(("mapped", "tied"), [(False, True), (True, False)])
def test_a_level_expands_as_by_a_stable_sort(
    k: int, below_root: bool, mapped: bool, tied: bool
) -> None:
    n = 1 if below_root else k
    scores = torch.zeros(1, device=DEVICE) if below_root else -draw(k).abs()
    logprobs = -draw(n, k).abs()
    if tied:
        scores, logprobs = scores.round(), logprobs.round()
        logprobs[-1, k // 2 :] = -torch.inf
    logprobs = logprobs.sort(dim=-1, descending=True).values
    kept = torch.randint(0, 1000, (90,), device=DEVICE) if mapped else None
    for deep, column in ((5, 3), (4, 4)):  # within a path, and behind the longest
        settings = {"kept": kept, "deep": deep, "column": column}
        got = expanded(expansion.expand, scores, logprobs, **settings)
        expected = expanded(reference.expand, scores, logprobs, **settings)
        for mine, theirs in zip(got, expected, strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)


@kernel
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("k", [1, 3, 10, 16])
def test_pruning_keeps_what_a_stable_sort_keeps(k: int, tied: bool) -> None:
    parents, scores = [torch.full((k,), -1, device=DEVICE)], [-draw(k).abs()]
    for _ in range(2):
        earlier = torch.cat(scores)
        newest = torch.arange(len(earlier), device=DEVICE)[-k:]
        parents.append(newest.repeat_interleave(k))
        scores.append(earlier[parents[-1]] - draw(k * k).abs())
    made = Expansion(
        tokens=torch.randint(0, 1000, (k + 2 * k * k,), device=DEVICE),
        parents=torch.cat(parents),
        scores=(torch.cat(scores) * 2).round() if tied else torch.cat(scores),
    )
    root = torch.tensor([1234], device=DEVICE)
    for keep in {1, k, 2 * k, k + k * k, k + 2 * k * k}:
        got = expansion.prune(root, made, keep=keep)
        expected = reference.prune(root, made, keep=keep)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine, theirs)


@kernel
@pytest.mark.parametrize("n", [1, 2, 17, 60])
def test_ancestry_is_that_of_the_tree(n: int) -> None:
    parents = random_parents(n)
    for got, expected in zip(
        tree.ancestry(parents, n), reference.ancestry(parents.cpu(), n), strict=True
    ):
        assert torch.equal(got.cpu(), expected)


@kernel
@pytest.mark.parametrize("n", [1, 2, 17, 60])
def test_the_walk_steps_down_as_the_plain_one_does(n: int) -> None:
    parents = random_parents(n)
    # Siblings' tokens differ; a small vocabulary of picks makes every length of path occur.
    tokens = torch.tensor([int((parents[:i] == parents[i]).sum()) for i in range(n)], device=DEVICE)
    for _ in range(5):
        picked = torch.randint(0, 2, (n,), device=DEVICE)
        expected = reference.walk(tokens.cpu(), parents.cpu(), picked.cpu())
        assert torch.equal(tree.walk(tokens, parents, picked).cpu(), expected)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests above run here as they are")
@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
def test_kernels_pass_interpreted() -> None:
    run = run_interpreted(__file__)
    assert run.returncode == 0, run.stdout[-3000:]
