"""The answers that a cell has recorded so far, round by round."""

from collections import defaultdict
from pathlib import Path

from bench.record import Generation, read_lines, write_lines
from bench.task import Prompt


def whole_prompts(records: Path, prompts: list[Prompt]) -> set[str]:
    """Prompts all of whose turns are recorded."""
    turns: dict[str, int] = defaultdict(int)
    for generation in read_answers(records):
        turns[generation.prompt_id] += 1
    return {p.prompt_id for p in prompts if turns[p.prompt_id] == len(p.turns)}


def keep(records: Path, whole: set[str]) -> None:
    """Drop the records of rounds that are to be run again, and half a line at the end."""
    if records.exists():
        write_lines(records, [g for g in read_answers(records) if g.prompt_id in whole])


def read_answers(records: Path) -> list[Generation]:
    """All that is recorded, but for half a line at the end."""
    if not records.exists():
        return []
    return [Generation.parse(values) for values in read_lines(records, torn_tail=True)]
