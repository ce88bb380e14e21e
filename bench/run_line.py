"""The command that decodes with a quantised folder, by the best drafter that fits it."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import hub
from bench.build import build, named_node
from bench.config import parse_model
from bench.record import VANILLA
from bench.schemes import DRAFT_SCHEME
from methods.recipe import Recipe

STORED = "checkpoint"  # the file of conf/quant that reads what was written


def run_line(
    model: Mapping[str, Any],
    name: str,
    out: Path,
    overrides: Sequence[str],
    *,
    small: bool,
    machine: Mapping[str, str],
) -> str:
    """Give the command. small: `out` is of the smaller model. machine: keys and their values."""
    if small:
        key, words = "model.small.target", ["method=chain", f"method.{DRAFT_SCHEME}={STORED}"]
    else:
        key, words = "model.target", [f"quant={STORED}", f"method={_drafter(model, overrides)}"]
    places = (f"{key}=", "model.calibration=")
    kept = [o for o in overrides if o.startswith("model.") and not o.startswith(places)]
    words = [f"model={name}", *kept, f"{key}={out}", *words]
    return f"specquant run {shlex.join([*words, *(f'{k}={v}' for k, v in machine.items())])}"


def _drafter(model: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Take the first head that fits the model, else a smaller one, else none.

    A head that the hub has yet to give is taken to fit its own yaml's target, and no other.
    """
    own = not any(o.startswith("model.target=") for o in overrides)
    for method, head in model["heads"].items():
        waits = hub.is_id(head) and not hub.place(head).is_dir()
        if own if waits else _fits(method, model):
            return str(method)
    return "chain" if model.get("small") and _fits("chain", model) else VANILLA


def _fits(method: str, model: Mapping[str, Any]) -> bool:
    try:
        node = named_node("method", method, key="method")
        build(node, Recipe, key="method").check(parse_model(model).family)  # type: ignore[type-abstract]
    except ValueError:
        return False
    return True
