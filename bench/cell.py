"""Child of `specquant run`: loads a target once and decodes a task with several arms in turn.

Every prompt is a round through all arms; the order turns around each round and then rotates
(A B C, C B A, B C A, A C B, ...), so that a ratio of two arms compares neighbours in time and a
drift of the machine cancels. A round is written when it is whole; on resume a round into whose
writing a kill fell is run again by all arms.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NoReturn

from tqdm import tqdm

from bench.acceptance import attempt, broken, drafting
from bench.answers import keep, read_answers, whole_prompts
from bench.build import PACKAGES
from bench.child import ArmJob, Child, run_child
from bench.config import Config, parse
from bench.context import note_graphs, note_start, run_name, write_context
from bench.load import Loader, context_of
from bench.lossless import divergence, ending
from bench.record import RECORDS, Generation, append_line
from bench.rounds import interleaved, torn_round
from bench.score import judge, not_scored
from bench.task import Prompt, Stopper, cut, encode, load
from bench.timer import Stopwatch, Timer, Timing
from methods.decode import Method, Output, generate
from methods.graph import GRAPHS


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One method of the block, with the answers of the current round and of its past."""

    job: ArmJob
    config: Config
    method: Method
    whole: set[str]  # prompts whose turns are all recorded
    round: list[Generation] = field(default_factory=list)

    @property
    def records(self) -> Path:
        """Its file of generations."""
        return Path(self.job.folder, RECORDS)


def seed_of(seed: int, prompt_id: str, turn: int) -> int:
    """Seed of one generation; the same for every arm."""
    name = f"{seed}/{prompt_id}/{turn}".encode()
    return int.from_bytes(hashlib.sha256(name).digest()[:7], "big")


def work(child: Child, packages: tuple[str, ...] = PACKAGES) -> None:
    """Bring every arm of the job to an end, or leave at the first that fails."""
    jobs = child.job.arms
    watch = child.watch()
    child.announce(None, "loading the target")
    with child.charged(jobs, building=True):
        configs = [parse(job.config, packages=packages) for job in jobs]
        first = configs[0]
        loader = Loader(first, mark=watch.mark)
        prompts = load(first.task)
    arms = []
    for job, config in zip(jobs, configs, strict=True):
        child.announce(job, "building")
        with child.charged([job], building=True):
            write_context(Path(job.folder), loader.context(child.job.argv, config))
            method = loader.method(config)
            whole = whole_prompts(Path(job.folder, RECORDS), prompts)
            arms.append(Arm(job=job, config=config, method=method, whole=whole))
    watch.mark("building")
    Block(child, loader, arms, prompts, watch).run()


class Block:
    """Arms that are ready, and the prompts that they go through together."""

    def __init__(
        self,
        child: Child,
        loader: Loader,
        arms: list[Arm],
        prompts: list[Prompt],
        watch: Stopwatch,
    ) -> None:
        """watch: runs since the process began; it is read at the first timed token."""
        self.child = child
        self.loader = loader
        self.arms = arms
        self.prompts = prompts
        self.timer = Timer(loader.device)
        self.watch: Stopwatch | None = watch
        self.task = arms[0].config.task
        self.score = arms[0].config.score
        self.settings = arms[0].config.settings
        self.context = context_of(self.settings, loader.target)
        # Replayed tokens are nobody's choice: there is nothing to compare them with.
        self.vanilla = _vanilla("" if arms[0].config.replays else child.job.baseline, arms)
        self.run_name = run_name()

    def run(self) -> None:
        """Run what every arm lacks, together where they lack the same, then end them."""
        torn = torn_round([arm.whole for arm in self.arms])
        for arm in self.arms:
            arm.whole.difference_update(torn)
            keep(arm.records, arm.whole)
        if any(len(arm.whole) < len(self.prompts) for arm in self.arms):
            self._warm_up()
        with self._bar(done=sum(len(arm.whole) for arm in self.arms)) as bar:
            for number, prompt in enumerate(self.prompts):
                arms = [arm for arm in self.arms if prompt.prompt_id not in arm.whole]
                if arms:
                    self._round(interleaved(arms, number), number, prompt, bar)
        for arm in self.arms:
            self.child.end(arm.job, ending(arm.config, read_answers(arm.records)))

    def _bar(self, *, done: int) -> "tqdm[NoReturn]":
        return tqdm(
            desc=self.child.job.name,
            total=len(self.prompts) * len(self.arms),
            initial=done,
            position=1,
            leave=False,
            disable=not self.child.job.progress,
        )

    def _round(self, order: list[Arm], number: int, prompt: Prompt, bar: "tqdm[NoReturn]") -> None:
        for turn in range(len(prompt.turns)):
            for place, arm in enumerate(order):
                bar.set_description(
                    f"{self.child.job.name}: prompt {number + 1}/{len(self.prompts)}, "
                    f"arm {arm.job.label}"
                )
                self.child.announce(arm.job, f"{prompt.prompt_id} turn {turn}")
                with self.child.charged([arm.job], building=False):
                    arm.round.append(self._answer(arm, prompt, turn, place))
            for arm in order:
                self.child.announce(arm.job, f"{prompt.prompt_id} turn {turn}, beside vanilla")
                with self.child.charged([arm.job], building=False):
                    self._compare(arm, prompt)
        self._score(order, prompt)
        for arm in order:
            for generation in arm.round:
                append_line(arm.records, generation)
            arm.round.clear()
            bar.update()

    def _answer(self, arm: Arm, prompt: Prompt, turn: int, place: int) -> Generation:
        tokens = self._encode(prompt, arm.round)
        answer = Generation(
            prompt_id=prompt.prompt_id,
            turn=turn,
            category=prompt.category,
            status="too_long",
            prompt_tokens=len(tokens),
            arm_order=place,
            run=self.run_name,
        )
        if not self._fits(tokens):
            return answer
        known, missed = GRAPHS.captured, GRAPHS.missed
        arm.method.expect([len(tokens)])  # how long a later turn's prompt is depends on answers
        if GRAPHS.captured > known:
            note_graphs(Path(arm.job.folder), GRAPHS.captured, GRAPHS.reserved_bytes)
        if self.watch is not None:
            self.watch.mark("warm_up")
        self.timer.start()
        output = generate(
            arm.method,
            tokens,
            limit=self.task.max_new_tokens,
            stop=Stopper(self.loader.tokenizer, self.task),
            seed=seed_of(self.settings.seed, prompt.prompt_id, turn),
            mark=self.timer.mark,
        )
        timing = self.timer.stop()
        self._started(timing)
        return replace(
            answer,
            status="ok",
            token_ids=output.token_ids,
            text=cut(output.token_ids, self.loader.tokenizer, self.task).text,
            stop="stop" if output.stopped else "limit",
            accepted=output.accepted,
            drafted=output.drafted,
            stage_s=timing.stage_s,
            wall_s=timing.wall_s,
            uncaptured=GRAPHS.missed - missed,
        )

    def _started(self, timing: Timing) -> None:
        """Note in every arm's cell, once, where the time to the first timed token went."""
        if self.watch is not None:
            self.watch.add("first_token", timing.first_end_s["commit"])
            for arm in self.arms:
                note_start(Path(arm.job.folder), self.watch.stage_s)
            self.watch = None

    def _compare(self, arm: Arm, prompt: Prompt) -> None:
        """Note where the newest answer leaves vanilla's to the same tokens."""
        mine, turn = arm.round[-1], arm.round[-1].turn
        vanilla = self.vanilla(prompt.prompt_id)
        if len(vanilla) <= turn or "too_long" in (mine.status, vanilla[turn].status):
            return
        tokens = self._encode(prompt, arm.round[:-1])
        if tokens == self._encode(prompt, vanilla[:turn]):
            gap = divergence(
                self.loader.target,
                tokens,
                mine.token_ids,
                vanilla[turn].token_ids,
                rule=self.settings.rule,
                seed=seed_of(self.settings.seed, prompt.prompt_id, turn),
            )
            arm.round[-1] = replace(mine, divergence=gap)

    def _score(self, order: Sequence[Arm], prompt: Prompt) -> None:
        """Judge the round's answers, after all of its timing; the same text once."""
        score = cache(
            lambda text: judge(self.task.scorer, text, prompt.reference, execute=self.score.execute)
        )
        for arm in order:
            self.child.announce(arm.job, f"{prompt.prompt_id}, scoring")
            with self.child.charged([arm.job], building=False):
                arm.round[:] = [
                    replace(answer, **vars(score(self.task.answer_prefix + answer.text)))
                    if answer.status == "ok"
                    else replace(answer, **vars(not_scored(answer.status)))
                    for answer in arm.round
                ]

    def _warm_up(self) -> None:
        """Let every arm decode a little, off the record: allocators, kernels, caches."""
        fitting = [t for t in (self._encode(p, []) for p in self.prompts) if self._fits(t)]
        for arm in self.arms:
            self.child.announce(arm.job, "warm-up")
            with self.child.charged([arm.job], building=False):
                arm.method.warm_up()
                arm.method.expect([len(tokens) for tokens in fitting])
                if self.watch is not None:
                    self.watch.mark("captures")
                note_graphs(Path(arm.job.folder), GRAPHS.captured, GRAPHS.reserved_bytes)
                limit = min(self.settings.warmup_tokens, self.task.max_new_tokens)
                tried = [
                    attempt(arm.method, tokens, limit)
                    for tokens in fitting[: self.settings.warmup_prompts]
                ]
                problem = self._broken(arm, fitting, tried)
            with self.child.charged([arm.job], building=True):
                if problem:
                    raise ValueError(problem)

    def _broken(self, arm: Arm, fitting: Sequence[list[int]], tried: Sequence[Output]) -> str:
        """Say whether an arm drafts in vain, by what it was tried on and more if need be."""
        problems = (
            broken(
                method,
                fitting,
                tried=tried if method is arm.method else [],
                limit=self.task.max_new_tokens,
                floor=arm.config.acceptance_floor,
                target=family.target,
            )
            for method, family in drafting(arm.method, self.loader.model.family)
        )
        return next(filter(None, problems), "")

    def _encode(self, prompt: Prompt, answers: Sequence[Generation]) -> list[int]:
        return encode(self.loader.tokenizer, self.task, prompt, [a.text for a in answers])

    def _fits(self, tokens: list[int]) -> bool:
        return len(tokens) + self.task.max_new_tokens <= self.context


def _vanilla(folder: str, arms: Sequence[Arm]) -> Callable[[str], Sequence[Generation]]:
    """Where the baseline's answers to a prompt are: in this round, or in its finished cell."""
    stored = defaultdict(list)
    for generation in read_answers(Path(folder, RECORDS)) if folder else []:
        stored[generation.prompt_id].append(generation)
    own = next((arm.round for arm in arms if arm.job.folder == folder), [])
    return lambda prompt_id: own or stored.get(prompt_id, [])


def main() -> None:
    """Run as `python -m bench.cell <block.json>`."""
    run_child(work)


if __name__ == "__main__":
    main()
