"""Joins tiny checkpoints to schemes, as a cell does, without configs."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from methods.calibrate import load_calibrated
from methods.decode import generate
from methods.eagle2 import Eagle2
from methods.eagle3 import Eagle3
from methods.hierarchical import Hierarchical
from methods.recipe import Family, Parts, Recipe
from methods.transformer import Transformer
from methods.vanilla import Vanilla
from methods.verify import Greedy, Rule
from quant.dense import Dense
from quant.scheme import Scheme

TEXTS = [[3 + i % 90 for i in range(40)], [90 - i for i in range(40)]]
TREE = {"depth": 4, "top_k": 4, "nodes": 14}
RECIPES: dict[str, Recipe] = {
    "vanilla": Vanilla(),
    "eagle2": Eagle2(**TREE),
    "eagle3": Eagle3(**TREE),
    "chain": Hierarchical(min_draft=4, inner=Vanilla()),
    "hierarchical": Hierarchical(min_draft=5, inner=Eagle2(**TREE)),
}


def load(
    folder: Path,
    scheme: Scheme,
    dtype: torch.dtype = torch.float64,
    device: str | torch.device = "cpu",
    *,
    exact: bool = False,
) -> Transformer:
    return load_calibrated(
        folder,
        scheme=scheme,
        dense=Dense(),
        lm_head=Dense(),
        dtype=dtype,
        device=torch.device(device),
        texts=TEXTS,
        exact=exact,
    )


def make_parts(
    family: Family,
    *,
    scheme: Scheme | None = None,
    draft_scheme: Scheme | None = None,
    lm_head: Scheme | None = None,
    draft_ids: Tensor | None = None,
    rule: Rule | None = None,
    context: int = 200,
    target: Transformer | None = None,
) -> Parts:
    draft = draft_scheme or Dense()
    own = target or load(family.target, scheme or Dense())

    @cache
    def smaller(folder: Path) -> Transformer:
        return load(folder, draft, own.dtype, own.device)

    return Parts(
        target=own,
        family=family,
        rule=rule or Greedy(),
        context=context,
        scheme=draft,
        lm_head=lm_head,
        target_lm_head=Dense(),
        dense=Dense(),
        draft_ids=draft_ids,
        load=smaller,
    )


def decode(recipe: Recipe, parts: Parts, prompt: list[int]) -> list[int]:
    return generate(recipe.method(parts), prompt, limit=24, stop=lambda new: None).token_ids
