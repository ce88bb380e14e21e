"""Door: look at everything that a run would trip over, and whether a drafter works at all.

    specquant check model=llama3_8b_instruct method=eagle2 task=mt_bench
    specquant check -m quant=dense,w4a16 method=eagle2,eagle3

`python -m bench.preflight` does the same. One line a check, `ok`, `warn` or `FAIL`; exit code 1
where one fails. What files alone can tell is looked at before every cell of a run as well; the last
three checks read the models.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from omegaconf import DictConfig

from bench import check, memory
from bench.acceptance import (
    PROMPTS,
    TOKENS,
    acceptance_of,
    attempt,
    broken,
    drafting,
    top1_agreement,
)
from bench.choice import choose
from bench.config import Config, parse, resolve
from bench.door import OK, UNFINISHED, collect
from bench.kernel_check import check_kernels, check_layers, passed_over
from bench.replayed import check_levels
from bench.task import encode, load
from methods.checkpoint import check_transformer, stored_in
from methods.decode import Method
from methods.hierarchical import Hierarchical
from methods.random_weights import is_random
from methods.recipe import Family, Parts, Recipe
from methods.rotation import is_norm_folded, read_rotation
from methods.tree_recipe import TreeRecipe
from methods.weights import Weights

PASSED, WARNED, FAILED = "ok", "warn", "FAIL"
# How often a quantised head's first choice must be that of its dense self. The lab's EAGLE-2 head
# agrees at 95 % of places in fp8, 72 % in w4a16-g128 and below 50 % with one 4-bit scale per
# channel, where its acceptance length is 3.0, against 5.1 in fp8: a loss to know of. What agrees as
# seldom as another head would did not survive.
LEAST_AGREEMENT, GOOD_AGREEMENT = 0.1, 0.5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    state: str
    what: str
    detail: str


class Preflight:
    """The cells that the command line asks for."""

    def __init__(self) -> None:
        self.cells: dict[str, Config] = {}

    def add(
        self, config: DictConfig, *, names: Mapping[str, str], overrides: Sequence[str]
    ) -> None:
        """Take a cell; ValueError where its keys or values are wrong."""
        config_of = parse(tree := resolve(config))
        self.cells[choose(names, overrides).reading(tree["model"]["target"]).cell] = config_of


def report(preflight: Preflight) -> int:
    """Print what every check of every cell finds; give the exit code."""
    failed = False
    for name, config in preflight.cells.items():
        sys.stdout.write(f"{name}\n")
        for found in inspect(config):
            failed = failed or found.state == FAILED
            sys.stdout.write(f"  {found.state:<4} {found.what}: {found.detail}\n")
            sys.stdout.flush()
    return UNFINISHED if failed else OK


def inspect(config: Config) -> Iterator[Finding]:
    """Check one cell; what reads the models only where nothing failed before."""
    failed = False
    for found in _files(config):
        failed = failed or found.state == FAILED
        yield found
    if not failed:
        yield from _models(config)


def _files(config: Config) -> Iterator[Finding]:
    family, schemes, settings = config.model.family, config.schemes, config.settings
    positions = 0

    def target() -> str:
        nonlocal positions
        positions = check.check_target(family.target, settings.context)
        stored = stored_in(family.target, schemes.target, schemes.lm_head)
        vocab = check_transformer(family.target).vocab_size
        return f"{stored.label}, {vocab} tokens, {positions} positions"

    yield (found := _tried("target", target))
    if found.state == FAILED:
        return
    yield _tried("weights", lambda: _origin(config))
    folders: list[Path] = []
    yield _tried("kernels", lambda: _kernels(config))

    def method() -> str:
        folders.extend(config.recipe.folders(family))
        check.check_files(config, folders)
        check.check_method(config, folders)
        names = ", ".join(folder.name for folder in folders) or "nothing besides the target"
        facts = config.draft_vocab.facts(family.target) if folders else None
        listed = "" if facts is None else f", {facts['size']} of {facts['of']} tokens to draft"
        return f"names, shapes, vocabulary, feature layers and rotation of {names}{listed}"

    yield (found := _tried("method", method))
    if found.state == FAILED:
        return

    def tokenizer() -> str:
        check.check_fit(config, folders)
        return "every model of the method has the target's vocabulary"

    yield _tried("layers", lambda: _layers(config, folders))
    yield _tried("tokenizer", tokenizer)
    for note in check.other_special_ids(folders, family.target):
        yield Finding(state=WARNED, what="special tokens", detail=note)
    yield _rotation(config)
    yield _tried(
        "calibration",
        lambda: (
            "text is there" if check.check_calibration(config, drafts=bool(folders)) else "none"
        ),
    )
    yield from _prompts(config, folders, settings.context or positions)
    yield _tried("memory", lambda: _memory(config, folders, positions))


def _kernels(config: Config) -> str:
    check_kernels(config)
    own, device = config.schemes, config.settings.device
    told = f"{own.target.kernel} for the target, {own.draft.kernel} for what drafts"
    if torch.device(device).type != "cuda":
        return told
    return "; ".join([told, *passed_over(config)])


def _layers(config: Config, folders: Sequence[Path]) -> str:
    check_layers(config, folders)
    return "every shape fits its scheme and the kernel that is named"


def _origin(config: Config) -> str:
    """Tell where weights and acceptance come from."""
    check.check_random(config)
    check_levels(config)
    doubt = " (but nothing shows that the target is the lab's)" if check.is_foreign(config) else ""
    return f"{config.model.weights}{doubt}, acceptance {config.accept.label}"


def _rotation(config: Config) -> Finding:
    """Tell what is known of the target's rotation; the method has checked that its head fits."""
    target = config.model.family.target
    if is_random(target):
        return Finding(state=PASSED, what="rotation", detail="not rotated, weights are random")
    if read_rotation(target) is not None:
        return Finding(state=PASSED, what="rotation", detail="rotated, stock heads absorb it")
    if not is_norm_folded(Weights(target)):
        return Finding(state=PASSED, what="rotation", detail="not rotated, the final norm weighs")
    detail = (
        "the final norm is all ones and nothing says by what the target was rotated, if it was: "
        "a stock head would draft in vain"
    )
    return Finding(state=WARNED, what="rotation", detail=detail)


def _prompts(config: Config, folders: Sequence[Path], context: int) -> Iterator[Finding]:
    task, target = config.task, config.model.family.target
    lengths: list[int] = []

    def prompts() -> str:
        lengths.extend(check.prompt_lengths(task, target, load(task)))
        too_long = check.check_prompts(task, lengths, context)
        return f"{len(lengths) - too_long} of {len(lengths)} fit into the context of {context}"

    yield (found := _tried("prompts", prompts))
    if found.state == PASSED:
        longest = min(max(lengths) + task.max_new_tokens, context)
        for note in check.beyond_heads(folders, longest):
            yield Finding(state=WARNED, what="positions", detail=note)


def _memory(config: Config, folders: Sequence[Path], positions: int) -> str:
    have = memory.available(config.settings.device)
    if problem := memory.misfit(config, folders, positions, have=have):
        raise ValueError(problem.removeprefix("memory: "))
    total = memory.needed(config, folders, positions).total
    there = "an unknown amount" if have is None else memory.gib(have)
    return f"{memory.gib(total)} are needed at least, {there} is there"


def _models(config: Config) -> Iterator[Finding]:
    """Load what a run would, and try it on a few prompts."""
    from bench.load import Loader, context_of  # transformers takes seconds

    made: list[tuple[Loader, Method]] = []

    def loading() -> str:
        loader = Loader(config)
        made.append((loader, loader.method(config)))
        return f"{memory.gib(loader.target.weight_bytes)} are read for each token of the target"

    yield (found := _tried("loading", loading))
    if found.state == FAILED:
        return
    ((loader, method),) = made
    context = context_of(config.settings, loader.target)
    texts = (encode(loader.tokenizer, config.task, prompt, []) for prompt in load(config.task))
    room = context - config.task.max_new_tokens
    prompts = list(islice((text for text in texts if len(text) <= room), PROMPTS))
    yield _survival(config, loader.parts(config), prompts)
    for own, family in drafting(method, config.model.family):
        yield _tried("acceptance", partial(_acceptance, config, own, family, prompts))


def _survival(config: Config, parts: Parts, prompts: Sequence[list[int]]) -> Finding:
    """Compare a head in the drafter's scheme with its dense self."""
    what = "quantised head"
    found = _head(config.recipe, parts)
    if found is None or found[1].scheme.label == found[1].dense.label:
        return Finding(state=PASSED, what=what, detail="there is none")
    recipe, own = found
    agreed = top1_agreement(
        recipe.head(own), recipe.head(own.with_scheme(own.dense)), own.target, prompts
    )
    state = WARNED if agreed < GOOD_AGREEMENT else PASSED
    return Finding(
        state=FAILED if agreed < LEAST_AGREEMENT else state,
        what=what,
        detail=f"in {own.scheme.label} its first choice is that of the dense head at {agreed:.1%}",
    )


def _head(recipe: Recipe, parts: Parts) -> tuple[TreeRecipe, Parts] | None:
    """The method that has a draft head, and what it is made from."""
    if isinstance(recipe, TreeRecipe):
        return recipe, parts
    if isinstance(recipe, Hierarchical):
        return _head(recipe.inner, parts.smaller(ahead=0))
    return None


def _acceptance(config: Config, method: Method, family: Family, prompts: list[list[int]]) -> str:
    limit = config.task.max_new_tokens
    outputs = [attempt(method, prompt, min(limit, TOKENS)) for prompt in prompts]
    if problem := broken(
        method,
        [],
        tried=outputs,
        limit=limit,
        floor=config.acceptance_floor,
        target=family.target,
    ):
        raise ValueError(problem)
    found = acceptance_of(outputs)
    return (
        f"length {found.length:.2f} over {found.steps} steps of {len(outputs)} prompts, drafting "
        f"for {family.target.name}"
    )


def _tried(what: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(state=PASSED, what=what, detail=look())
    except ValueError as error:
        return Finding(state=FAILED, what=what, detail=str(error))


def main() -> int:
    """Check what the command line asks for; give the exit code."""
    return collect("check", Preflight, finish=report)


if __name__ == "__main__":
    sys.exit(main())
