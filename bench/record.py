"""What a run leaves behind: one JSON line per generation, timing or window, facts with units.

Nothing derived is stored: ratios, means and intervals are made when a report is made. A results
folder of a campaign holds one folder per cell:

    results/<campaign>/<cell>/config.yaml     the resolved configuration
    results/<campaign>/<cell>/cell.json       labels and identity (`Cell`)
    results/<campaign>/<cell>/context.json    machine, versions, commit and diff state
    results/<campaign>/<cell>/records.jsonl   `Generation`, `Cost` or `Quality` lines
    results/<campaign>/<cell>/status.json     `Status`, written last: its existence means ended
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from methods.values import parse_json

SCHEMA = 1

# The files of a cell's folder.
CONFIG, CELL, CONTEXT = "config.yaml", "cell.json", "context.json"
RECORDS, STATUS = "records.jsonl", "status.json"

# What a cell was measured by; the latter two are also the nodes that their yamls add.
RUN, COST, QUALITY = "run", "cost", "quality"
DOORS = (RUN, COST, QUALITY)

VANILLA = "vanilla"  # the method that every other is compared with

# Stages of a generation, in the order in which they happen. `draft_prefill` is the drafter's own
# reading of the prompt; it is charged to the method. `stop` is the task's look at the text, the
# same for all; it is charged to none.
STAGES = ("prefill", "draft_prefill", "host", "draft", "verify", "commit", "stop")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A value that stands in a JSON file: checks its schema and its fields when it is read."""

    schema: int = SCHEMA

    @classmethod
    def parse(cls, values: dict[str, Any]) -> Self:
        """Make a record from a JSON object, or raise ValueError naming what is off."""
        if values.get("schema") != SCHEMA:
            raise ValueError(f"schema must be {SCHEMA}, got {values.get('schema')!r}")
        known = {f.name for f in fields(cls)}
        if unknown := values.keys() - known:
            raise ValueError(f"{cls.__name__} has no field {sorted(unknown)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"{cls.__name__}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Generation(Record):
    """One prompt (one turn of it) decoded by one arm.

    accepted: drafts kept in each step, bonus not included; vanilla has a 0 per token. Tokens
    emitted are sum(accepted) + len(accepted), less what was cut at the stop token or limit.
    drafted: drafts proposed in each step. stage_s: seconds of every occurrence of each stage.
    """

    prompt_id: str
    turn: int
    category: str
    status: str  # ok | too_long (prompt and limit exceed the context: nothing was run)
    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)  # after the cut
    text: str = ""
    stop: str = ""  # limit | stop
    accepted: list[int] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)
    stage_s: dict[str, list[float]] = field(default_factory=dict)
    wall_s: float = 0.0  # begin to last commit, by one clock outside all stages
    arm_order: int = 0  # place of this arm among the block's arms in this round
    uncaptured: int = 0  # device calls that no CUDA graph had been captured for; 0 on a CPU
    run: str = ""  # of the process that decoded it: arms of one run are neighbours in time
    # First difference from vanilla of the same block, where there is one.
    divergence: dict[str, float] | None = None  # index, token, vanilla_token, gap_nats
    correct: bool | None = None  # None: not scored
    answer: str = ""  # what was compared with the reference, or the program that was run
    scored: str = ""  # the rule that judged, or why none did (`no: ...`); empty in older records
    reason: str = ""  # why a program did not pass
    sandbox: str = ""  # what a program was shut in by


@dataclass(frozen=True, kw_only=True)
class Cost(Record):
    """Repeated timings of one forward: a verification of n tokens, or a drafter's proposal.

    what: `verify` (the target reads a tree of n nodes) or `draft` (a drafter proposes a tree of
    n nodes with `forwards` forwards of its own model). energy_mj, held_ms: of one, repeated back to
    back for a while after all were timed; sm_mhz, power_capped: meanwhile. None where nothing was
    held.
    """

    what: str
    n: int
    context: int
    batch: int
    forwards: int
    repeat_s: list[float]
    weight_bytes: int  # read by all forwards together, from storage
    kv_bytes: int  # of the cache that was read
    flops: int
    energy_mj: float | None = None  # by the driver's counter
    held_ms: float | None = None
    sm_mhz: int | None = None
    power_capped: bool | None = None  # whether the power cap held the clock down


@dataclass(frozen=True, kw_only=True)
class Quality(Record):
    """One window of a text, read by a target and by the dense model beside it.

    start: its first token's place in the text. context: tokens read before the first scored one.
    Sums go over the scored tokens; None where there was no dense model.
    """

    window: int
    start: int
    context: int
    tokens: int  # scored
    nll_nats: float  # of the target, summed
    kl_nats: float | None = None  # KL(dense || target), summed
    top1_agree: int | None = None  # tokens where both have the same first choice


@dataclass(frozen=True, kw_only=True)
class Cell(Record):
    """What a cell is, in the words of the tables, and the hashes that decide whether it is stale.

    door: `run`, `cost` or `quality`; in the latter two, vanilla's cell is the target's own. block:
    name of all that a cell shares with its baseline, everything but the method; empty in older
    records.
    """

    door: str
    model: str
    weights: str  # lab | checkpoint | random
    scheme: str  # label of the target's scheme, such as w4a16-g128
    lm_head: str  # label of lm_head's scheme
    draft_scheme: str  # label of the drafter's scheme; empty where nothing drafts
    method: str  # conf choice, with its overrides where there are any
    task: str
    device: str
    dtype: str
    exact: bool = False  # the target's rows do not depend on how many tokens are read
    block: str = ""
    acceptance: str = "measured"  # measured | replay:<profile>
    temperature: float = 0.0
    tie_threshold_nats: float = 0.0
    config_hash: str = ""
    code_hash: str = ""
    weight_hashes: dict[str, str] = field(default_factory=dict)
    revisions: list[str] = field(default_factory=list)  # org/name@commit of what the hub gave
    folder: str = ""  # name of the target's folder, where it is not the model's own
    foreign: bool = False  # called the lab's, but neither below models/lab nor known to be of it
    target_hash: str = ""  # of the target's files; empty in older records
    stored: bool = False  # layers are quantised in the folder, not when they are read


@dataclass(frozen=True, kw_only=True)
class Status(Record):
    """How a cell ended. state: done | failed | oom | unsupported."""

    state: str
    reason: str = ""
    traceback: str = ""


def write_json(path: Path, record: Record | dict[str, Any]) -> None:
    """Write a whole JSON file atomically: readers see the old file or the new one."""
    values = asdict(record) if isinstance(record, Record) else record
    write_text(path, json.dumps(values, indent=1, sort_keys=True) + "\n")


def write_lines(path: Path, records: Iterable[Record]) -> None:
    """Write a whole JSONL file atomically."""
    write_text(path, "".join(_line(r) for r in records))


def append_line(path: Path, record: Record) -> None:
    """Append one JSONL line and hand it to the disk before returning."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, *, torn_tail: bool = False) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a JSONL file.

    torn_tail: pass over a last line that a killed writer left incomplete; any other broken line
    raises ValueError.
    """
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            if torn_tail and number == len(lines):
                return
            raise ValueError(f"{path}:{number} must be a JSON object: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}:{number} must be a JSON object, got {type(values).__name__}")
        yield values


def _line(record: Record) -> str:
    return json.dumps(asdict(record), separators=(",", ":")) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a whole file atomically."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)
