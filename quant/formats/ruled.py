"""What the quantization_config of GPTQ, AWQ and QQQ share, since GPTQModel writes all three.

Its `dynamic` maps patterns of module names to settings that differ there. The first pattern that
matches the beginning of a name counts; `-:` before a pattern leaves those layers dense.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from quant.formats.layout import Layout, Quantization
from quant.scheme import Scheme

# What a rule may say of where codes, scales and zeros lie.
PLACING = frozenset({"bits", "group_size", "sym", "desc_act"})
# What it may say of how they were chosen, which no reader needs.
CHOOSING = frozenset(
    {"act_group_aware", "damp_auto_increment", "damp_percent", "fallback", "foem", "gptaq"}
    | {"hessian", "mse", "smooth", "smoother", "static_groups"}
)


def setting(values: Mapping[str, Any], key: str, kind: type, default: object = None) -> Any:  # noqa: ANN401
    """Give a value of one type. Raises ValueError where it is another, or missing without default.

    A default also stands for null.
    """
    value = values.get(key)
    value = default if value is None else value
    # A bool is an int, but never a width or a size.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(
            f"quantization_config: {key} must be of type {kind.__name__}, got {value!r}"
        )
    return value


def one_of(values: Mapping[str, Any], key: str, known: tuple[Any, ...], default: object) -> Any:  # noqa: ANN401
    """Give a value that is among those read here, or raise ValueError naming it."""
    value = setting(values, key, type(known[0]), default)
    if value not in known:
        shown = " or ".join(repr(each) for each in known)
        raise ValueError(f"quantization_config: {key} must be {shown}, got {value!r}")
    return value


def refuse(values: Mapping[str, Any], *keys: str) -> None:
    """Raise ValueError where one of these is set, in the values or under their `meta`."""
    meta = values.get("meta")
    for place in (values, meta if isinstance(meta, Mapping) else {}):
        for key in keys:
            if place.get(key):
                raise ValueError(
                    f"quantization_config: {key} must be absent, since what it adds is not in the "
                    f"weights, got {place[key]!r}"
                )


def quantizers(values: Mapping[str, Any]) -> list[str]:
    """Name the programs that a file says it comes from, without their versions."""
    meta = values.get("meta")
    named = meta.get("quantizer", []) if isinstance(meta, Mapping) else []
    listed = named if isinstance(named, list) else [named]
    return [str(name).partition(":")[0].lower() for name in listed]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One entry of `dynamic`. layout: None where layers are left dense."""

    pattern: re.Pattern[str]
    layout: Layout | None


@dataclass(frozen=True, kw_only=True)
class RuledQuantization(Quantization):
    """One layout for the decoder's layers, but for those with a rule."""

    own: Layout
    rounding: str  # the algorithm that chose the codes
    rules: tuple[Rule, ...]
    lm_head: bool
    only: tuple[str, ...] | None = None  # ends of quantised layers' names; None: all
    dense: tuple[str, ...] = ()  # pieces of other layers' names
    fused_parts: bool = False

    @property
    def label(self) -> str:
        """The scheme, how codes were chosen, and whether some layers differ."""
        return f"{self.scheme.label}+{self.rounding}" + ("+dynamic" if self.rules else "")

    @property
    def scheme(self) -> Scheme:
        """Of the layers without a rule."""
        return self.own.scheme

    @property
    def fused(self) -> bool:
        """Whether a converter joined the projections."""
        return self.fused_parts

    def layout(self, module: str) -> Layout | None:
        """The decoder's layers, and lm_head where it is said to be one of them."""
        if not (self.lm_head if module == "lm_head" else self._in_decoder(module)):
            return None
        matching = (rule.layout for rule in self.rules if rule.pattern.match(module))
        return next(matching, self.own)

    def _in_decoder(self, module: str) -> bool:
        chosen = self.only is None or module.endswith(self.only)
        left = any(piece in module for piece in self.dense)
        return module.endswith("_proj") and chosen and not left


def read_rules(
    values: Mapping[str, Any], changed: Callable[[Mapping[str, Any]], Layout]
) -> tuple[Rule, ...]:
    """Read `dynamic`, in the order of the file. changed: makes a layout of a rule's settings."""
    rules = []
    for name, changes in setting(values, "dynamic", dict, {}).items():
        place = f"quantization_config: dynamic[{name!r}]"
        dense = name.startswith("-:")
        if not dense and not isinstance(changes, Mapping):
            raise ValueError(f"{place} must be an object, got {changes!r}")
        if not dense and (unknown := changes.keys() - PLACING - CHOOSING):
            raise ValueError(
                f"{place} may hold {', '.join(sorted(PLACING))}, got {', '.join(sorted(unknown))}"
            )
        try:
            pattern = re.compile(name.removeprefix("-:").removeprefix("+:"))
        except re.error as error:
            raise ValueError(f"{place} must be a regular expression: {error}") from error
        rules.append(Rule(pattern=pattern, layout=None if dense else changed(changes)))
    return tuple(rules)


def names_in(values: Mapping[str, Any], key: str) -> tuple[str, ...]:
    """Read a list of names, perhaps of lists of names."""
    names = []
    for group in setting(values, key, list, []):
        for name in group if isinstance(group, list) else [group]:
            if not isinstance(name, str):
                raise ValueError(f"quantization_config: {key} must hold names, got {name!r}")
            names.append(name)
    return tuple(names)
