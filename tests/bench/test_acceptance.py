import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.acceptance import acceptance_of, attempt, broken, drafting, top1_agreement
from bench.config import parse, resolve
from bench.load import Loader
from methods.decode import Method, Output
from methods.eagle2 import Eagle2
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from tests.bench.tiny import composed, write_world
from tests.methods.parts import make_parts

PROMPTS = [[0, 5, 17, 23, 42], [3, 9, 60, 4]]
TREE = ("method.depth=2", "method.top_k=3", "method.nodes=7")


def method_of(root: Path, *overrides: str) -> tuple[Method, Path]:
    """A method over the tiny random family, whose heads are right by chance only."""
    config = parse(resolve(composed(*write_world(root), *overrides)))
    loader = Loader(config)
    return loader.method(config), loader.model.family.target


def output(drafted: list[int], accepted: list[int]) -> Output:
    return Output(token_ids=[], stopped=False, accepted=accepted, drafted=drafted)


def judged(method: Method, target: Path, *, floor: float, tried: list[Output] | None = None) -> str:
    return broken(method, PROMPTS, tried=tried or [], limit=24, floor=floor, target=target)


def test_acceptance_counts_only_steps_that_drafted() -> None:
    found = acceptance_of([output([4, 0, 4], [1, 0, 2]), output([4], [0])])
    assert (found.steps, found.drafted, found.accepted, found.length) == (3, 12, 3, 2.0)
    assert found.chance(vocab=96) == 1 + 4 / 96


def test_a_head_that_is_never_right_is_broken(tmp_path: Path) -> None:
    method, target = method_of(tmp_path, "method=eagle2", *TREE)
    problem = judged(method, target, floor=1e6)
    steps = acceptance_of([attempt(method, prompt, 24) for prompt in PROMPTS]).steps
    assert problem.startswith("broken head: acceptance length 1.")
    assert f" over {steps} steps of 2 prompts, blind guesses reach 1.0625 " in problem  # 6 of 96
    assert "\n" not in problem


def test_a_head_that_is_right_is_not_broken_and_nothing_more_is_decoded(tmp_path: Path) -> None:
    method, target = method_of(tmp_path, "method=eagle2", *TREE)
    method.prefill([7, 7])
    cached = list(method.cached)
    assert judged(method, target, floor=2, tried=[output([6] * 10, [1] * 10)]) == ""
    assert method.cached == cached


def test_more_prompts_are_decoded_before_a_head_is_called_broken(tmp_path: Path) -> None:
    method, target = method_of(tmp_path, "method=eagle2", *TREE)
    outputs = [output([6] * 5, [0] * 5)]
    reached = []
    for prompt in PROMPTS:  # it is judged anew after each
        outputs.append(attempt(method, prompt, 24))
        found = acceptance_of(outputs)
        reached.append((found.length - 1) / (found.chance(96) - 1))
    assert min(reached) > 0
    assert judged(method, target, floor=0.9 * max(reached), tried=outputs[:1]) == ""
    assert judged(method, target, floor=1.1 * max(reached), tried=outputs[:1]) != ""


def test_no_floor_asks_for_nothing(tmp_path: Path) -> None:
    method, target = method_of(tmp_path, "method=eagle2", *TREE)
    assert judged(method, target, floor=0, tried=[output([6], [0])]) == ""


def test_a_head_over_what_seems_a_rotated_target_is_told_so(tmp_path: Path) -> None:
    method, target = method_of(tmp_path, "method=eagle2", *TREE)
    assert "seems to be rotated" not in judged(method, target, floor=1e6)
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(128)
    save_file(tensors, target / "model.safetensors")
    assert "the final norm of" in judged(method, target, floor=1e6)
    shutil.copyfile(target / "model.safetensors", target / "rotation.safetensors")
    assert "seems to be rotated" not in judged(method, target, floor=1e6)


def test_a_rotated_target_does_not_excuse_a_smaller_model(tmp_path: Path) -> None:
    method, target = method_of(tmp_path, "method=chain")
    tensors = load_file(target / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(128)
    save_file(tensors, target / "model.safetensors")
    problem = judged(method, target, floor=1e6)
    assert problem.startswith("broken drafter: acceptance length ")
    assert problem.endswith(" (acceptance_floor=1e+06 times)")


@pytest.mark.parametrize(
    ("method", "over"),
    [
        ("vanilla", []),
        ("eagle3", ["target"]),
        ("chain", ["target"]),
        ("hierarchical", ["target", "small"]),
    ],
)
def test_every_method_that_drafts_is_judged_over_its_own_target(
    tmp_path: Path, method: str, over: list[str]
) -> None:
    config = parse(resolve(composed(*write_world(tmp_path), f"method={method}")))
    loader = Loader(config)
    found = list(drafting(loader.method(config), loader.model.family))
    assert [family.target.name for _, family in found] == over
    for own, family in found:
        layers = {"target": 5, "small": 4}[family.target.name]
        assert own.target.shape.num_layers == layers


def test_a_finer_format_keeps_more_of_a_heads_first_choices(tmp_path: Path) -> None:
    config = parse(resolve(composed(*write_world(tmp_path))))
    recipe = Eagle2(depth=2, top_k=3, nodes=7)
    parts = make_parts(config.model.family)
    dense = recipe.head(parts)
    coarse = W4A16(group_size=-1, symmetric=True, range_search=False)

    def agreement(scheme: W8A8 | W4A16) -> float:
        packed = recipe.head(parts.with_scheme(scheme))
        return top1_agreement(packed, dense, parts.target, [list(range(60))])

    assert top1_agreement(dense, dense, parts.target, PROMPTS) == 1
    assert 1 >= agreement(W8A8(smooth_alpha=None)) > agreement(coarse) > 1 / 96
