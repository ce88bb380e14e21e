"""Folders that the packages quantise and save in the test run: read, opened, and run.

Their logits are in the package's float16 or bfloat16 and ours in float32, so that the two agree
only as far as the package's dtype goes; weights agree bit for bit.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.checkpoint import check_transformer, load_transformer, stored_in
from methods.weights import Weights, read_config
from quant.formats import read_quantization
from quant.stored import AsStored

# The first test waits for the packages to quantise.
pytestmark = pytest.mark.timeout(900)

# Labels, and how far the largest difference of logits may be, relative to the largest logit. Half
# precision rounds to 2^-11 in each of some thirty steps; bfloat16 to 2^-8; QQQ rounds activations,
# where a difference in the last place turns into one of a whole step.
MODELS = {
    "gptq-llama": ("w4a16-g32-asym+gptq", 0.01),
    "gptq-dynamic-llama": ("w8a16-g64+gptq+dynamic", 0.01),
    "gptq-static-qwen2": ("w4a16-g64+gptq", 0.01),
    "awq-llama": ("w4a16-g32+awq", 0.01),
    "awq-asym-qwen2": ("w4a16-g64-asym+awq", 0.05),
    "autoawq-llama": ("w4a16-g32-asym+awq", 0.01),
    "qqq-llama": ("w4a8-qqq-channel+qqq", 0.05),
}
ORDERED = "gptq-llama"


def meaning(models: Path, name: str) -> dict[str, Tensor]:
    return load_file(models / f"{name}.safetensors")


def logits(folder: Path, tokens: Tensor) -> Tensor:
    model = load_transformer(
        folder,
        scheme=AsStored(),
        lm_head=AsStored(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    kv = model.cache(len(tokens))
    read = model(tokens.unsqueeze(0), torch.arange(len(tokens)), kv)
    return model.logits(read.hidden)[0]


@pytest.mark.parametrize("name", MODELS)
def test_every_quantised_layer_opens_to_the_packages_weight(models: Path, name: str) -> None:
    weights, reference = Weights(models / name), meaning(models, name)
    quantization = read_quantization(read_config(models / name), weights.keys())
    assert quantization is not None
    opened = {}
    for module in reference.keys() - {"tokens", "logits"}:
        layout = quantization.layout(module)
        assert layout is not None
        names = [f"{module}.{suffix}" for suffix in layout.specs(*reference[module].shape)]
        tensors = {name.removeprefix(f"{module}."): weights[name] for name in names}
        weight = layout.scheme.layer(layout.read(tensors)).dequantize()
        opened[module] = torch.equal(weight.to(reference[module].dtype), reference[module])
    assert opened == dict.fromkeys(opened, True)
    assert len(opened) == 14  # seven in each of two blocks; dynamic leaves one and adds lm_head


@pytest.mark.parametrize(("name", "tolerance"), [(k, v[1]) for k, v in MODELS.items()])
def test_logits_are_the_packages_but_for_its_precision(
    models: Path, name: str, tolerance: float
) -> None:
    check_transformer(models / name)
    reference = meaning(models, name)
    expected = reference["logits"].float()
    difference = (logits(models / name, reference["tokens"]) - expected).abs().max()
    assert difference < tolerance * expected.abs().max()


@pytest.mark.parametrize(("name", "label"), [(k, v[0]) for k, v in MODELS.items()])
def test_a_label_names_the_scheme_and_the_algorithm(models: Path, name: str, label: str) -> None:
    stored = stored_in(models / name, AsStored(), AsStored())
    assert stored.label == label
    # GPTQModel itself puts a rule for lm_head into the file.
    assert stored.lm_head == ("w8a16-g32" if name == "gptq-dynamic-llama" else "dense")


def test_act_order_that_is_dropped_would_show(models: Path, tmp_path: Path) -> None:
    reference = meaning(models, ORDERED)
    expected = reference["logits"].float()
    folder = edited(models / ORDERED, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith(".g_idx")]:
        tensors[name] = tensors[name].sort().values
    save_file(tensors, folder / "model.safetensors")
    difference = (logits(folder, reference["tokens"]) - expected).abs().max()
    assert difference > 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.down_proj.g_idx", -1, "model.layers.1.mlp.down_proj: g_idx must be"),
        (
            "model.layers.1.mlp.down_proj.scales",
            float("nan"),
            "model.layers.1.mlp.down_proj: scales must be finite",
        ),
    ],
)
def test_wrong_values_are_named_by_folder_and_layer(
    models: Path, tmp_path: Path, name: str, value: float, message: str
) -> None:
    folder = edited(models / ORDERED, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"^{folder}: {message}"):
        logits(folder, torch.tensor([0]))


def test_a_folder_with_quantize_config_json_alone_reads_the_same(
    models: Path, tmp_path: Path
) -> None:
    folder = edited(models / ORDERED, tmp_path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    older = {key: values[key] for key in ("bits", "group_size", "desc_act", "sym", "meta")}
    (folder / "quantize_config.json").write_text(json.dumps(older), encoding="utf-8")
    assert stored_in(folder, AsStored(), AsStored()).label == "w4a16-g32-asym+gptq"
    tokens = meaning(models, ORDERED)["tokens"]
    assert torch.equal(logits(folder, tokens), logits(models / ORDERED, tokens))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "bits must be 4 or 8, got 3"),
        ({"bits": 8}, r"q_proj.qweight must be \[32, 128\], got \[16, 128\]"),
        ({"group_size": 64}, r"q_proj.qzeros must be \[2, 16\], got \[4, 16\]"),
        ({"lm_head": True}, "missing lm_head.g_idx, .* superfluous lm_head.weight"),
        ({"checkpoint_format": "gptq_p", "format": "gptq_p"}, "format must be .*got 'gptq_p'"),
    ],
)
def test_a_folder_that_its_config_does_not_describe_is_refused(
    models: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_transformer(edited(models / ORDERED, tmp_path, **changes))


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float64, "scales must be torch.float16 or torch.bfloat16 or .*got torch.float64"),
        (torch.int32, "scales must be torch.float16 or .*got torch.int32"),
    ],
)
def test_scales_of_another_dtype_are_refused(
    models: Path, tmp_path: Path, dtype: torch.dtype, message: str
) -> None:
    folder = edited(models / ORDERED, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.down_proj.scales"
    save_file(tensors | {name: tensors[name].to(dtype)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        check_transformer(folder)


def edited(folder: Path, tmp_path: Path, **changes: Any) -> Path:  # noqa: ANN401
    """Copy a folder, and change its quantization_config."""
    copy = Path(shutil.copytree(folder, tmp_path / "edited"))
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    (copy / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return copy
