"""GSM8K's answers: named filters that find a number in a text, and compare it as text.

`strict`, `strict_cot` and `flexible` are lm-evaluation-harness's strict-match of gsm8k,
strict-match of gsm8k_cot and flexible-extract: the same text gets the same verdict there
(tests/bench/test_gsm8k.py). `paper` is the rule of arXiv 2505.22179's release. 18.00 is not 18
under any of them.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from bench.score import Scorer, Verdict

MARK = "the answer is"
_NUMBER = re.compile(r"-?\d+\.?\d*")
# What the harness leaves out of both sides before it compares: its regexes_to_ignore, in order.
_IGNORED = [re.compile(p) for p in (",", r"\$", r"(?s).*#### ", r"\.$")]


def _found(pattern: str, which: int) -> Callable[[str], str | None]:
    """Make a filter of the first (0) or last (-1) match: of its groups the first that is set."""
    compiled = re.compile(pattern)

    def find(text: str) -> str | None:
        matches = list(compiled.finditer(text))
        if not matches:
            return None
        return next((_bare(group) for group in matches[which].groups() if group), None)

    return find


def _bare(number: str) -> str:
    for pattern in _IGNORED:
        number = pattern.sub("", number)
    return number.lower()


def _paper(text: str) -> str | None:
    """The first number between the first "The answer is" and the next; without one, the last."""
    before, *after = text.lower().split(MARK)
    numbers = _NUMBER.findall((after[0] if after else before).replace(",", ""))
    if not numbers:
        return None
    number: str = numbers[0 if after else -1]
    return number.removesuffix(".")


FILTERS: dict[str, Callable[[str], str | None]] = {
    "strict": _found(r"#### (\-?[0-9\.\,]+)", 0),
    "strict_cot": _found(r"The answer is (\-?[0-9\.\,]+).", 0),
    "flexible": _found(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", -1),
    "paper": _paper,
}


@final
@dataclass(frozen=True, kw_only=True)
class Gsm8k(Scorer):
    """The number that a named filter finds is the reference's."""

    executes: ClassVar[bool] = False

    filter: str  # strict | strict_cot | flexible | paper

    def __post_init__(self) -> None:
        if self.filter not in FILTERS:
            raise ValueError(f"filter must be one of {', '.join(FILTERS)}, got {self.filter!r}")

    def check(self, reference: str | None) -> None:
        """Ask for a number."""
        if reference is None or not re.fullmatch(r"-?\d+(\.\d+)?", reference):
            raise ValueError(f"the reference must be a number, got {reference!r}")

    def score(self, text: str, reference: str) -> Verdict:
        """Compare digit for digit; a text without a number is wrong."""
        number = FILTERS[self.filter](text)
        return Verdict(correct=number == reference, scored=self.filter, answer=number or "")
