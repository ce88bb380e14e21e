"""The settings of a method, and the models that it is made from.

A recipe is what a yaml of `conf/method` names: plain values that check themselves, and one
function that joins them to loaded models.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from methods.decode import Method
from methods.drafter import Drafter
from methods.transformer import Transformer
from methods.verify import Rule
from quant.scheme import Scheme


@dataclass(frozen=True, kw_only=True)
class Family:
    """Checkpoint folders that belong together: a model, its draft heads, a smaller family.

    heads: by the name of the method that uses them, such as `eagle2`. key: of the configuration,
    for messages.
    """

    target: Path
    heads: Mapping[str, Path] = field(default_factory=dict)
    small: "Family | None" = None
    key: str = "model"

    def head(self, name: str) -> Path:
        """Folder of a draft head, or ValueError where the family has none."""
        if name not in self.heads:
            raise ValueError(
                f"{self.target} must have an {name} head, given by {self.key}.heads.{name}, got "
                f"{sorted(self.heads)}"
            )
        return self.heads[name]

    def smaller(self) -> "Family":
        """The smaller family, or ValueError where there is none."""
        if self.small is None:
            raise ValueError(f"{self.target} must have a smaller model of the same tokenizer")
        return self.small


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a drafter is made from.

    scheme: of the drafter's own layers. lm_head: of the drafter's own output projection; None
    lets an EAGLE-2 head share the target's, and leaves any other in `dense`. target_lm_head: of
    the target's. draft_ids: [k] int64, the tokens that a draft head may propose; None = all.
    load: reads a smaller model's folder in the drafter's schemes, once however often it is asked.
    """

    target: Transformer
    family: Family
    rule: Rule
    context: int
    scheme: Scheme
    lm_head: Scheme | None
    target_lm_head: Scheme
    dense: Scheme
    draft_ids: Tensor | None
    load: Callable[[Path], Transformer]

    def with_scheme(self, scheme: Scheme) -> "Parts":
        """The same, but for the scheme of the drafter's own layers."""
        return replace(self, scheme=scheme)

    def smaller(self, *, ahead: int) -> "Parts":
        """The parts of a method over the smaller model, which may run `ahead` of this one."""
        family = self.family.smaller()
        return replace(
            self,
            target=self.load(family.target),
            target_lm_head=self.lm_head or self.dense,
            family=family,
            rule=self.rule.smaller(),
            context=self.context + ahead,
        )


class Recipe(ABC):
    """Concrete recipes are frozen, keyword-only dataclasses of plain values and other recipes."""

    @abstractmethod
    def folders(self, family: Family) -> list[Path]:
        """Every folder besides the target's that the method reads; ValueError where one lacks."""

    @abstractmethod
    def check(self, family: Family, *, draft_ids: Tensor | None = None) -> None:
        """Check that the method fits the family before any weight is read, or raise ValueError.

        draft_ids: as of `Parts`, within the target's vocabulary.
        """

    @abstractmethod
    def drafter(self, parts: Parts) -> Drafter:
        """Join the settings to loaded models."""

    def method(self, parts: Parts) -> Method:
        """Make the whole method."""
        return Method(parts.target, self.drafter(parts), parts.rule, context=parts.context)
