import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from methods.decode import Method, Output, generate
from methods.drafter import Mark, State, unmarked
from methods.eagle2 import Eagle2
from methods.eagle3 import Eagle3
from methods.expansion import Expansion
from methods.fused import prune
from methods.hierarchical import Hierarchical, HierarchicalDrafter
from methods.recipe import Family, Parts, Recipe
from methods.transformer import Transformer
from methods.tree import Tree
from methods.tree_recipe import TreeRecipe
from methods.vanilla import Vanilla
from tests.family import VOCAB, llama_config, write_eagle2, write_eagle3, write_llama
from tests.methods.eagle_oracle import Oracle
from tests.methods.parts import make_parts
from tests.methods.scripted import HandsOn

PROMPT = [0, 5, 17, 23, 42, 8, 61]
RECIPES = [
    Eagle2(depth=3, top_k=4, nodes=14),
    Eagle3(depth=3, top_k=4, nodes=14),
    Eagle2(depth=1, top_k=5, nodes=4),
    Eagle2(depth=5, top_k=2, nodes=11),
]


def paths(tree: Tree) -> set[tuple[int, ...]]:
    """The tokens below the root, for every node but the root."""
    return {tuple(tree.tokens[tree.mask[i]].tolist())[1:] for i in range(1, len(tree))}


def oracle_of(recipe: TreeRecipe, family: Family, model: Transformer) -> Oracle:
    folder = recipe.folders(family)[0]
    return Oracle(
        config=json.loads((folder / "config.json").read_text(encoding="utf-8")),
        tensors=load_file(folder / "model.safetensors"),
        embedding=model.embedding,
        lm_head=model.lm_head.dequantize().double(),
        eagle3=isinstance(recipe, Eagle3),
    )


def features_of(model: Transformer, tokens: list[int], taps: tuple[int, ...]) -> Tensor:
    kv = model.cache(len(tokens))
    return model(torch.tensor([tokens]), torch.arange(len(tokens)), kv, taps=taps).features[0]


class Checked(HandsOn):
    """Hands on a tree drafter's proposals after comparing each with the oracle's tree."""

    def __init__(self, recipe: TreeRecipe, parts: Parts) -> None:
        self.recipe = recipe
        self.model = parts.target
        self.inner = recipe.drafter(parts)
        self.oracle = oracle_of(recipe, parts.family, parts.target)
        self.compared = self.bare = 0

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        tree = self.inner.propose(state, mark)
        if len(tree) == 1:
            self.bare += 1
            return tree
        features = features_of(self.model, state.tokens[:-1], self.taps)
        r = self.recipe
        expected = self.oracle.tree(
            features, state.tokens, depth=r.depth, top_k=r.top_k, nodes=r.nodes
        )
        assert paths(tree) == set(expected)
        self.compared += 1
        return tree


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_every_proposal_is_the_tree_that_a_head_without_caches_grows(
    family: Family, recipe: TreeRecipe
) -> None:
    parts = make_parts(family)
    checked = Checked(recipe, parts)
    method = Method(parts.target, checked, parts.rule, context=100)
    state = method.prefill(PROMPT)
    for _ in range(8):
        state = method.step(state)
    assert checked.compared == 8


@pytest.mark.parametrize("recipe", RECIPES[:2], ids=str)
def test_after_any_rollback_the_inner_head_drafts_as_if_it_had_never_erred(
    family: Family, recipe: TreeRecipe
) -> None:
    """The target's verdicts are played here: rejections at every place, and full acceptance."""
    parts = make_parts(family).smaller(ahead=64)
    checked = Checked(recipe, parts)
    drafter = HierarchicalDrafter(
        Method(parts.target, checked, parts.rule, context=150), min_draft=5
    )
    tokens = list(PROMPT)
    state = State(tokens=tokens, kept=0, features=torch.empty(0, 0), seed=0)
    drafter.begin(state)
    accepted_whole = 0
    for verdict in [0, 5, 1, 4, 99, 2, 99, 99, 3, 0, 0]:
        tree = drafter.propose(State(tokens=tokens, kept=0, features=state.features, seed=0))
        drafts = tree.tokens[1:].tolist()
        assert len(drafts) >= 5
        accepted_whole += verdict >= len(drafts)
        stands = drafts[:verdict]
        bonus = (drafts[verdict] + 1) % VOCAB if verdict < len(drafts) else 33
        tokens = [*tokens, *stands, bonus]
    assert checked.compared > 11
    assert accepted_whole >= 3
    assert checked.bare == accepted_whole  # each time one inner step reads two tokens at once


def test_the_best_nodes_are_kept_with_their_parents() -> None:
    tokens, parents = prune(
        torch.tensor([9]),
        Expansion(
            tokens=torch.tensor([1, 2, 3, 4, 5, 6]),
            parents=torch.tensor([-1, -1, 0, 0, 1, 2]),
            scores=torch.tensor([-1.0, -2.0, -1.5, -9.0, -3.0, -1.6]),
        ),
        keep=4,
    )
    assert tokens.tolist() == [9, 1, 2, 3, 6]
    assert parents.tolist() == [-1, 0, 0, 1, 3]


def test_a_child_as_good_as_its_parent_never_loses_it() -> None:
    tokens, _ = prune(
        torch.tensor([9]),
        Expansion(
            tokens=torch.tensor([1, 2, 3, 4]),
            parents=torch.tensor([-1, -1, 0, 1]),
            scores=torch.zeros(4),
        ),
        keep=2,
    )
    assert tokens.tolist() == [9, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"depth": 0, "top_k": 4, "nodes": 5}, "depth must be 1 to 64, got 0"),
        ({"depth": 3, "top_k": 0, "nodes": 5}, "top_k must be at least 1, got 0"),
        ({"depth": 2, "top_k": 2, "nodes": 8}, "nodes must be 2 to 7 at depth=2 and top_k=2"),
        ({"depth": 2, "top_k": 2, "nodes": 1}, "nodes must be 2 to 7"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Eagle2(**settings)


def test_trees_are_not_limited_to_64_nodes(family: Family) -> None:
    parts = make_parts(family)
    drafter = Eagle2(depth=4, top_k=12, nodes=150).drafter(parts)
    features = features_of(parts.target, PROMPT[:-1], drafter.taps)
    tree = drafter.propose(State(tokens=PROMPT, kept=0, features=features, seed=0))
    assert len(tree) == 150
    assert int(tree.depths.max()) > 1


def test_top_k_beyond_the_heads_vocabulary_is_refused_before_weights_are_read(
    family: Family,
) -> None:
    Eagle2(depth=1, top_k=VOCAB, nodes=5).check(family)
    with pytest.raises(ValueError, match="top_k must be within the head's vocabulary of 96"):
        Eagle2(depth=1, top_k=VOCAB + 1, nodes=5).check(family)
    with pytest.raises(ValueError, match="top_k must be within the head's vocabulary of 48"):
        Eagle3(depth=1, top_k=VOCAB // 2 + 1, nodes=5).check(family)


@pytest.mark.parametrize(
    ("recipe", "write"), [(RECIPES[0], write_eagle2), (RECIPES[1], write_eagle3)]
)
def test_a_head_of_another_vocabulary_is_refused(
    tmp_path: Path, family: Family, recipe: TreeRecipe, write: object
) -> None:
    assert callable(write)
    name = recipe.folders(family)[0].name.split("-")[1]
    alien = write(tmp_path / "head", llama_config(vocab_size=100), 1)
    with pytest.raises(ValueError, match="vocab_size must be the target's 96, got 100"):
        recipe.check(Family(target=family.target, heads={name: alien}))


def test_a_family_without_the_head_is_told_which_it_has(family: Family) -> None:
    own = {"eagle2": family.head("eagle2")}
    told = r"must have an eagle3 head, given by {}\.heads\.eagle3, got \['eagle2'\]"
    with pytest.raises(ValueError, match=told.format("model")):
        Eagle3(depth=1, top_k=1, nodes=2).check(Family(target=family.target, heads=own))
    with pytest.raises(ValueError, match=told.format("model.small")):
        Eagle3(depth=1, top_k=1, nodes=2).check(
            Family(target=family.target, heads=own, key="model.small")
        )


def test_a_smaller_model_of_another_vocabulary_is_refused(tmp_path: Path, family: Family) -> None:
    alien = write_llama(tmp_path / "alien", llama_config(vocab_size=100), 1)
    recipe = Hierarchical(min_draft=2, inner=RECIPES[0])
    with pytest.raises(ValueError, match="vocab_size must be the target's 96, got 100"):
        recipe.check(Family(target=family.target, small=Family(target=alien)))


@pytest.mark.parametrize(
    "recipe",
    [*RECIPES[:2], Hierarchical(min_draft=4, inner=RECIPES[0])],
    ids=["eagle2", "eagle3", "hierarchical"],
)
def test_a_prompt_of_many_chunks_reads_as_one_of_a_single_chunk(
    family: Family, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = [3 + (7 * i) % 90 for i in range(40)]

    def run() -> Output:
        method = recipe.method(make_parts(family))
        return generate(method, prompt, limit=20, stop=lambda new: None)

    whole = run()
    monkeypatch.setattr("methods.prefill.PREFILL_CHUNK", 7)
    assert run() == whole


def test_drafts_fit_where_prompt_and_limit_fill_the_context(family: Family) -> None:
    recipe = Hierarchical(min_draft=30, inner=RECIPES[0])
    plain = Vanilla().method(make_parts(family, context=27))
    expected = generate(plain, PROMPT, limit=20, stop=lambda new: None).token_ids
    method = recipe.method(make_parts(family, context=27))
    assert generate(method, PROMPT, limit=20, stop=lambda new: None).token_ids == expected


@pytest.mark.parametrize(
    "recipe",
    [Eagle2(depth=3, top_k=4, nodes=14), Hierarchical(min_draft=5, inner=Vanilla())],
    ids=["eagle2", "chain"],
)
def test_drafts_may_reach_beyond_the_last_position_of_a_full_context(
    family: Family, recipe: Recipe
) -> None:
    parts = make_parts(family, context=256)  # all positions of the tiny models
    prompt = [(7 * i) % VOCAB for i in range(226)]
    expected = generate(Vanilla().method(parts), prompt, limit=30, stop=lambda _: None)
    found = generate(recipe.method(parts), prompt, limit=30, stop=lambda _: None)
    assert found.token_ids == expected.token_ids
