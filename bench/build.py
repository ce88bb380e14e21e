"""A config node -> the typed object that its `_target_` names.

Hydra's own `instantiate` lets a wrong type through to the constructor. Here the node is held
against the fields of the dataclass first, so that a wrong type, an unknown key and a missing key
all fail with the full name of the key, such as `method.inner.depth`.
"""

import importlib
import inspect
from collections.abc import Mapping
from dataclasses import MISSING as REQUIRED
from dataclasses import field, fields, is_dataclass, make_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
PACKAGES = ("quant", "methods", "bench")
TARGET = "_target_"

T = TypeVar("T")


def build(node: object, base: type[T], *, key: str, packages: tuple[str, ...] = PACKAGES) -> T:
    """Make the object that a node describes; nested nodes are made first.

    base: what it must be an instance of. key: the node's full name, for messages. packages: where
    a `_target_` may lie.
    """
    values = as_mapping(node, key)
    found = _locate(values.pop(TARGET, None), base, key, packages)
    hints = get_type_hints(found)
    parts = {
        name: build(values.pop(name), hints[name], key=f"{key}.{name}", packages=packages)
        for name in list(values)
        if inspect.isabstract(hints.get(name))
    }
    return _make(found, values, parts, key)


def typed(node: object, kind: type[T], *, key: str) -> T:
    """Make a plain dataclass from a node without a `_target_`."""
    return _make(kind, as_mapping(node, key), {}, key)


def as_mapping(node: object, key: str) -> dict[str, Any]:
    """Copy a node that must be a mapping, or raise ValueError."""
    if not isinstance(node, Mapping):
        raise ValueError(f"{key} must be a mapping, got {node!r}")
    return {str(name): value for name, value in node.items()}


def without(node: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Copy a node less some keys."""
    return {key: value for key, value in node.items() if key not in keys}


def named_node(group: str, name: object, *, key: str) -> dict[str, Any]:
    """Read conf/<group>/<name>.yaml, for keys that name a file of another group."""
    folder = ROOT / "conf" / group
    path = folder / f"{name}.yaml"
    if not isinstance(name, str) or not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise ValueError(f"{key} must be one of {', '.join(known)}, got {name!r}")
    return as_mapping(OmegaConf.to_container(OmegaConf.load(path), resolve=True), str(path))


def target_modules(node: object) -> set[str]:
    """Modules of every `_target_` in a tree of nodes."""
    if not isinstance(node, Mapping):
        return set()
    found = set[str]().union(*(target_modules(value) for value in node.values()))
    if isinstance(node.get(TARGET), str):
        found.add(node[TARGET].rpartition(".")[0])
    return found


def _locate(target: object, base: type[T], key: str, packages: tuple[str, ...]) -> type[T]:
    if not isinstance(target, str) or target.split(".")[0] not in packages:
        raise ValueError(
            f"{key}.{TARGET} must name a class below {', '.join(packages)}, got {target!r}"
        )
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ValueError(f"{key}.{TARGET}: there is no module {error.name}") from error
    except AttributeError as error:
        raise ValueError(f"{key}.{TARGET}: {module} has no class {name}") from error
    if not (inspect.isclass(found) and issubclass(found, base) and is_dataclass(found)):
        raise ValueError(f"{key}.{TARGET} must be a {base.__name__}, got {target}")
    return cast(type[T], found)


def _make(kind: type[T], values: dict[str, Any], parts: dict[str, object], key: str) -> T:
    assert is_dataclass(kind)
    own = {f.name: f for f in fields(kind)}
    for name in values:
        if name not in own:
            raise ValueError(_at(key, name, f"no such key, there are {', '.join(own) or 'none'}"))
    for name, f in own.items():
        if name not in {*values, *parts} and f.default is f.default_factory is REQUIRED:
            raise ValueError(_at(key, name, "must be given"))
    checked = _checked(kind, values, key)
    try:
        return kind(**checked, **parts)
    except ValueError as error:
        raise ValueError(_at(key, "", str(error))) from error


def _checked(kind: type, values: dict[str, Any], key: str) -> dict[str, Any]:
    """Give the values in the types of the dataclass's fields."""
    hints = get_type_hints(kind)
    for name, value in values.items():
        # OmegaConf's own words do not name the key.
        if isinstance(value, str | int | float) and _is_list(hints[name]):
            raise ValueError(_at(key, name, f"must be a list, such as [{value}], got {value!r}"))
    schema = make_dataclass(
        kind.__name__, [(name, hints[name], field(default=MISSING)) for name in values]
    )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), values)
        plain = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        name = error.full_key or ""
        raise ValueError(_at(key, name, str(error).splitlines()[0])) from error
    assert isinstance(plain, dict)
    return {
        str(name): tuple(value) if get_origin(hints[str(name)]) is tuple else value
        for name, value in plain.items()
    }


def _is_list(hint: object) -> bool:
    return any(get_origin(kind) in (list, tuple) for kind in (hint, *get_args(hint)))


def _at(key: str, name: str, message: str) -> str:
    """Put the full key before a message; the outermost node has an empty one."""
    place = ".".join(part for part in (key, name) if part)
    return f"{place}: {message}" if place else message
