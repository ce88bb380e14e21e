"""Whether a replay can be what it says, and whether it gave what it was asked for."""

import math
import statistics
from collections.abc import Sequence

from bench.config import Config
from bench.record import Generation
from methods.hierarchical import Hierarchical
from methods.recipe import Recipe
from methods.replay import Acceptance, AcceptanceProfile
from methods.vanilla import Vanilla

# A right replay fails this once in 16,000 cells.
STANDARD_ERRORS = 4.0
LEAST_STEPS = 30  # below, the spread of the steps is a guess itself


def check_levels(config: Config) -> None:
    """Check that a profile says what decides in every model that is drafted for."""
    _check(config.accept, config.recipe)


def _check(accept: Acceptance, recipe: Recipe) -> None:
    if not isinstance(accept, AcceptanceProfile) or not isinstance(recipe, Hierarchical):
        return
    if isinstance(recipe.inner, Vanilla):
        return
    if not isinstance(accept.small, AcceptanceProfile):
        raise ValueError(
            f"accept.small must be a profile where a smaller model is drafted for, got "
            f"{accept.small.label} in {accept.name}"
        )
    _check(accept.small, recipe.inner)


def missed(accept: Acceptance, generations: Sequence[Generation]) -> str:
    """Say by how much a replay missed the tokens per step that it was to give; else nothing."""
    if not isinstance(accept, AcceptanceProfile) or accept.tau is None:
        return ""
    steps = [
        1 + kept
        for g in generations
        for kept, drafted in zip(g.accepted, g.drafted, strict=True)
        if drafted
    ]
    if len(steps) < LEAST_STEPS:
        return ""
    got = statistics.fmean(steps)
    reach = STANDARD_ERRORS * statistics.stdev(steps) / math.sqrt(len(steps))
    if abs(got - accept.tau) <= reach:
        return ""
    return (
        f"replay: tokens per step must be {accept.tau:g} as {accept.name} says, got {got:.3f} +- "
        f"{reach:.3f} ({STANDARD_ERRORS:g} standard errors, {len(steps)} steps): its trees' first "
        "branches are too short for it, or the profile is another tree's"
    )
