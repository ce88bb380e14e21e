"""Greedy speculation gives plain decoding's tokens: every yaml of conf/method, every of conf/quant.

In float64, where no rounding can move a tie, without exception. New yamls join by themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
from omegaconf import OmegaConf

from bench.build import ROOT, build
from methods.recipe import Family, Parts, Recipe
from methods.vanilla import Vanilla
from quant.scheme import Scheme
from tests.methods.parts import decode, make_parts

SCHEMES = sorted(p.stem for p in (ROOT / "conf" / "quant").glob("*.yaml"))
METHODS = sorted(p.stem for p in (ROOT / "conf" / "method").glob("*.yaml"))
PROMPTS = [[0, 5, 17, 23, 42, 8], [0, 88, 12, 12, 60]]
# Keys of a method's yaml that name schemes of its models, not settings of its own.
SCHEME_KEYS = ("draft_scheme", "draft_lm_head")


def read(group: str, name: str) -> dict[str, object]:
    node = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / group / f"{name}.yaml"))
    assert isinstance(node, dict)
    return {str(k): v for k, v in node.items() if k not in SCHEME_KEYS}


@dataclass
class Baseline:
    """Models in one scheme, and what plain decoding makes of the prompts."""

    parts: Parts
    expected: list[list[int]]


@pytest.fixture(scope="module")
def baseline(family: Family) -> Callable[[str], Baseline]:
    @cache
    def make(scheme: str) -> Baseline:
        built = build(read("quant", scheme), Scheme, key="quant")  # type: ignore[type-abstract]
        # Heads cannot be calibrated yet, so such a scheme serves the target alone.
        draft = None if built.needs_absmax else built
        parts = make_parts(family, scheme=built, draft_scheme=draft)
        return Baseline(parts, [decode(Vanilla(), parts, p) for p in PROMPTS])

    return make


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", METHODS)
def test_greedy_tokens_equal_plain_decodings(
    family: Family, baseline: Callable[[str], Baseline], name: str, scheme: str
) -> None:
    recipe = build(read("method", name), Recipe, key="method")  # type: ignore[type-abstract]
    recipe.check(family)
    base = baseline(scheme)
    assert [decode(recipe, base.parts, p) for p in PROMPTS] == base.expected
