"""HumanEval's answers: find the program in a text, and run its tests in the sandbox.

A text may be a chat's (prose, several code blocks, a block that the limit cut off) or a bare
completion, a whole script or only the body of the function. Of a script, what defines names is
kept; calls, prints and assertions beside the definitions are dropped, as EvalPlus does.
"""

import ast
import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from textwrap import dedent, indent
from typing import ClassVar, final

from bench import sandbox
from bench.score import Scorer, Verdict

PASS_AT_1 = "pass@1"
REFERENCE = ("prompt", "entry_point", "test")
_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})[^`\n]*$", re.MULTILINE)
_DROPPED = (ast.Expr, ast.Assert)


@final
@dataclass(frozen=True, kw_only=True)
class HumanEval(Scorer):
    """The program passes the problem's tests, in one sample. The fields are `sandbox.Limits`."""

    executes: ClassVar[bool] = True

    timeout_s: float
    memory_mib: int
    processes: int
    files: int
    file_mib: int

    def __post_init__(self) -> None:
        self._limits()

    def check(self, reference: str | None) -> None:
        """Ask for a problem's prompt, entry point and test."""
        known = json.loads(reference) if reference else {}
        for key in REFERENCE:
            if not isinstance(known, dict) or not isinstance(known.get(key), str):
                raise ValueError(f"the reference must have {', '.join(REFERENCE)}, it lacks {key}")

    def score(self, text: str, reference: str) -> Verdict:
        """Run the program that the text holds; a text without one is wrong."""
        problem = json.loads(reference)
        entry_point = problem["entry_point"]
        try:
            program = find_program(text, problem["prompt"], entry_point)
        except RecursionError:  # nested deeper than Python can write out
            program = None
        if program is None:
            return Verdict(correct=False, scored=PASS_AT_1, reason="no program in the answer")
        found = sandbox.run(
            program,
            entry_point,
            setup=before(problem["prompt"], entry_point),
            test=f"{problem['test']}\n\ncheck({entry_point})\n",
            limits=self._limits(),
        )
        reason = f"{found.outcome}: {found.detail}" if found.outcome != "passed" else ""
        return Verdict(
            correct=found.outcome == "passed",
            scored=PASS_AT_1,
            answer=program,
            reason=reason,
            sandbox=found.sandbox,
        )

    def _limits(self) -> sandbox.Limits:
        return sandbox.Limits(
            timeout_s=self.timeout_s,
            memory_mib=self.memory_mib,
            processes=self.processes,
            files=self.files,
            file_mib=self.file_mib,
        )


def find_program(text: str, prompt: str, entry_point: str) -> str | None:
    """Make a whole program of an answer: imports and other functions of the prompt come first.

    The first code block that defines the function is the program; without one, the first that
    can stand as the function's body. None where nothing does either.
    """
    blocks = [*_blocks(text), text]
    head = before(prompt, entry_point)
    for block in blocks:
        tree = _longest(block, entry_point)
        if tree is not None:
            return "\n".join(part for part in (head.strip(), ast.unparse(tree)) if part) + "\n"
    for block in blocks:
        # As it stands, its first line without its indentation, all lines without theirs.
        bodies = (block, f"    {block.lstrip()}", indent(dedent(block), "    "))
        trees = [_longest(prompt + body, entry_point) for body in bodies]
        whole = [tree for tree in trees if tree and _does_more(tree, prompt, entry_point)]
        if whole:
            return max((ast.unparse(tree) for tree in whole), key=len) + "\n"
    return None


def before(prompt: str, entry_point: str) -> str:
    """What of a prompt stands before its function: imports, and functions that tests call."""
    found = re.search(rf"^(async )?def {re.escape(entry_point)}\b", prompt, re.MULTILINE)
    return prompt[: found.start()] if found else prompt


def _blocks(text: str) -> Iterator[str]:
    """Contents of the code blocks, in order; the last may be open."""
    fences = list(_FENCE.finditer(text))
    while fences:
        opening = fences.pop(0)
        mark = opening[1]
        while fences and not _closes(fences[0], mark):
            fences.pop(0)
        closing = fences.pop(0) if fences else None
        yield text[opening.end() : closing.start() if closing else len(text)].lstrip("\n")


def _closes(fence: re.Match[str], mark: str) -> bool:
    return fence[0].strip().startswith(mark) and not fence[0].strip().strip(mark[0])


def _longest(source: str, entry_point: str) -> ast.Module | None:
    """Parse the longest run of lines from the start that defines the function, less its calls."""
    lines = source.split("\n")
    for end in range(len(lines), 0, -1):
        tree = _parsed("\n".join(lines[:end]))
        if tree is None:
            continue
        tree.body = [node for node in tree.body if not isinstance(node, _DROPPED)]
        return tree if _function(tree, entry_point) else None
    return None


def _parsed(source: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a model's "\d" is no concern of ours
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _function(tree: ast.Module, name: str) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    named = [node for node in tree.body if isinstance(node, kinds) and node.name == name]
    return named[-1] if named else None


def _does_more(tree: ast.Module, prompt: str, entry_point: str) -> bool:
    """Tell whether a function has statements beyond those of the prompt."""
    whole, bare = _function(tree, entry_point), _parsed(prompt + "    pass\n")
    stub = _function(bare, entry_point) if bare else None
    return whole is not None and len(whole.body) > (len(stub.body) - 1 if stub else 0)
