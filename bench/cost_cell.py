"""Child of `specquant cost`: loads a target once and times it and its drafters in turn.

One context at a time, every case of every arm is repeated in one shuffled order. The vanilla arm
stands for the target itself: what it reads n tokens for. Energy is measured once the last context
has been timed, since that heats the device.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path

import torch
from tqdm import tqdm

from bench.build import PACKAGES
from bench.child import ArmJob, Child, run_child
from bench.config import Config, Costing, parse
from bench.context import note_start
from bench.energy import Counter, counter_of
from bench.load import Loader
from bench.measure import Case, draft_case, measure, verify_cases, with_energy
from bench.record import CONTEXT, RECORDS, Cost, Status, write_json, write_lines
from bench.task import encode, load
from bench.timer import Stopwatch
from methods.decode import Method
from methods.vanilla import Vanilla


def work(
    child: Child,
    packages: tuple[str, ...] = PACKAGES,
    find: Callable[[torch.device], Counter] = counter_of,
) -> None:
    """Bring every arm of the job to an end, or leave at the first that fails.

    find: gives what counts a device's energy, where that is asked for.
    """
    jobs = child.job.arms
    watch = child.watch()
    child.announce(None, "loading the target")
    with child.charged(jobs, building=True):
        configs = [parse(job.config, packages=packages) for job in jobs]
        first = configs[0]
        assert first.cost is not None
        loader = Loader(first, mark=watch.mark)
        counter = find(loader.device) if first.cost.hold_s else None
        tokens = text_tokens(first, loader, max(first.cost.contexts))
    arms = []
    for job, config in zip(jobs, configs, strict=True):
        child.announce(job, "building")
        with child.charged([job], building=True):
            write_json(Path(job.folder) / CONTEXT, loader.context(child.job.argv, config))
            own = None if isinstance(config.recipe, Vanilla) else loader.method(config)
            arms.append((job, own))
    watch.mark("building")
    bench = _Bench(
        child=child,
        loader=loader,
        arms=arms,
        tokens=tokens,
        cost=first.cost,
        seed=first.settings.seed,
    )
    owners, taken = bench.measured(counter, watch)
    for job in jobs:
        own_costs = [
            cost
            for costs in taken.values()
            for owner, cost in zip(owners, costs, strict=True)
            if owner is job
        ]
        write_lines(Path(job.folder) / RECORDS, own_costs)
        child.end(job, Status(state="done"))


def text_tokens(config: Config, loader: Loader, count: int) -> list[int]:
    """Take `count` tokens from the task's prompts, over and over where they do not suffice."""
    prompts = load(config.task)
    stream = chain.from_iterable(
        encode(loader.tokenizer, config.task, prompt, []) for prompt in cycle(prompts)
    )
    return list(islice(stream, count))


@dataclass(frozen=True, kw_only=True)
class _Bench:
    """Makes and measures what every arm is asked for.

    arms: with their methods; None stands for the target itself.
    """

    child: Child
    loader: Loader
    arms: list[tuple[ArmJob, Method | None]]
    tokens: list[int]
    cost: Costing
    seed: int

    def measured(
        self, counter: Counter | None, watch: Stopwatch
    ) -> tuple[list[ArmJob], dict[int, list[Cost]]]:
        """Time all at every context, then hold it where there is a counter.

        Gives the arm of every record, and the records of every context in that order.
        """
        job, cost, device = self.child.job, self.cost, self.loader.device
        taken: dict[int, list[Cost]] = {}
        for length in tqdm(cost.contexts, desc=job.name, disable=not job.progress):
            made = self.cases(length)
            if not taken:  # the first timing comes next
                watch.mark("captures")
                for arm in job.arms:
                    note_start(Path(arm.folder), watch.stage_s)
            self.child.announce(None, f"timing at context {length}")
            with self.child.charged(job.arms, building=False):
                taken[length] = measure(
                    [case for _, case in made],
                    repeats=cost.repeats,
                    warmup=cost.warmup,
                    seed=self.seed,
                    device=device,
                )
        owners = [owner for owner, _ in made]
        if counter is not None:
            del made  # its caches: what is held makes its own
            self._hold(counter, taken)
        return owners, taken

    def _hold(self, counter: Counter, taken: dict[int, list[Cost]]) -> None:
        """Add energy to what was taken; a hold that fails is its arm's result."""
        for length, costs in taken.items():
            for place, (job, case) in enumerate(self.cases(length)):
                self.child.announce(job, f"holding at context {length}")
                with self.child.charged([job], building=False):
                    costs[place] = with_energy(
                        case,
                        costs[place],
                        counter=counter,
                        hold_s=self.cost.hold_s,
                        device=self.loader.device,
                    )

    def cases(self, length: int) -> list[tuple[ArmJob, Case]]:
        """Prepare what is timed at one context; whatever fails is its arm's result."""
        text = self.tokens[:length]
        cases = []
        for job, method in self.arms:
            self.child.announce(job, f"warm-up at context {length}")
            with self.child.charged([job], building=False):
                for case in self._of(method, text):
                    case.run()  # what fails, fails here, under its own arm
                    cases.append((job, case))
        return cases

    def _of(self, method: Method | None, text: list[int]) -> Iterator[Case]:
        cost = self.cost
        if method is not None:
            yield draft_case(method, text, steps=cost.repeats, stride=cost.catch_up)
            return
        yield from verify_cases(
            self.loader.target,
            text,
            context=len(text),
            widths=cost.widths,
            batches=cost.batches,
            seed=self.seed,
        )


def main() -> None:
    """Run as `python -m bench.cost_cell <block.json>`."""
    run_child(work)


if __name__ == "__main__":
    main()
