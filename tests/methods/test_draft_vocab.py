"""A head that may propose listed tokens alone: its trees, its bytes, and the same text as ever."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bench.build import build
from methods.checkpoint import check_transformer, load_lm_head
from methods.decode import Method
from methods.drafter import Mark, State, unmarked
from methods.eagle2 import Eagle2, Eagle2Head
from methods.eagle3 import Eagle3, Eagle3Head
from methods.hierarchical import Hierarchical
from methods.recipe import Family, Parts, Recipe
from methods.tree import Tree
from methods.tree_recipe import TreeRecipe
from methods.vanilla import Vanilla
from quant.dense import Dense
from quant.formats.native import native_config
from quant.scheme import Scheme
from quant.stored import AsStored
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from tests.family import VOCAB, write_checkpoint
from tests.made_up import write_random_family
from tests.methods.eagle_oracle import Oracle
from tests.methods.parts import decode, make_parts
from tests.methods.scripted import HandsOn
from tests.methods.test_eagle import PROMPT, features_of, paths
from tests.methods.test_lossless import SCHEMES, read

LISTED = torch.tensor([60, 3, 95, 41, 8, 17, 77, 30, 52, 0, 12, 64, 88, 21, 5, 33])
TREE = {"depth": 3, "top_k": 4, "nodes": 14}
HEADS = [Eagle2(**TREE), Eagle3(**TREE)]
RECIPES = [*HEADS, Hierarchical(min_draft=4, inner=HEADS[0])]
IDS = ["eagle2", "eagle3", "hierarchical"]
W4 = W4A16(group_size=32, symmetric=True, range_search=False)


def cut_oracle(recipe: TreeRecipe, parts: Parts, listed: Tensor) -> Oracle:
    """The oracle of a head that was trained on the listed part of its vocabulary."""
    folder = recipe.folders(parts.family)[0]
    tensors = load_file(folder / "model.safetensors")
    lm_head = parts.target.lm_head.dequantize().double()
    eagle3 = isinstance(recipe, Eagle3)
    own = tensors["d2t"] + torch.arange(VOCAB // 2) if eagle3 else torch.arange(VOCAB)
    kept = [row for row, token in enumerate(own.tolist()) if token in listed.tolist()]
    tensors["d2t"] = own[kept] - torch.arange(len(kept))
    if eagle3:
        tensors["lm_head.weight"] = tensors["lm_head.weight"][kept]
    return Oracle(
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        tensors=tensors,
        embedding=parts.target.embedding,
        lm_head=lm_head[kept],
        eagle3=eagle3,
    )


@pytest.mark.parametrize("recipe", HEADS, ids=IDS[:2])
def test_every_tree_is_that_of_a_head_which_knows_listed_tokens_alone(
    family: Family, recipe: TreeRecipe
) -> None:
    parts = make_parts(family, draft_ids=LISTED)
    drafter, oracle = recipe.drafter(parts), cut_oracle(recipe, parts, LISTED)
    method = Method(parts.target, drafter, parts.rule, context=100)
    state = method.prefill(PROMPT)
    for _ in range(6):
        features = features_of(parts.target, state.tokens[:-1], drafter.taps)
        expected = oracle.tree(features, state.tokens, **TREE)
        assert paths(drafter.propose(state)) == set(expected)
        state = method.step(state)


class Noted(HandsOn):
    """Hands on proposals and keeps the drafted tokens."""

    def __init__(self, recipe: TreeRecipe, parts: Parts) -> None:
        self.inner = recipe.drafter(parts)
        self.drafted: set[int] = set()

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        tree = self.inner.propose(state, mark)
        self.drafted |= set(tree.tokens[1:].tolist())
        return tree


@pytest.mark.parametrize("recipe", HEADS, ids=IDS[:2])
def test_nothing_but_listed_tokens_is_proposed(family: Family, recipe: TreeRecipe) -> None:
    parts = make_parts(family, draft_ids=LISTED)
    noted = Noted(recipe, parts)
    method = Method(parts.target, noted, parts.rule, context=100)
    state = method.prefill(PROMPT)
    for _ in range(20):
        state = method.step(state)
    assert len(noted.drafted) >= 4
    assert noted.drafted <= set(LISTED.tolist())


@pytest.mark.parametrize("lm_head", [None, W8A8(smooth_alpha=None), W4], ids=str)
@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_the_text_is_plain_decodings_whatever_is_listed(
    family: Family, recipe: Recipe, lm_head: Scheme | None
) -> None:
    expected = decode(Vanilla(), make_parts(family), PROMPT)
    for listed in (LISTED, LISTED[:4], torch.arange(VOCAB)):
        if isinstance(recipe, Eagle3) and len(listed) == 4:
            continue  # its own vocabulary has fewer of these than top_k
        parts = make_parts(family, lm_head=lm_head, draft_ids=listed)
        recipe.check(family, draft_ids=listed)
        assert decode(recipe, parts, PROMPT) == expected


@pytest.mark.parametrize("recipe", HEADS, ids=IDS[:2])
def test_a_list_of_everything_gives_the_trees_of_no_list(
    family: Family, recipe: TreeRecipe
) -> None:
    whole, listed = make_parts(family), make_parts(family, draft_ids=torch.arange(VOCAB).flip(0))
    features = features_of(whole.target, PROMPT[:-1], recipe.head(whole).taps)
    state = State(tokens=PROMPT, kept=0, features=features, seed=0)
    one, other = (recipe.drafter(parts).propose(state) for parts in (whole, listed))
    assert one.tokens.tolist() == other.tokens.tolist()
    assert one.parents.tolist() == other.parents.tolist()


@pytest.mark.parametrize("name", SCHEMES)
def test_listed_rows_of_a_scheme_are_rows_of_the_whole(family: Family, name: str) -> None:
    scheme = build(read("quant", name), Scheme, key="quant")  # type: ignore[type-abstract]
    if scheme.needs_absmax:
        pytest.skip("cannot be had for some tokens alone")
    where = {"dtype": torch.float64, "device": torch.device("cpu")}
    whole = load_lm_head(family.target, scheme, **where)
    listed = load_lm_head(family.target, scheme, rows=LISTED, **where)
    assert torch.equal(listed.dequantize(), whole.dequantize()[LISTED])


def write_stored(folder: Path, out: Path) -> Path:
    """A folder whose lm_head is quantised, all its other layers dense."""
    tensors = load_file(folder / "model.safetensors")
    packed = W4.pack(tensors.pop("lm_head.weight"))
    tensors |= {f"lm_head.{name}": tensor for name, tensor in packed.items()}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        module = name.removesuffix(".weight")
        tensors |= {f"{module}.{k}": t for k, t in W4.pack(tensors.pop(name)).items()}
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = native_config(scheme=W4, lm_head=W4, rounding="nearest")
    return write_checkpoint(out, config, tensors)


def test_of_a_stored_lm_head_rows_are_taken_as_they_are(family: Family, tmp_path: Path) -> None:
    folder = write_stored(family.target, tmp_path / "stored")
    where = {"dtype": torch.float64, "device": torch.device("cpu")}
    whole = load_lm_head(folder, AsStored(), **where)
    listed = load_lm_head(folder, AsStored(), rows=LISTED, **where)
    assert torch.equal(listed.dequantize(), whole.dequantize()[LISTED])
    assert listed.weight_bytes * VOCAB == whole.weight_bytes * len(LISTED)
    with pytest.raises(ValueError, match="lm_head is stored in w4a16-g32, so a copy's scheme must"):
        load_lm_head(folder, W8A8(smooth_alpha=None), rows=LISTED, **where)


def test_a_list_reads_as_few_bytes_as_it_is_long(family: Family) -> None:
    for lm_head in (Dense(), W4):
        whole, cut = (
            HEADS[0].head(make_parts(family, lm_head=lm_head, draft_ids=ids))
            for ids in (torch.arange(VOCAB), LISTED)
        )
        assert isinstance(whole, Eagle2Head)
        assert isinstance(cut, Eagle2Head)
        assert cut.lm_head.weight_bytes * VOCAB == whole.lm_head.weight_bytes * len(LISTED)


def test_without_a_scheme_of_its_own_a_list_stays_in_the_targets(family: Family) -> None:
    w8 = W8A8(smooth_alpha=None)
    parts = replace(make_parts(family, draft_ids=LISTED), target_lm_head=w8)
    head = HEADS[0].head(parts)
    assert isinstance(head, Eagle2Head)
    expected = load_lm_head(family.target, w8, dtype=torch.float64, device=torch.device("cpu"))
    assert torch.equal(head.lm_head.dequantize(), expected.dequantize()[LISTED.sort().values])
    inside = parts.smaller(ahead=0)
    assert (inside.target_lm_head, inside.draft_ids) == (parts.dense, LISTED)


def test_of_an_eagle3_head_its_own_and_listed_tokens_are_left(family: Family) -> None:
    own = HEADS[1].head_ids(family, check_transformer(family.target))
    head = HEADS[1].head(make_parts(family, draft_ids=LISTED))
    assert isinstance(head, Eagle3Head)
    assert head.kept is not None
    assert head.kept.tolist() == sorted(set(own.tolist()) & set(LISTED.tolist()))
    assert head.lm_head.out_features == len(head.kept) < len(LISTED)


@pytest.mark.parametrize(
    ("recipe", "count", "message"),
    [
        (Eagle2(depth=1, top_k=5, nodes=5), 4, "cut by draft_vocab, of 4, got 5"),
        (Hierarchical(min_draft=2, inner=HEADS[0]), 3, "cut by draft_vocab, of 3, got 4"),
        (
            Hierarchical(min_draft=2, inner=Vanilla()),
            3,
            "draft_vocab must be null where no draft head drafts, got a list of 3 tokens",
        ),
    ],
)
def test_what_a_list_does_not_fit_is_told_before_weights_are_read(
    family: Family, recipe: Recipe, count: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        recipe.check(family, draft_ids=LISTED[:count])


def test_plain_decoding_takes_any_list(family: Family) -> None:
    Vanilla().check(family, draft_ids=LISTED)


@pytest.mark.parametrize("recipe", RECIPES, ids=IDS)
def test_drawn_weights_draft_listed_tokens(tmp_path: Path, recipe: Recipe) -> None:
    made = write_random_family(tmp_path)
    parts = make_parts(made, draft_ids=torch.arange(0, VOCAB, 2))
    expected = decode(Vanilla(), parts, PROMPT)
    assert decode(recipe, parts, PROMPT) == expected
