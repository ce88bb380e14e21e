import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.decode import Method
from methods.drafter import Drafter, Mark, State, unmarked
from methods.eagle2 import Eagle2
from methods.eagle3 import Eagle3
from methods.recipe import Family, Recipe
from methods.rotation import read_rotation
from methods.tree import Tree
from methods.tree_recipe import TreeRecipe
from methods.vanilla import Vanilla
from quant.scheme import Scheme
from quant.w8a8 import W8A8
from tests.family import VOCAB, llama_config, write_checkpoint
from tests.methods.parts import make_parts
from tests.methods.published import noise
from tests.methods.scripted import HandsOn

PROMPT = [0, 5, 17, 23, 42, 8, 61]
STEPS = 8
RECIPES = [Eagle2(depth=3, top_k=4, nodes=14), Eagle3(depth=3, top_k=4, nodes=14)]
NAMES = ["eagle2", "eagle3"]
BOTH = list(zip(RECIPES, NAMES, strict=True))


def random_rotation(size: int) -> Tensor:
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(3)).double()
    return torch.linalg.qr(matrix).Q


def rotated(target: Path, folder: Path) -> Path:
    """Fold every norm into what reads it and turn the residual stream; the output stays."""
    w = {k: v.double() for k, v in load_file(target / "model.safetensors").items()}
    q = random_rotation(w["model.norm.weight"].numel())
    out = {"model.embed_tokens.weight": w["model.embed_tokens.weight"] @ q}
    norms = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}
    for name, weight in w.items():
        layer, _, part = (
            name.rpartition(".self_attn.") if "self_attn" in name else (name.rpartition(".mlp."))
        )
        if part.startswith(("o_proj", "down_proj")):
            out[name] = q.T @ weight
        elif layer:
            norm = norms["self_attn" if "self_attn" in name else "mlp"]
            out[name] = (weight * w[f"{layer}.{norm}.weight"]) @ q
        elif "norm" in name:
            out[name] = torch.ones_like(weight)
    out["lm_head.weight"] = (w["lm_head.weight"] * w["model.norm.weight"]) @ q
    write_checkpoint(folder, llama_config(), out)
    save_file(
        {"rotation": q.float().contiguous(), "norm": w["model.norm.weight"].float()},
        folder / "rotation.safetensors",
    )
    return folder


@pytest.fixture(scope="module")
def turned(family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family's target, rotated."""
    return rotated(family.target, tmp_path_factory.mktemp("rotated") / "target")


class Noted(HandsOn):
    """Hands on a drafter's trees and keeps them: the path to each node, in order."""

    def __init__(self, inner: Drafter) -> None:
        self.inner = inner
        self.trees: list[list[list[int]]] = []

    def propose(self, state: State, mark: Mark = unmarked) -> Tree:
        tree = self.inner.propose(state, mark)
        self.trees.append([tree.tokens[row].tolist() for row in tree.mask])
        return tree


def decode(
    recipe: Recipe, family: Family, scheme: Scheme | None = None
) -> tuple[list[int], list[list[list[int]]]]:
    """The tokens of some steps, and every tree that was proposed."""
    parts = make_parts(family, draft_scheme=scheme)
    noted = Noted(recipe.drafter(parts))
    method = Method(parts.target, noted, parts.rule, context=100)
    state = method.prefill(PROMPT)
    for _ in range(STEPS):
        state = method.step(state)
    return state.tokens, noted.trees


def with_head(family: Family, name: str, target: Path, head: Path | None = None) -> Family:
    return Family(target=target, heads={name: head or family.head(name)})


def edited(folder: Path, to: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a head's folder with other tensors."""
    shutil.copytree(folder, to)
    tensors = load_file(to / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, to / "model.safetensors")
    return to


def test_a_rotated_target_gives_the_tokens_of_before(family: Family, turned: Path) -> None:
    assert decode(Vanilla(), Family(target=turned)) == decode(Vanilla(), family)


@pytest.mark.parametrize(("recipe", "name"), BOTH, ids=NAMES)
def test_a_stock_head_proposes_the_trees_of_before(
    family: Family, turned: Path, recipe: TreeRecipe, name: str
) -> None:
    assert decode(recipe, with_head(family, name, turned)) == decode(recipe, family)


@pytest.mark.parametrize(("recipe", "name"), BOTH, ids=NAMES)
def test_without_the_rotation_it_would_propose_others(
    family: Family, turned: Path, tmp_path: Path, recipe: TreeRecipe, name: str
) -> None:
    bare = shutil.copytree(turned, tmp_path / "bare")
    (bare / "rotation.safetensors").unlink()
    assert decode(recipe, with_head(family, name, bare))[1] != decode(recipe, family)[1]


@pytest.mark.parametrize(("recipe", "name"), BOTH, ids=NAMES)
def test_a_copy_of_the_embedding_of_before_is_known_as_one(
    family: Family, turned: Path, tmp_path: Path, recipe: TreeRecipe, name: str
) -> None:
    original = load_file(family.target / "model.safetensors")["model.embed_tokens.weight"]
    head = edited(
        family.head(name),
        tmp_path / "head",
        lambda t: t.update({"embed_tokens.weight": original}),
    )
    over = with_head(family, name, turned, head)
    parts = make_parts(over)
    assert recipe.head(parts).embedding is parts.target.embedding
    assert decode(recipe, over) == decode(recipe, family)


@pytest.mark.parametrize(("recipe", "name"), BOTH, ids=NAMES)
def test_an_embedding_of_its_own_is_not_turned(
    family: Family, turned: Path, tmp_path: Path, recipe: TreeRecipe, name: str
) -> None:
    own = {"embed_tokens.weight": noise(VOCAB, 128)}
    head = edited(family.head(name), tmp_path / "head", lambda t: t.update(own))
    plain = decode(recipe, with_head(family, name, family.target, head))
    assert decode(recipe, with_head(family, name, turned, head)) == plain
    assert plain[1] != decode(recipe, family)[1]


def test_a_head_made_for_the_rotation_proposes_the_trees_of_before(
    family: Family, turned: Path, tmp_path: Path
) -> None:
    """The form of arXiv 2505.22179: a product, and embedding and lm_head as they were."""
    original = load_file(family.target / "model.safetensors")
    turn = random_rotation(128) * original["model.norm.weight"].double()[:, None]

    def convert(tensors: dict[str, Tensor]) -> None:
        # the published product: weight [out, in] = diag(norm) Q
        tensors["rms_norm_rotation.weight"] = turn
        tensors["embed_tokens.weight"] = original["model.embed_tokens.weight"]
        tensors["lm_head.weight"] = original["lm_head.weight"]

    head = edited(family.head("eagle2"), tmp_path / "head", convert)
    over = with_head(family, "eagle2", turned, head)
    RECIPES[0].check(over)
    assert decode(RECIPES[0], over) == decode(RECIPES[0], family)


def test_a_head_made_for_another_rotation_is_refused(
    family: Family, turned: Path, tmp_path: Path
) -> None:
    def convert(tensors: dict[str, Tensor]) -> None:
        tensors["rms_norm_rotation.weight"] = noise(128, 128)
        tensors["embed_tokens.weight"] = noise(VOCAB, 128)
        tensors["lm_head.weight"] = noise(VOCAB, 128)

    head = edited(family.head("eagle2"), tmp_path / "head", convert)
    with pytest.raises(ValueError, match=r"rms_norm_rotation\.weight must be the rotation of"):
        RECIPES[0].check(with_head(family, "eagle2", turned, head))


@pytest.mark.parametrize(("recipe", "name"), BOTH, ids=NAMES)
def test_what_absorbed_a_rotation_can_be_quantised(
    family: Family, turned: Path, recipe: TreeRecipe, name: str
) -> None:
    tokens, _ = decode(recipe, with_head(family, name, turned), W8A8(smooth_alpha=None))
    plain, _ = decode(recipe, family)
    shared = min(len(tokens), len(plain))
    assert tokens[:shared] == plain[:shared]


def spoilt(turned: Path, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(turned, folder)
    path = folder / "rotation.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["rotation"].mul_(1.01), "rotation must be orthogonal"),
        (lambda t: t["rotation"][5].zero_(), "rotation must be orthogonal"),
        (lambda t: t["norm"][5:6].zero_(), "norm must be finite and nowhere zero"),
        (lambda t: t.update(norm=torch.ones(64)), r"\[128, 128\] and \[64\]"),
        (lambda t: t.pop("norm"), "must hold norm and rotation, got rotation"),
    ],
)
def test_a_broken_rotation_is_refused(
    turned: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    folder = spoilt(turned, tmp_path / "spoilt", change)
    with pytest.raises(ValueError, match=message):
        read_rotation(folder)


def test_a_rotation_beside_a_norm_that_still_weighs_is_refused(
    family: Family, turned: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(family.target, tmp_path / "target")
    shutil.copyfile(turned / "rotation.safetensors", folder / "rotation.safetensors")
    for recipe in RECIPES:
        with pytest.raises(ValueError, match=r"model\.norm\.weight must be all ones"):
            recipe.check(Family(target=folder, heads=family.heads))
