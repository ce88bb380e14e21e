"""Launches that begin before the kernel ahead has ended: what every kernel must do for it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench.build import ROOT

triton = pytest.importorskip("triton")
early = pytest.importorskip("quant.kernels.early")

PLAIN, EARLY = {"EARLY": False}, {"EARLY": True, "launch_pdl": True}
FOLDERS = ("methods/kernels", "quant/kernels")
KERNELS = {
    *("attention._partials", "combine._combine", "best._block_best", "best._row_best"),
    *("expansion._expand", "expansion._prune"),
    *(
        "commit._commit",
        "gate._silu_mul",
        "join._join",
        "join._add",
        "norm._add_norm",
        "rope_write._rope_write",
    ),
    *("tree._ancestry", "tree._walk", "tokens_triton._round_rows", "w8a8_triton._product"),
    "blocks_triton._round_blocks",
    *("w4a16_triton._product", "w4a16_triton._span_sums", "open_triton._open"),
}
# Of a kernel's parameters those that it may name before it waits: what no kernel writes, and sizes.
CONSTANTS = {"weight", "bias", "norm", "smooth", "scales", "words"}
SIZES = {"k", "n_out", "chunks", "tiles", "nodes", "shared_programs"}
SIZES |= {"stride_kind", "stride_group", "stride_slot"}
# What is decided of a cache, and how much.
DECIDED = {"attention._partials": {"cache", "base_at"}, "combine._combine": {"base_at"}}
# Where codes are written with their scales, these are no constants.
ROUNDING = ("norm._add_norm", "gate._silu_mul", "combine._combine")
WRITTEN = {
    name: {"scales"}
    for name in (*ROUNDING, "tokens_triton._round_rows", "blocks_triton._round_blocks")
}


def jitted(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    return {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    }


def called(node: ast.AST) -> Iterator[str]:
    """Yield what is called under a node, by its name as it is written."""
    return (ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call))


def launched(tree: ast.Module) -> set[str]:
    """Give the functions that are called with a grid, as name[grid](...)."""
    return {
        node.func.value.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and isinstance(node.func.value, ast.Name)
    }


def faults(kernel: ast.FunctionDef, constants: set[str]) -> set[str]:
    """Name what a kernel does that must not be, or lacks."""
    parameters = {argument.arg: argument.annotation for argument in kernel.args.args}
    if "EARLY" not in parameters:
        return {"takes no EARLY"}
    body = [ast.unparse(line) for line in kernel.body]
    body = body[1:] if ast.get_docstring(kernel) else body
    if body[0] != "admit(EARLY)":
        return {"does not admit first"}
    if body.count("await_earlier(EARLY)") != 1:
        return {"does not wait once in its body"}
    before = ast.parse("\n".join(body[: body.index("await_earlier(EARLY)")]))
    known = {name for name, annotation in parameters.items() if annotation is not None}
    named = {node.id for node in ast.walk(before) if isinstance(node, ast.Name)}
    found = set()
    if any(isinstance(node, ast.Return) for node in ast.walk(before)):
        found.add("returns before it waits")
    if any("store" in name or "atomic" in name for name in called(before)):
        found.add("writes before it waits")
    if (named & set(parameters)) - known - constants - SIZES:
        found.add("names what may be written still")
    return found


def kernels() -> dict[str, ast.FunctionDef]:
    found = {}
    for path in (path for folder in FOLDERS for path in (ROOT / folder).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        helpers = {name for node in jitted(tree).values() for name in called(node)}
        entries = {name: node for name, node in jitted(tree).items() if name not in helpers}
        if path != Path(early.__file__):
            assert launched(tree) == set(entries), path.name
            found |= {f"{path.stem}.{name}": node for name, node in entries.items()}
    return found


def test_these_are_all_kernels_of_a_decode_step() -> None:
    assert set(kernels()) == KERNELS


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_every_kernel_admits_the_next_and_waits_for_those_ahead(name: str) -> None:
    constants = CONSTANTS - WRITTEN.get(name, set()) | DECIDED.get(name, set())
    assert faults(kernels()[name], constants) == set()


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_launch_chooses_by_itself_whether_it_is_early(folder: str) -> None:
    for path in (ROOT / folder).glob("*.py"):
        tree = ast.parse(path.read_bytes())
        keywords = {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        assert not keywords & {"EARLY", "launch_pdl"}, path.name
        assert not launched(tree) or "early" in set(called(tree)), path.name


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        ("await_earlier(EARLY); admit(EARLY)", "does not admit first"),
        ("admit(EARLY); tl.store(y, 1)", "does not wait once in its body"),
        ("admit(EARLY)\n if n: await_earlier(EARLY)", "does not wait once in its body"),
        ("admit(EARLY)\n if n: return\n await_earlier(EARLY)", "returns before it waits"),
        ("admit(EARLY); tl.store(1, 1); await_earlier(EARLY)", "writes before it waits"),
        ("admit(EARLY); a = tl.load(x); await_earlier(EARLY)", "names what may be written still"),
    ],
)
def test_a_kernel_that_breaks_the_rule_is_told(lines: str, fault: str) -> None:
    (kernel,) = ast.parse(f"def f(x, y, weight, EARLY: tl.constexpr):\n {lines}").body
    assert isinstance(kernel, ast.FunctionDef)
    assert faults(kernel, CONSTANTS) == {fault}


def test_a_kernel_may_read_constants_before_it_waits() -> None:
    lines = "admit(EARLY); w = tl.load(weight); await_earlier(EARLY); tl.store(y, w * tl.load(x))"
    (kernel,) = ast.parse(f"def f(x, y, weight, EARLY: tl.constexpr):\n {lines}").body
    assert isinstance(kernel, ast.FunctionDef)
    assert faults(kernel, CONSTANTS) == set()
    assert faults(kernel, set()) == {"names what may be written still"}


def test_launches_are_plain_where_there_is_no_gpu() -> None:
    assert early.early(torch.device("cpu")) == {"EARLY": False}


@pytest.mark.parametrize(
    ("capability", "hip", "interpret", "expected"),
    [
        ((8, 9), None, False, PLAIN),
        ((9, 0), None, False, EARLY),
        ((12, 0), None, False, EARLY),
        ((9, 4), "6.4", False, PLAIN),
        ((9, 0), None, True, PLAIN),
    ],
)
def test_launches_are_early_on_nvidia_from_hopper_on(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    hip: str | None,
    interpret: bool,
    expected: dict[str, bool],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interpret)
    device = torch.device("cuda", 63)
    early._can.cache_clear()
    assert early.early(device) == expected
    early._can.cache_clear()


def test_attention_on_hopper_lets_the_next_kernel_in_first_and_waits_in_either_part() -> None:
    lines = (ROOT / "methods/kernels/attention_hopper.cu").read_text("ascii").splitlines()
    places = {
        name: next(i for i, line in enumerate(lines) if f" {name}(const" in line)
        for name in ("share", "own", "attend")
    }
    assert sorted(places, key=lambda name: places[name]) == ["share", "own", "attend"]
    body = lines[places["attend"] + 1 :]
    assert [i for i, line in enumerate(body) if "launch_dependents" in line] == [1]
    waits = [i for i, line in enumerate(lines) if "wait_for_earlier();" in line]
    assert [lines[i] for i in waits] == 2 * ["    wait_for_earlier();"]  # in no branch
    assert places["share"] < waits[0] < places["own"] < waits[1] < places["attend"]
    for name, wait in zip(("share", "own"), waits, strict=True):
        assert not any("return" in line for line in lines[places[name] : wait])
        before = "\n".join(lines[places[name] : wait])
        for field in ("qkv", "positions", "ancestors", "tops", "totals", "sums"):
            assert f"task.{field}" not in before
