"""Resolved configurations -> checked cells -> blocks of cells that share a target.

Everything that can go wrong before compute goes wrong here: wrong keys and types, missing or
truncated checkpoints, data that is not there, results of another schema. What is well-formed but
does not fit, such as a model without a smaller one for a method that needs it, is a planned cell
with a `problem`: a sweep records it and goes on.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import DictConfig

from bench import check, hub, memory
from bench.block import Arm, Block, check_schema, is_finished
from bench.build import PACKAGES, named_node, target_modules, without
from bench.choice import Choice, choose
from bench.config import Config, as_dense, door_of, parse, resolve
from bench.identity import IRRELEVANT, WeightHashes, code_hash, config_hash, digest
from bench.kernel_check import check_kernels, check_layers
from bench.record import COST, QUALITY, VANILLA, Cell
from bench.replayed import check_levels
from bench.schemes import DRAFT_SCHEME, DRAFTING
from bench.task import Prompt, Task, load
from methods.checkpoint import Stored, stored_in
from methods.replay import MEASURED
from quant.scheme import Scheme

HASHES = ".hashes.json"  # of results_dir
DRAFTING_CHOICES = tuple(f"method.{key}" for key in DRAFTING)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A checked cell, before anything was hashed.

    tree: its resolved configuration, with models named as the user does. data: digest of its
    prompts or its text. folders, files: checkpoints, and what else is read: a list of tokens,
    calibration text. positions: of the model. asked: by the user, not only as a baseline.
    """

    choice: Choice
    tree: dict[str, Any]
    config: Config
    data: str
    positions: int
    folders: list[Path]
    files: list[Path]
    problem: str
    asked: bool
    stored: Stored

    @property
    def drafts(self) -> bool:
        """Whether it is more than the target's own cell."""
        return DRAFT_SCHEME in self.tree["method"]

    @property
    def folder(self) -> Path:
        """Where its records go."""
        return self.config.settings.folder / self.choice.cell


class Planner:
    """Collects cells, then makes blocks of them. module: the child that will run them."""

    def __init__(self, module: str, *, packages: tuple[str, ...] = PACKAGES) -> None:
        self.notes: list[str] = []  # what the user should know and need not act on
        self._module = module
        self._packages = packages
        self._cells: dict[Path, Planned] = {}
        self._known: dict[str, Any] = {}  # what was read or checked once
        self._pins: dict[str, str] = {}  # name of a model -> its name at the commit that is here

    def add(
        self, config: DictConfig, *, names: Mapping[str, str], overrides: Sequence[str]
    ) -> None:
        """Check a cell, and its baseline; ValueError where something is wrong with it."""
        tree = resolve(config)
        door = door_of(tree)
        choice = choose({**names, "task": COST} if door == COST else names, overrides)
        if door != QUALITY:  # a method is lossless: quality is the target's own
            self._add(self._plan(choice, tree, asked=True))
        if door == QUALITY or (tree["baseline"] and choice.names["method"] != VANILLA):
            plain = {**tree, "method": named_node("method", VANILLA, key="method")}
            choice = choice.less("method.", method=VANILLA)
            self._add(self._plan(choice, plain, asked=door == QUALITY))

    def blocks(self) -> list[Block]:
        """Hash what every cell reads, and group the cells; ValueError where none can run."""
        asked = [cell for cell in self._cells.values() if cell.asked]
        if asked and all(cell.problem for cell in asked):
            raise ValueError("; ".join(dict.fromkeys(cell.problem for cell in asked)))
        grouped: dict[tuple[str, str], list[Planned]] = defaultdict(list)
        for cell in self._cells.values():
            shared = digest(without(cell.tree, "method", *IRRELEVANT))
            grouped[str(cell.config.settings.folder), shared].append(cell)
        return [self._block(cells) for cells in grouped.values()]

    def _add(self, cell: Planned) -> None:
        other = self._cells.get(cell.folder)
        if other is None or (other.tree == cell.tree and cell.asked):
            self._cells[cell.folder] = cell
        elif other.tree != cell.tree:
            raise ValueError(f"two different cells would lie in {cell.folder}: give a campaign")

    def _plan(self, choice: Choice, tree: dict[str, Any], *, asked: bool) -> Planned:
        config = self._parse(tree)
        family, campaign = config.model.family, config.settings.folder
        self._once(f"campaign {campaign}", lambda: check_schema(campaign))
        context = config.settings.context
        positions = self._once(
            f"target {family.target} {context}", lambda: check.check_target(family.target, context)
        )
        choice = choice.reading(tree["model"]["target"])
        stored = self._stored(family.target, config.schemes.target, config.schemes.lm_head)
        if config.schemes.target.as_stored:  # several folders may be compared in one campaign
            choice = choice.less(quant=stored.label)
            if stored.scheme.as_stored:  # nothing is quantised: quant=dense, and its very cell
                return self._plan(choice, as_dense(tree), asked=asked)
        check_kernels(config)
        self._once(f"sandbox {config.runs_programs}", lambda: check.check_sandbox(config))
        check.check_random(config)
        if config.cost is not None:
            check.check_cost(config, positions)
        if config.quality is not None:
            check.check_quality(config, positions)
            data = self._once(f"text {digest(tree['task'])}", lambda: digest(config.text.read()))
        else:
            data = digest([asdict(prompt) for prompt in self._prompts(config.task)])
        folders, problem = [], ""
        try:
            folders = config.recipe.folders(family)
        except ValueError as error:
            problem = str(error)
        check.check_files(config, folders)
        if not problem:
            try:
                check.check_fit(config, folders)
                check_levels(config)
                check_layers(config, folders)
            except ValueError as error:
                problem = str(error)
        if not folders and not problem:  # nothing drafts, so nothing is drafted in a scheme
            choice = choice.less(*DRAFTING_CHOICES)
            tree = {**tree, "method": without(tree["method"], *DRAFTING)}
        return Planned(
            choice=choice,
            tree=tree,
            config=config,
            data=data,
            positions=positions,
            folders=[family.target, *folders, *check.references(config)],
            files=check.files_read(config, drafts=bool(folders)),
            problem=problem,
            asked=asked,
            stored=stored,
        )

    def _parse(self, tree: dict[str, Any]) -> Config:
        """Parse a cell, and bring here what it reads from the hub."""
        config = parse(tree, packages=self._packages)
        reads = [config.model.family.target]
        with suppress(ValueError):  # a family without a part: `_plan` makes it the cell's problem
            reads += config.recipe.folders(config.model.family)
        for key, name in hub.names(tree["model"]):
            if hub.place(name) in reads and name not in self._pins:
                self._pins[name] = hub.fetch(name, key=key)
        return parse(self._pinned(tree), packages=self._packages)

    def _pinned(self, tree: dict[str, Any]) -> dict[str, Any]:
        """The tree that a child reads: all arms get the same commits."""
        return {**tree, "model": hub.pinned(tree["model"], self._pins)}

    def _stored(self, folder: Path, scheme: Scheme, lm_head: Scheme) -> Stored:
        return self._once(
            f"stored {folder} {scheme} {lm_head}", lambda: stored_in(folder, scheme, lm_head)
        )

    def _block(self, cells: list[Planned]) -> Block:
        first = cells[0]
        plain = first.choice.less("method.", method=VANILLA).cell
        cells = sorted(cells, key=lambda cell: cell.choice.cell != plain)
        results_dir = Path(first.config.settings.results_dir).expanduser()
        hashes = WeightHashes(results_dir / HASHES)
        arms = tuple(self._fitted(self._arm(cell, hashes), cell) for cell in cells)
        hashes.save()
        for arm, cell in zip(arms, cells, strict=True):
            if not arm.problem and not is_finished(arm):
                self._check_data(cell)
        return Block(
            name=first.choice.block,
            results_dir=results_dir,
            campaign=first.config.settings.folder,
            arms=arms,
            baseline=plain if arms[0].name == plain else None,
        )

    def _arm(self, planned: Planned, hashes: WeightHashes) -> Arm:
        config, choice = planned.config, planned.choice
        settings = config.settings
        modules = sorted(target_modules(planned.tree))
        cell = Cell(
            door=door_of(planned.tree),
            model=choice.label("model"),
            weights=config.model.weights,
            scheme=planned.stored.label,
            lm_head=planned.stored.lm_head,
            draft_scheme=self._draft_label(planned),
            method=choice.less(*DRAFTING_CHOICES).label("method"),
            task=choice.label("task"),
            acceptance=config.accept.label if planned.drafts else MEASURED,
            block=choice.block,
            device=settings.device,
            dtype=settings.dtype,
            exact=settings.exact,
            temperature=settings.temperature,
            tie_threshold_nats=settings.tie_threshold(planned.stored.scheme),
            config_hash=config_hash(planned.tree, planned.data),
            code_hash=self._once(f"code {modules}", lambda: code_hash([self._module, *modules])),
            weight_hashes=hashes.of(planned.folders, planned.files),
            revisions=self._revisions(planned),
            folder=choice.folder,
            foreign=check.is_foreign(config, hashes),
            target_hash=hashes.one(config.model.family.target),
            stored=config.schemes.target.as_stored,
        )
        return Arm(
            folder=planned.folder,
            cell=cell,
            config=self._pinned(planned.tree),
            problem=planned.problem,
        )

    def _revisions(self, planned: Planned) -> list[str]:
        """Hub ids, at their commits, of the folders that a cell reads."""
        pins = filter(hub.is_id, set(self._pins.values()))
        return sorted(pin for pin in pins if hub.place(pin) in planned.folders)

    def _draft_label(self, planned: Planned) -> str:
        """The drafter's scheme, that of its own lm_head and what cuts that, where they are."""
        if not planned.drafts:
            return ""
        schemes, small = planned.config.schemes, planned.config.model.family.small
        draft, lm_head = schemes.draft.label, schemes.draft_lm_head
        if schemes.draft.as_stored and small is not None and small.target in planned.folders:
            draft = self._stored(small.target, schemes.draft, lm_head or schemes.dense).label
        head = "" if lm_head is None else f"+lm_head:{lm_head.label}"
        return draft + head + planned.config.draft_vocab.label

    def _check_data(self, cell: Planned) -> None:
        """Check the prompts or the text by the tokenizer; costs take what there is of a text."""
        target = cell.config.model.family.target
        if cell.config.cost is not None:
            return
        if cell.config.quality is not None:
            self._once(f"text {cell.data} {target}", lambda: check.check_text(cell.config))
            return
        task, prompts = cell.config.task, self._prompts(cell.config.task)
        context = cell.config.settings.context or cell.positions
        lengths = self._once(
            f"prompts {digest(cell.tree['task'])} {target}",
            lambda: check.prompt_lengths(task, target, prompts),
        )
        if too_long := check.check_prompts(task, lengths, context):
            self._note(
                f"task {task.name}: {too_long} of {len(prompts)} prompts are too long for the "
                f"context of {context}; they are recorded as too_long"
            )
        longest = min(max(lengths) + task.max_new_tokens, context)
        for note in check.beyond_heads(cell.folders[1:], longest):
            self._note(note)

    def _fitted(self, arm: Arm, planned: Planned) -> Arm:
        """Make it the problem of an arm, where it is yet to run, that its device is too small."""
        config, device = planned.config, planned.config.settings.device
        if arm.problem or arm.cell.door == QUALITY or is_finished(arm):
            return arm
        have = self._once(f"memory {device}", lambda: memory.available(device))
        problem = memory.misfit(config, planned.folders[1:], planned.positions, have=have)
        return replace(arm, problem=problem)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _prompts(self, task: Task) -> list[Prompt]:
        return self._once(f"task {digest(asdict(task))}", lambda: load(task))

    def _once(self, name: str, make: Callable[[], T]) -> T:
        if name not in self._known:
            self._known[name] = make()
        known: T = self._known[name]
        return known
