"""Scores: a task's scorer holds an answer against its reference. One class per form of answer.

`bench.gsm8k` and `bench.humaneval` have the others; a yaml of conf/task names its own.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether an answer is right. correct: None where it was not scored; `scored` then says why.

    scored: name of the rule that judged. answer: what was found in the text. reason: of a program
    that did not pass. sandbox: what a program was shut in by while it ran.
    """

    correct: bool | None
    scored: str
    answer: str = ""
    reason: str = ""
    sandbox: str = ""


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """The keys of `score`. execute: programs that the model wrote may run, in the sandbox."""

    execute: bool


class Scorer(ABC):
    """A rule for answers. executes: it runs what the model wrote."""

    executes: ClassVar[bool]

    @abstractmethod
    def check(self, reference: str | None) -> None:
        """Raise ValueError where a prompt's reference is not what the rule needs."""

    @abstractmethod
    def score(self, text: str, reference: str) -> Verdict:
        """Judge one answer. text: with the opening that the prompt gave it."""


@final
@dataclass(frozen=True, kw_only=True)
class Unscored(Scorer):
    """No rule: answers are kept, for a judge or for nobody."""

    executes: ClassVar[bool] = False

    def check(self, reference: str | None) -> None:
        """Take any reference, or none."""

    def score(self, text: str, reference: str) -> Verdict:
        """Leave it open."""
        return not_scored("the task has no scorer")


def judge(scorer: Scorer, text: str, reference: str | None, *, execute: bool) -> Verdict:
    """Score an answer. execute: whether programs that the model wrote may run."""
    if scorer.executes and not execute:
        return not_scored("score.execute is false")
    return scorer.score(text, reference or "")


def not_scored(why: str) -> Verdict:
    """What stands in a record instead of a false zero."""
    return Verdict(correct=None, scored=f"no: {why}")
