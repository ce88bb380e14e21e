"""A small campaign on disk, made from hand-written records: what the tests of a report read."""

import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.record import Cell, Cost, Generation, Quality, Status, append_line, write_json

CONTEXT: dict[str, Any] = {
    "schema": 1,
    "started": "2026-11-20T10:00:00+00:00",
    "hostname": "lab-1",
    "device": {"type": "cpu", "name": "Example CPU"},
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "numpy": "2.4.6"},
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "diff_sha256": None,
    "surprise": "keys nobody knows are let through",
}

CELL = Cell(
    door="run",
    model="lab_small",
    weights="lab",
    scheme="dense",
    lm_head="dense",
    draft_scheme="",
    method="vanilla",
    task="gsm8k",
    device="cpu",
    dtype="float32",
    tie_threshold_nats=0.15,
)

SPEED = {"dense": 1.0, "w8a8": 0.7, "w4a16-g128": 0.5}  # seconds per token beside dense's


def write_cell(
    folder: Path,
    cell: Cell,
    records: list[Generation] | list[Cost] | list[Quality],
    status: Status | None = Status(state="done"),  # noqa: B008 (frozen)
    context: dict[str, Any] | None = None,
) -> Path:
    """Write one cell's folder as a run leaves it."""
    folder.mkdir(parents=True)
    write_json(folder / "cell.json", cell)
    write_json(folder / "context.json", CONTEXT if context is None else context)
    for record in records:
        append_line(folder / "records.jsonl", record)
    if status is not None:
        write_json(folder / "status.json", status)
    return folder


def generation(
    prompt_id: str,
    tokens: list[int],
    decode_s: float,
    *,
    turn: int = 0,
    accepted: list[int] | None = None,
    prefill_s: float = 0.5,
    draft_prefill_s: float = 0.0,
    gap_nats: float | None = None,
) -> Generation:
    """Make a generation whose charged seconds are draft_prefill_s + decode_s.

    Half of decode_s is verification, three eighths drafting, one eighth commit.
    """
    accepted = [0] * len(tokens) if accepted is None else accepted
    return Generation(
        prompt_id=prompt_id,
        turn=turn,
        category="maths",
        status="ok",
        prompt_tokens=10,
        token_ids=tokens,
        accepted=accepted,
        drafted=[4 if any(accepted) else 0] * len(accepted),
        stage_s={
            "prefill": [prefill_s],
            "draft_prefill": [draft_prefill_s],
            "draft": [decode_s * 3 / 8],
            "verify": [decode_s / 4, decode_s / 4],
            "commit": [decode_s / 8],
        },
        wall_s=(prefill_s + draft_prefill_s + decode_s) * 1.25,
        divergence=None
        if gap_nats is None
        else {"index": 1, "token": tokens[1], "vanilla_token": 2, "gap_nats": gap_nats},
    )


def pair_of_cells(root: Path) -> Path:
    """Write vanilla and chain on dense, three prompts each; every number fits a hand's sum.

    vanilla: 12 tokens in 12 s. chain: 12 tokens in 6 s, 1 s of which is the drafter's prefill;
    the third prompt differs by a near-tie.
    """
    vanilla = [generation(p, [1, 2, 3, 4], 4.0) for p in ("a", "b", "c")]
    chain = [
        generation("a", [1, 2, 3, 4], 1.0, accepted=[1, 1], draft_prefill_s=0.5),
        generation("b", [1, 2, 3, 4], 2.0, accepted=[3], draft_prefill_s=0.25),
        generation("c", [1, 9, 3, 4], 2.0, accepted=[2, 0], draft_prefill_s=0.25, gap_nats=0.1),
    ]
    write_cell(root / "dense-vanilla", CELL, vanilla)
    write_cell(root / "dense-chain", replace(CELL, method="chain", draft_scheme="dense"), chain)
    return root


def realistic(root: Path) -> Path:
    """Write a campaign with all that happens: two tasks, failures, costs, synthetic cells."""
    gains = {"chain": (1.9, 2.4, 4), "eagle2": (2.6, 3.1, 12), "hierarchical": (2.2, 3.4, 9)}
    for scheme, slow in (("dense", 1.0), ("w8a8", 0.85), ("w4a16-g128", 0.55)):
        target = replace(CELL, scheme=scheme)
        for task, count in (("gsm8k", 30), ("mt_bench", 12)):
            here = replace(target, task=task)
            turns = 2 if task == "mt_bench" else 1
            write_cell(root / f"{scheme}-vanilla-{task}", here, _arm(here, count, turns, 1.0, 1, 0))
            for method, (gain, tau, nodes) in gains.items():
                if (scheme, method) in (("w8a8", "hierarchical"), ("w4a16-g128", "eagle2")):
                    continue
                kept = 1 + (gain - 1) * slow**1.3 - 0.62 * (slow < 0.6)
                cell = replace(here, method=method, draft_scheme="dense")
                records = _arm(cell, count, turns, kept, tau, nodes)
                write_cell(root / f"{scheme}-{method}-{task}", cell, records)
        _costs(root, target, slow)
    odd = replace(CELL, scheme="w4a16-g128", method="eagle2", draft_scheme="dense")
    write_cell(root / "w4a16-g128-eagle2-gsm8k", odd, _arm(odd, 3, 1, 1.2, 3, 12), None)
    with (root / "w4a16-g128-eagle2-gsm8k" / "records.jsonl").open("a") as file:
        file.write('{"schema":1,"prompt_id":"gsm8k/3","tur')
    lost = Status(state="oom", reason="needed 18.2 GiB, 11.0 GiB free", traceback="Traceback ...")
    write_cell(
        root / "w8a8-hierarchical-gsm8k",
        replace(odd, scheme="w8a8", method="hierarchical"),
        [],
        lost,
    )
    wrong = Status(state="unsupported", reason="eagle2 has no head for <lab_small>, see its yaml")
    write_cell(root / "w4a16-g128-eagle2-mt_bench", replace(odd, task="mt_bench"), [], wrong)
    _synthetic(root)
    return root


def _synthetic(root: Path) -> None:
    shape = replace(CELL, model="llama3_8b", weights="random", device="cuda", dtype="bfloat16")
    gpu = {**CONTEXT, "device": {"type": "cuda", "name": "Example GPU"}, "dirty": True}
    for scheme, gain in (("dense", 2.2), ("w4a16-g128", 1.3)):
        cell = replace(shape, scheme=scheme)
        records = _arm(cell, 20, 1, 1.0, 1, 0)
        write_cell(root / f"8b-{scheme}-vanilla", cell, records, context=gpu)
        cell = replace(
            cell, method="eagle2", draft_scheme="dense", acceptance="replay:eagle2_llama3_8b"
        )
        records = _arm(cell, 20, 1, gain, 3.9, 60)
        write_cell(root / f"8b-{scheme}-eagle2", cell, records, context=gpu)
        _costs(root, replace(shape, scheme=scheme), 0.6 if scheme != "dense" else 1.0, gpu)


def _arm(
    cell: Cell, count: int, turns: int, gain: float, tau: float, nodes: int
) -> list[Generation]:
    generator = random.Random(f"{cell.scheme} {cell.method} {cell.task}")
    records = []
    for i in range(count):
        for turn in range(turns):
            limit = 24 + 5 * (i % 7)
            tokens = [(i * 31 + turn * 7 + j) % 64 for j in range(limit)]
            gap, was = None, 0
            if cell.method == "chain" and cell.scheme == "w4a16-g128" and i % 9 == 4:
                was = tokens[5]
                tokens[5:], gap = [3] * (limit - 5), 0.04 if i < 20 else 0.9
            accepted: list[int] = []
            while sum(accepted) + len(accepted) < limit:
                accepted.append(min(int(generator.expovariate(1 / max(tau - 0.6, 1e-9))), nodes))
            seconds = 0.02 * limit * SPEED[cell.scheme] / gain * generator.uniform(0.7, 1.4)
            record = generation(f"{cell.task}/{i}", tokens, seconds, turn=turn, accepted=accepted)
            drafts = [nodes] * len(accepted)
            stage_s = {**record.stage_s, "draft_prefill": [0.01 if nodes else 0.0]}
            if not nodes:
                stage_s = {**stage_s, "verify": [seconds], "draft": [], "commit": []}
            category = ("maths", "writing", "code")[i % 3]
            if gap is not None:
                difference = {"index": 5, "token": 3, "vanilla_token": was, "gap_nats": gap}
                record = replace(record, divergence=difference)
            records.append(replace(record, drafted=drafts, stage_s=stage_s, category=category))
    records.append(
        Generation(
            prompt_id="long", turn=0, category="maths", status="too_long", prompt_tokens=9999
        )
    )
    return records


def _costs(root: Path, target: Cell, slow: float, context: dict[str, Any] | None = None) -> None:
    cell = replace(target, door="cost", method="", task="")
    generator = random.Random(target.scheme)
    records = []
    for n in (1, 2, 4, 8, 16, 32, 64):
        middle = 0.02 * slow * (1 + (n - 1) * 0.012 / slow**2.5)
        records.append(
            cost("verify", n, [middle * generator.uniform(0.95, 1.08) for _ in range(9)])
        )
    name = f"{target.model}-{target.scheme}-cost"
    write_cell(root / name, cell, records, context=context)
    for method, n, seconds in (("chain", 5, 0.006), ("eagle2", 13, 0.008)):
        drafter = replace(cell, method=method, draft_scheme="dense")
        write_cell(
            root / f"{name}-{method}", drafter, [cost("draft", n, [seconds] * 5)], context=context
        )


def cost(what: str, n: int, repeat_s: list[float], context: int = 64) -> Cost:
    return Cost(
        what=what,
        n=n,
        context=context,
        batch=1,
        forwards=1 if what == "verify" else n - 1,
        repeat_s=repeat_s,
        weight_bytes=50_000_000,
        kv_bytes=1_000_000,
        flops=10**9,
    )


def as_json(cell: Cell, **changes: object) -> dict[str, Any]:
    """Give a cell's file with something off in it."""
    return {**asdict(cell), **changes}
