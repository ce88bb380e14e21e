"""A resolved configuration as typed objects: settings, model, schemes, method, task.

The same tree of plain values is checked by the parent before any compute, hashed, written to
config.yaml, and read again by the child that computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path, PurePath
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from bench import hub
from bench.build import PACKAGES, ROOT, as_mapping, build, named_node, typed, without
from bench.draft_vocab import DraftVocab, parse_draft_vocab
from bench.machine import check_machine
from bench.record import COST, QUALITY, RUN
from bench.schemes import DENSE, DRAFT_LM_HEAD, DRAFTING, LM_HEAD, NAMED, Schemes, parse_schemes
from bench.score import Scoring
from bench.source import Source
from bench.task import Task
from bench.text import Evaluation, Text
from methods.recipe import Family, Recipe
from methods.replay import Acceptance, AcceptanceProfile
from methods.verify import Greedy, Rule, Sampled
from quant.scheme import Scheme

LAB, RANDOM = "lab", "random"
WEIGHTS = (LAB, "checkpoint", RANDOM)


# Keys of conf/base.yaml that have a least value.
LEAST = (("temperature", 0), ("warmup_prompts", 0), ("warmup_tokens", 1), ("acceptance_floor", 0))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of conf/run.yaml that are not groups; their meaning is written there."""

    campaign: str
    results_dir: str
    device: str
    dtype: str
    exact: bool
    temperature: float
    seed: int
    context: int | None
    warmup_prompts: int
    warmup_tokens: int
    acceptance_floor: float
    threads: int | None
    tie_threshold_nats: dict[str, float]
    baseline: bool

    def __post_init__(self) -> None:
        place = PurePath(self.campaign)
        if place.is_absolute() or not place.parts or ".." in place.parts:
            raise ValueError(f"campaign must be a folder of results_dir, got {self.campaign!r}")
        check_machine(device=self.device, dtype=self.dtype, threads=self.threads)
        for name, least in LEAST:
            if not getattr(self, name) >= least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.context is not None and self.context < 1:
            raise ValueError(f"context must be 1 or more, or null, got {self.context}")

    @property
    def folder(self) -> Path:
        """Where the campaign's cells lie."""
        return Path(self.results_dir).expanduser() / self.campaign

    def tie_threshold(self, scheme: Scheme) -> float:
        """How near two logits of a target in this scheme are a tie, in nats."""
        kinds = [self.dtype, *filter(None, [scheme.activation_format])]
        if missing := [kind for kind in kinds if kind not in self.tie_threshold_nats]:
            raise ValueError(f"tie_threshold_nats must have {missing[0]}")
        return max(self.tie_threshold_nats[kind] for kind in kinds)

    @property
    def rule(self) -> Rule:
        """Greedy at temperature 0."""
        return Sampled(temperature=self.temperature) if self.temperature else Greedy()


@dataclass(frozen=True, kw_only=True)
class Costing:
    """What the cost door times; the keys of `cost` in conf/cost.yaml."""

    widths: list[int]
    contexts: list[int]
    batches: list[int]
    repeats: int
    warmup: int
    catch_up: int
    hold_s: float

    def __post_init__(self) -> None:
        for name in ("widths", "contexts", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1 or len(set(values)) < len(values):
                raise ValueError(f"{name} must be distinct numbers from 1 on, got {values}")
        for name, least in (("repeats", 2), ("warmup", 0), ("catch_up", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if self.hold_s and not 0.5 <= self.hold_s <= 60:  # nan too: the counter moves each 0.1 s
            raise ValueError(f"hold_s must be 0, or 0.5 to 60, got {self.hold_s}")
        if min(self.contexts) <= (walked := self.repeats * self.catch_up):
            raise ValueError(
                f"contexts must be above repeats x catch_up = {walked}, got {min(self.contexts)}"
            )


@dataclass(frozen=True, kw_only=True)
class Folders:
    """A family as conf/model has it: folders, relative to the checkout, or hub ids."""

    target: str
    heads: dict[str, str]
    small: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What else conf/model has. weights: of WEIGHTS. calibration: JSONL with `text`."""

    weights: str
    calibration: str | None

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")


@dataclass(frozen=True, kw_only=True)
class Model:
    """Where the weights are. calibration: text that schemes may look at activations on."""

    weights: str
    family: Family
    calibration: Path | None


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that a cell is made from. cost, quality: of a cell of that door."""

    settings: Settings
    model: Model
    schemes: Schemes
    draft_vocab: DraftVocab
    recipe: Recipe
    accept: Acceptance
    source: Task | Text
    score: Scoring
    cost: Costing | None
    quality: Evaluation | None

    @property
    def task(self) -> Task:
        """The prompts, of a cell of the run or the cost door."""
        assert isinstance(self.source, Task)
        return self.source

    @property
    def text(self) -> Text:
        """The running text, of a cell of the quality door."""
        assert isinstance(self.source, Text)
        return self.source

    @property
    def rule(self) -> Rule:
        """What decides which drafts stand."""
        return self.accept.rule(self.settings.rule)

    @property
    def replays(self) -> bool:
        """Whether acceptance is drawn from a profile, so that tokens mean nothing."""
        return isinstance(self.accept, AcceptanceProfile)

    @property
    def draft_ids(self) -> Tensor | None:
        """Tokens that a draft head may propose; None = all. ValueError where it cannot be so."""
        return self.draft_vocab.ids(self.model.family.target)

    @property
    def acceptance_floor(self) -> float:
        """What a head must exceed; nothing where tokens mean nothing."""
        unjudged = self.replays or self.model.weights == RANDOM
        return 0.0 if unjudged else self.settings.acceptance_floor

    @property
    def reference(self) -> Path:
        """Folder of the dense model that a target is held against."""
        own = None if self.quality is None else self.quality.reference
        return self.model.family.target if own is None else _place(own)

    @property
    def runs_programs(self) -> bool:
        """Whether programs that the model wrote will run."""
        decodes = isinstance(self.source, Task) and self.cost is None
        return decodes and self.score.execute and self.task.scorer.executes


def plain_tree(config: DictConfig) -> dict[str, Any]:
    """Give a composed configuration as plain values; ValueError where one is missing."""
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ValueError(str(error).splitlines()[0]) from error
    return as_mapping(tree, "the configuration")


def resolve(config: DictConfig) -> dict[str, Any]:
    """Give a composed configuration with the content of every scheme that it names."""
    tree = plain_tree(config)
    tree.pop("experiment", None)
    for node, key in NAMED:
        values = tree[node] = as_mapping(tree.get(node), node)
        name = values.get(key)
        if name is not None or key != DRAFT_LM_HEAD:
            values[key] = named_node("quant", name, key=f"{node}.{key}")
    return tree


def as_dense(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Copy a resolved tree with the target of quant=dense."""
    return {
        **tree,
        "quant": named_node("quant", DENSE, key="quant") | {LM_HEAD: tree["quant"][LM_HEAD]},
    }


def parse(tree: Mapping[str, Any], *, packages: tuple[str, ...] = PACKAGES) -> Config:
    """Build everything from a resolved tree, or raise ValueError with the key's full name."""
    groups = ("model", "quant", "method", "task", "accept", "score", COST, QUALITY)
    settings = {key: value for key, value in tree.items() if key not in groups}
    method = without(tree["method"], *DRAFTING)
    model = parse_model(tree["model"])
    schemes = parse_schemes(tree["quant"], tree["method"])
    return Config(
        settings=typed(settings, Settings, key=""),
        model=model,
        schemes=schemes.unsearched if model.weights == RANDOM else schemes,
        draft_vocab=parse_draft_vocab(tree["method"]),
        recipe=_recipe(method, packages),
        accept=build(tree["accept"], Acceptance, key="accept"),  # type: ignore[type-abstract]
        source=_source(tree["task"], door_of(tree)),
        score=typed(tree["score"], Scoring, key="score"),
        cost=typed(tree[COST], Costing, key=COST) if COST in tree else None,
        quality=typed(tree[QUALITY], Evaluation, key=QUALITY) if QUALITY in tree else None,
    )


def door_of(tree: Mapping[str, Any]) -> str:
    """Which door a resolved tree was composed for."""
    return next((door for door in (COST, QUALITY) if door in tree), RUN)


def parse_model(node: object) -> Model:
    """Build a model from its node, every path made absolute; downloads nothing."""
    values = as_mapping(node, "model")
    own = {f.name for f in fields(Origin)}
    origin = typed({k: v for k, v in values.items() if k in own}, Origin, key="model")
    folders = {k: v for k, v in values.items() if k not in own}
    return Model(
        weights=origin.weights,
        family=_family(folders, "model"),
        calibration=None if origin.calibration is None else _place(origin.calibration),
    )


def _source(node: object, door: str) -> Task | Text:
    source = build(node, Source, key="task")
    if door == QUALITY and not isinstance(source, Text):
        raise ValueError(f"task must be a running text, such as perplexity, got {source.name}")
    if door != QUALITY and not isinstance(source, Task):
        raise ValueError(f"task must have prompts, got {source.name}, a text for specquant quality")
    assert isinstance(source, Task | Text)
    return source


def _recipe(node: object, packages: tuple[str, ...]) -> Recipe:
    return build(node, Recipe, key="method", packages=packages)  # type: ignore[type-abstract]


def _family(node: object, key: str) -> Family:
    folders = typed(node, Folders, key=key)
    return Family(
        target=hub.place(folders.target),
        heads={head: hub.place(name) for head, name in folders.heads.items()},
        small=None if folders.small is None else _family(folders.small, f"{key}.small"),
        key=key,
    )


def _place(path: str) -> Path:
    return ROOT / Path(path).expanduser()
