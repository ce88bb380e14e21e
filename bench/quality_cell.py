"""Child of `specquant quality`: loads a target, and the dense model, and scores a text by both.

A window is written when it is scored; a resumed cell goes on with those that are missing.
"""

from pathlib import Path

from tqdm import tqdm

from bench.build import PACKAGES
from bench.child import ArmJob, Child, run_child
from bench.config import parse
from bench.context import write_context
from bench.likelihood import Reader, score
from bench.load import Loader
from bench.record import RECORDS, Quality, Status, append_line, read_lines, write_lines
from bench.text import encode, windows


def work(child: Child, packages: tuple[str, ...] = PACKAGES) -> None:
    """Bring every arm of the job to an end, or leave at the first that fails."""
    for job in child.job.arms:
        _score(child, job, packages)


def _score(child: Child, job: ArmJob, packages: tuple[str, ...]) -> None:
    child.announce(job, "loading the target")
    with child.charged([job], building=True):
        config = parse(job.config, packages=packages)
        evaluation = config.quality
        assert evaluation is not None
        loader = Loader(config)
        target = dense = Reader(loader.target, window=evaluation.window)
        if evaluation.kl and (plain := loader.dense(config.reference)) is not loader.target:
            dense = Reader(plain, window=evaluation.window)
        tokens = encode(loader.tokenizer, config.text)[: evaluation.limit]
        write_context(Path(job.folder), loader.context(child.job.argv, config))
        done = _keep(Path(job.folder, RECORDS))
    left = [w for w in windows(len(tokens), evaluation) if w.number not in done]
    child.announce(job, "scoring")
    with child.charged([job], building=False):
        for window in tqdm(left, desc=child.job.name, disable=not child.job.progress):
            record = score(window, tokens, target, dense if evaluation.kl else None)
            append_line(Path(job.folder, RECORDS), record)
    child.end(job, Status(state="done"))


def _keep(records: Path) -> set[int]:
    """Drop a line that a kill has torn; give the numbers of the windows that are recorded."""
    if not records.exists():
        return set()
    kept = [Quality.parse(values) for values in read_lines(records, torn_tail=True)]
    write_lines(records, kept)
    return {record.window for record in kept}


def main() -> None:
    """Run as `python -m bench.quality_cell <block.json>`."""
    run_child(work)


if __name__ == "__main__":
    main()
