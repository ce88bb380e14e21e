import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from methods.checkpoint import check_transformer, load_lm_head, require_dense
from quant.dense import Dense
from tests.family import llama_config, write_llama
from tests.methods.parts import load


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", llama_config(), seed=1)


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_shards_read_as_the_single_file_does(folder: Path) -> None:
    whole = load(folder, Dense())
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:10], "b.safetensors": names[10:]}
    for file, part in files.items():
        save_file({n: tensors[n] for n in part}, folder / file)
    index = {"weight_map": {n: file for file, part in files.items() for n in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    for name, tensor in load(folder, Dense()).state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name])


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere must be a checkpoint folder"):
        check_transformer(tmp_path / "nowhere")


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"must hold model\.safetensors, found none"):
        check_transformer(folder)


def test_truncated_weights_are_refused_before_anything_is_read(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model\.safetensors must be a whole safetensors file"):
        check_transformer(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_place_of_weights_is_told(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (folder / name).write_text(pointer, encoding="ascii")
    with pytest.raises(ValueError, match=f"{name} must hold weights, got a Git LFS pointer"):
        check_transformer(folder)


def test_a_broken_config_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ', encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json must be a JSON object: Expecting value"):
        check_transformer(folder)


def test_missing_and_superfluous_tensors_are_listed(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["stranger"] = tensors.pop("model.norm.weight")

    edit_tensors(folder, change)
    with pytest.raises(ValueError, match=r"missing model.norm.weight, superfluous stranger"):
        check_transformer(folder)


def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path) -> None:
    name = "model.layers.3.mlp.down_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(128, 255)}))
    with pytest.raises(
        ValueError, match=r"down_proj.weight must be \[128, 256\], got \[128, 255\]"
    ):
        check_transformer(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "mixtral"},
            "model_type must be one of llama, mistral, qwen2, qwen3, got 'mixtral'",
        ),
        ({"quantization_config": {}}, "quant_method must be one of .*, got None"),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"attention_bias": True}, r"missing model.layers.0.self_attn.k_proj.bias, .* and 17 more"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        (
            {"rope_scaling": {"rope_type": "longrope"}},
            "rope type must be one of default, linear, dynamic, llama3, yarn, got 'longrope'",
        ),
        ({"num_attention_heads": 3}, "must be a multiple of num_key_value_heads=2, got 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    folder: Path, changes: dict[str, object], message: str
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        check_transformer(folder)


def test_frequencies_that_llama_2_files_hold_are_left_alone(folder: Path) -> None:
    whole = load(folder, Dense())
    name = "model.layers.2.self_attn.rotary_emb.inv_freq"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(16)}))
    tokens = torch.tensor([[5, 6, 7]])
    read = [m(tokens, torch.arange(3), m.cache(3)).hidden for m in (whole, load(folder, Dense()))]
    assert torch.equal(*read)


def test_a_config_without_a_size_is_refused(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["intermediate_size"]
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json: intermediate_size must be .*, got None"):
        check_transformer(folder)


def test_a_tied_models_copy_of_its_embedding_has_its_shape(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, llama_config(tie_word_embeddings=True), seed=1)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(96, 64)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight must be \[96, 128\], got \[96, 64\]"):
        check_transformer(folder)


def test_a_tied_model_with_another_output_is_not_quantised(tmp_path: Path) -> None:
    folder = write_llama(tmp_path, llama_config(tie_word_embeddings=True), seed=1)
    assert require_dense(folder).tied
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": torch.zeros(96, 128)}))
    with pytest.raises(ValueError, match=f"^{folder}: lm_head.weight must be absent or equal"):
        require_dense(folder)


def test_lm_head_can_be_read_alone(folder: Path) -> None:
    alone = load_lm_head(
        folder, Dense(), dtype=torch.float32, device=torch.device("cpu")
    ).dequantize()
    assert torch.equal(alone, load(folder, Dense(), torch.float32).lm_head.dequantize())
