"""Child of `specquant cost`: loads a target once and times it and its drafters in turn.

One context at a time, every case of every arm is repeated in one shuffled order. The vanilla arm
stands for the target itself: what it reads n tokens for.
"""

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, cycle, islice
from pathlib import Path

from tqdm import tqdm

from bench.build import PACKAGES
from bench.child import ArmJob, Child, run_child
from bench.config import Config, Costing, parse
from bench.context import note_start
from bench.load import Loader
from bench.measure import Case, draft_case, measure, verify_cases
from bench.record import CONTEXT, RECORDS, Cost, Status, write_json, write_lines
from bench.task import encode, load
from methods.decode import Method
from methods.vanilla import Vanilla


def work(child: Child, packages: tuple[str, ...] = PACKAGES) -> None:
    """Bring every arm of the job to an end, or leave at the first that fails."""
    jobs = child.job.arms
    watch = child.watch()
    child.announce(None, "loading the target")
    with child.charged(jobs, building=True):
        configs = [parse(job.config, packages=packages) for job in jobs]
        first = configs[0]
        assert first.cost is not None
        seed = first.settings.seed
        loader = Loader(first, mark=watch.mark)
        tokens = text_tokens(first, loader, max(first.cost.contexts))
        plain = Vanilla().method(loader.parts(first))
    arms = []
    for job, config in zip(jobs, configs, strict=True):
        child.announce(job, "building")
        with child.charged([job], building=True):
            write_json(Path(job.folder) / CONTEXT, loader.context(child.job.argv, config))
            own = None if isinstance(config.recipe, Vanilla) else loader.method(config)
            arms.append((job, own))
    watch.mark("building")
    records: dict[str, list[Cost]] = defaultdict(list)
    for length in tqdm(first.cost.contexts, desc=child.job.name, disable=not child.job.progress):
        text = _own_text(plain, tokens[:length], own=first.cost.repeats * first.cost.catch_up)
        cases = _cases(child, loader, arms, text, first.cost, seed)
        if not records:  # the first timing comes next
            watch.mark("captures")
            for job, _ in arms:
                note_start(Path(job.folder), watch.stage_s)
        child.announce(None, f"timing at context {length}")
        with child.charged(jobs, building=False):
            taken = measure(
                [case for _, case in cases],
                repeats=first.cost.repeats,
                warmup=first.cost.warmup,
                seed=seed,
                device=loader.device,
            )
        for (job, _), record in zip(cases, taken, strict=True):
            records[job.folder].append(record)
    for job, _ in arms:
        write_lines(Path(job.folder) / RECORDS, records[job.folder])
        child.end(job, Status(state="done"))


def text_tokens(config: Config, loader: Loader, count: int) -> list[int]:
    """Take `count` tokens from the task's prompts, over and over where they do not suffice."""
    prompts = load(config.task)
    stream = chain.from_iterable(
        encode(loader.tokenizer, config.task, prompt, []) for prompt in cycle(prompts)
    )
    return list(islice(stream, count))


def _own_text(plain: Method, tokens: list[int], *, own: int) -> list[int]:
    """Put the target's own choice in place of a text's last `own` tokens, as decoding would."""
    state = plain.prefill(tokens[: len(tokens) - own])
    while len(state.tokens) < len(tokens):
        state = plain.step(state)
    return state.tokens


def _cases(
    child: Child,
    loader: Loader,
    arms: list[tuple[ArmJob, Method | None]],
    tokens: list[int],
    cost: Costing,
    seed: int,
) -> list[tuple[ArmJob, Case]]:
    """Prepare what every arm times at one context; whatever fails is that arm's result."""

    def prepare(method: Method | None) -> Iterator[Case]:
        if method is not None:
            yield draft_case(method, tokens, steps=cost.repeats, stride=cost.catch_up)
            return
        yield from verify_cases(
            loader.target,
            tokens,
            context=len(tokens),
            widths=cost.widths,
            batches=cost.batches,
            seed=seed,
        )

    cases = []
    for job, method in arms:
        child.announce(job, f"warm-up at context {len(tokens)}")
        with child.charged([job], building=False):
            for case in prepare(method):
                case.run()  # what fails, fails here, under its own arm
                cases.append((job, case))
    return cases


def main() -> None:
    """Run as `python -m bench.cost_cell <block.json>`."""
    run_child(work)


if __name__ == "__main__":
    main()
