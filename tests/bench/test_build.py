from abc import ABC, abstractmethod
from dataclasses import dataclass

import pytest

from bench.build import build, named_node, target_modules, typed

HERE = "tests.bench.test_build"


class Part(ABC):
    @abstractmethod
    def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Leaf(Part):
    depth: int
    share: float = 0.5
    names: tuple[str, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth must be at least 1, got {self.depth}")

    def run(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Outer(Part):
    size: int
    inner: Part

    def run(self) -> None: ...


def make(**values: object) -> object:
    return build({"_target_": f"{HERE}.Leaf"} | values, Part, key="part", packages=("tests",))  # type: ignore[type-abstract]


def make_outer(**values: object) -> object:
    inner = {"_target_": f"{HERE}.Leaf"} | values
    node = {"_target_": f"{HERE}.Outer", "size": 1, "inner": inner}
    return build(node, Part, key="part", packages=("tests",))  # type: ignore[type-abstract]


def test_plain_fields_arrive_in_their_types() -> None:
    made = make(depth=3, share=1, names=["a", "b"], limit=None)
    assert made == Leaf(depth=3, share=1.0, names=("a", "b"), limit=None)


def test_nested_nodes_are_built_first() -> None:
    assert make_outer(depth=2) == Outer(size=1, inner=Leaf(depth=2))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"depth": "six"}, r"part\.depth: Value 'six'"),
        ({"depth": 1.5}, r"part\.depth: "),
        ({"depth": 1, "dept": 2}, r"part\.dept: no such key, there are depth, share"),
        ({}, r"part\.depth: must be given"),
        ({"depth": 1, "names": 3}, r"part\.names: must be a list, such as \[3\], got 3"),
        ({"depth": 1, "names": "a"}, r"part\.names: must be a list, such as \[a\], got 'a'"),
        ({"depth": 0}, r"part: depth must be at least 1, got 0"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_full(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**values)


def test_a_nested_key_is_named_in_full() -> None:
    with pytest.raises(ValueError, match=r"part\.inner\.depth: Value 'six'"):
        make_outer(depth="six")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("os.system", "below quant, methods, bench"),
        (None, "below quant, methods, bench"),
        ("methods.nothing.Eagle9", "there is no module methods.nothing"),
        ("methods.vanilla.Chocolate", "methods.vanilla has no class Chocolate"),
        ("methods.vanilla.VanillaDrafter", "must be a Part"),
        ("quant.dense.Dense", "must be a Part"),
    ],
)
def test_only_our_own_classes_of_the_right_kind_are_built(target: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"part\._target_.*{message}"):
        build({"_target_": target}, Part, key="part")  # type: ignore[type-abstract]


def test_a_node_must_be_a_mapping() -> None:
    with pytest.raises(ValueError, match="part must be a mapping, got 'eagle2'"):
        build("eagle2", Part, key="part")  # type: ignore[type-abstract]


def test_the_outermost_node_has_no_prefix() -> None:
    with pytest.raises(ValueError, match=r"^depth: Value 'x'"):
        typed({"depth": "x"}, Leaf, key="")


def test_a_file_of_another_group_is_found_by_name() -> None:
    assert named_node("method", "vanilla", key="k") == {"_target_": "methods.vanilla.Vanilla"}


def test_an_unknown_file_of_another_group_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"lm_head must be one of checkpoint, dense, .*got 'w9'"):
        named_node("quant", "w9", key="quant.lm_head")


def test_target_modules_are_found_at_any_depth() -> None:
    tree = {"a": {"_target_": "m.x.A", "b": {"_target_": "m.y.B"}}, "c": 1}
    assert target_modules(tree) == {"m.x", "m.y"}
