"""What a folder that is torn or made to harm can hold is refused in one line naming the place."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.architecture import read_shape
from methods.checkpoint import check_transformer, stored_in
from methods.rope import read_rope
from methods.values import MAX_DEPTH, parse_json
from methods.weights import INDEX
from quant.dense import Dense
from tests.family import llama_config, write_llama

LONGEST = 600  # characters that are still read, the folder's name with them
DEEP = 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("model"), llama_config(), seed=1)


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    for path in model.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refusal(folder: Path) -> str:
    with pytest.raises(ValueError, match="must") as refused:
        check_transformer(folder)
    text = str(refused.value)
    assert "\n" not in text
    assert len(text) < LONGEST
    assert text.startswith(str(folder))
    return text


def refusal_of(folder: Path, changes: Mapping[str, Any]) -> str:
    (folder / "config.json").write_text(json.dumps(llama_config(**changes)), encoding="utf-8")
    return refusal(folder)


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@pytest.mark.parametrize("value", [0, -128, True, "128", 128.0, [128], 2**63, "9" * 10**6])
@pytest.mark.parametrize("key", SIZES)
def test_a_size_is_an_integer_from_1_on(folder: Path, key: str, value: object) -> None:
    found = refusal_of(folder, {key: value})
    assert f"config.json: {key} must be an integer from 1 to 2**63 - 1, got " in found


@pytest.mark.parametrize(
    "value", [0, -1, True, "1", [], float("nan"), float("inf"), -float("inf"), 1e-45, 1e39, 10**400]
)
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta"])
def test_a_number_is_finite_and_above_0(folder: Path, key: str, value: object) -> None:
    assert f"{key} must be a finite number above " in refusal_of(folder, {key: value})


@pytest.mark.parametrize("key", ["tie_word_embeddings", "attention_bias", "qkv_bias"])
@pytest.mark.parametrize("value", ["false", 0, 1, []])
def test_a_switch_is_true_or_false(folder: Path, key: str, value: object) -> None:
    assert f"config.json: {key} must be true or false, got " in refusal_of(folder, {key: value})


@pytest.mark.parametrize("layers", [4, 6, 10**15])
def test_layers_are_as_many_as_the_files_hold(folder: Path, layers: int) -> None:
    found = refusal_of(folder, {"num_hidden_layers": layers})
    assert (
        f"num_hidden_layers must be 5, since the files hold so many layers, got {layers}" in found
    )


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
def test_a_size_that_no_tensor_has_is_refused(folder: Path, key: str) -> None:
    assert ".weight must be [" in refusal_of(folder, {key: 2**40})


@pytest.mark.parametrize("changes", [{"head_dim": 33}, {"hidden_size": 1, "head_dim": None}])
def test_heads_have_two_halves(folder: Path, changes: dict[str, Any]) -> None:
    assert "config.json: head_dim must be " in refusal_of(folder, changes)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("rope", "key"),
    [
        ("linear", "rope_scaling"),
        (["linear"], "rope_scaling"),
        (LLAMA3 | {"original_max_position_embeddings": 64.5}, "original_max_position_embeddings"),
        (LLAMA3 | {"original_max_position_embeddings": True}, "original_max_position_embeddings"),
        (LLAMA3 | {"factor": float("inf")}, "factor"),
        (LLAMA3 | {"high_freq_factor": 10**400}, "high_freq_factor"),
        (YARN | {"original_max_position_embeddings": "64"}, "original_max_position_embeddings"),
        (YARN | {"factor": 1e308}, "factor"),
        (YARN | {"beta_fast": float("inf")}, "beta_fast"),
        (YARN | {"beta_slow": 1e-320}, "beta_slow"),
        (YARN | {"beta_slow": 0}, "beta_slow"),
        (YARN | {"attention_factor": float("nan")}, "attention_factor"),
        (YARN | {"mscale": float("nan"), "mscale_all_dim": 1.0}, "mscale"),
        (YARN | {"truncate": "no"}, "truncate"),
        (YARN | {"rope_theta": 1.0}, "rope_theta"),
        ({"rope_type": "default", "partial_rotary_factor": "1"}, "partial_rotary_factor"),
    ],
)
def test_a_rotary_embedding_has_finite_numbers(folder: Path, rope: object, key: str) -> None:
    found = refusal_of(folder, {"rope_scaling": rope})
    assert f"config.json: rotary embedding: {key} must be " in found


def test_the_ends_of_what_a_rotary_embedding_may_hold_give_finite_frequencies() -> None:
    ends = (2.0**-126, 2.0**127)
    for theta in (1 + 2**-52, ends[1]):
        for slow, fast, factor in ((a, b, c) for a in ends for b in ends for c in ends):
            values = YARN | {"beta_slow": slow, "beta_fast": fast, "factor": factor}
            for original in (1, 2**63 - 1):
                values |= {"original_max_position_embeddings": original, "rope_theta": theta}
                rope = read_rope(llama_config(rope_scaling=values))
                assert rope.scaling is not None
                assert rope.scaling.reach >= 0
                assert bool(rope.frequencies(32, torch.device("cpu")).isfinite().all())


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window"),
        ({"model_type": "mistral", "sliding_window": "4"}, "sliding_window"),
        ({"use_sliding_window": "true"}, "use_sliding_window"),
        ({"use_sliding_window": True, "sliding_window": 8}, "max_window_layers"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": -1},
            "max_window_layers",
        ),
        ({"layer_types": [["full_attention"]]}, "layer_types"),
        ({"layer_types": [1, "full_attention"]}, "layer_types"),
        ({"layer_types": "full_attention"}, "layer_types"),
        ({"layer_types": {"full_attention": 1}}, "layer_types"),
    ],
)
def test_a_window_is_spelt_out(changes: dict[str, Any], key: str) -> None:
    config = {"model_type": "qwen2", "sliding_window": None} | changes
    with pytest.raises(ValueError, match=rf"^config\.json: {key} must be "):
        read_shape(llama_config(**config))


def test_a_switch_of_a_quantised_folder_is_true_or_false(folder: Path) -> None:
    own = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    config = llama_config(tie_word_embeddings="no", quantization_config=own)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: tie_word_embeddings must be true or"):
        stored_in(folder, Dense(), Dense())


BROKEN_JSON = {
    "nested deeper than Python reads": b"[" * DEEP + b"]" * DEEP,
    "nested deeper than Python shows": b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
    "an open nest": b'{"a":' * DEEP,
    "Latin-1": '{"model_type": "llamä"}'.encode("latin-1"),
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "an integer of too many digits": b'{"vocab_size": ' + b"9" * 10**5 + b"}",
    "zeros, as a power cut leaves them": bytes(64),
    "nothing": b"",
    "a list": b"[]",
}


@pytest.mark.parametrize("file", ["config.json", "quantize_config.json", INDEX])
@pytest.mark.parametrize("what", BROKEN_JSON)
def test_a_file_that_is_no_json_object_is_named(folder: Path, file: str, what: str) -> None:
    (folder / file).write_bytes(BROKEN_JSON[what])
    assert f"{folder / file} must be a JSON object" in refusal(folder)


@pytest.mark.parametrize("kind", [list, dict])
def test_json_may_be_nested_to_the_limit_and_no_deeper(kind: type) -> None:
    opening, closing = ("[", "]") if kind is list else ('{"a":', "}")

    def nested(depth: int) -> bytes:
        return (opening * depth + "1" + closing * depth).encode()

    assert isinstance(parse_json(nested(MAX_DEPTH)), kind)
    with pytest.raises(ValueError, match=f"must be nested {MAX_DEPTH} deep at most"):
        parse_json(nested(MAX_DEPTH + 1))


@pytest.mark.parametrize("content", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": 1}])
def test_an_index_has_a_map(folder: Path, content: object) -> None:
    (folder / INDEX).write_text(json.dumps(content), encoding="utf-8")
    assert f"{folder / INDEX} must have a weight_map" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "x" * 5000,
        "../{}/model.safetensors",
        "{0}/model.safetensors",
        "./model.safetensors",
        "sub/model.safetensors",
        "..",
        "",
        "a\0b",
        "two\nlines",
        "\ud800",
        "folder.safetensors",
        "link.safetensors",
        "gone.safetensors",
        1,
        ["model.safetensors"],
        None,
    ],
)
def test_an_index_names_files_beside_it(folder: Path, name: object) -> None:
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("nowhere")
    if isinstance(name, str):
        name = name.replace("../{}", f"../{folder.name}").replace("{0}", str(folder))
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")
    assert f"{folder / INDEX} must name files beside it, got " in refusal(folder)


def test_what_is_no_file_is_not_taken_for_weights(folder: Path) -> None:
    (folder / "folder.safetensors").mkdir()
    (folder / "link.safetensors").symlink_to("nowhere")
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert check_transformer(folder).num_layers == 5
    (folder / "weights.safetensors").unlink()
    assert refusal(folder) == f"{folder} must hold model.safetensors, found none"


def test_a_tensors_name_of_many_lines_is_shown_in_one(folder: Path) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"a\nb" * 10**4: torch.zeros(1)}, path)
    assert "missing none, superfluous a\\nba" in refusal(folder)
