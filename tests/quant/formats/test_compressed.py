"""Checkpoints written by llm-compressor in this run: read bit for bit, or refused by name."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.build import ROOT
from methods.architecture import FUSED
from methods.checkpoint import check_transformer, load_transformer, stored_in
from methods.transformer import Transformer
from quant.formats.compressed import read_compressed
from quant.formats.compressed_layouts import PackedLayout
from quant.formats.compressed_write import describe, write_layer
from quant.fp8 import FP8
from quant.scheme import Scheme
from quant.stored import AsStored
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16
from tests.family import llama_config, write_llama
from tests.quant.formats.compressed_cases import LOADS, REFUSED

FIXTURES = ROOT / "tests" / "fixtures" / "compressed_g_idx"
LAYERS = 2
OURS: dict[str, Scheme] = {
    "w4a16": W4A16(group_size=32, symmetric=True, range_search=False),
    "w4a16-asym": W4A16(group_size=32, symmetric=False, range_search=False),
    "w8a16-asym": W8A16(group_size=-1, symmetric=False, range_search=False),
    "w8a8": W8A8(smooth_alpha=None),
    "fp8": FP8(),
}
# Integer inputs: the package takes absmax / 127.5 where the schemes here take absmax / 127.
NEAR = {"": 1e-5, "float": 1e-5, "int": 0.1}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if find_spec("llmcompressor") is None:
        pytest.skip("needs llmcompressor")
    out = tmp_path_factory.mktemp("compressed")
    dense = write_llama(out / "dense", llama_config(num_hidden_layers=LAYERS), seed=1)
    for name, scheme in OURS.items():
        write_ours(dense, out / f"ours-{name}", scheme)
    module = "tests.quant.formats.write_compressed"
    command = [sys.executable, "-m", module, str(dense), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def write_ours(dense: Path, folder: Path, scheme: Scheme) -> None:
    """Round a dense folder by a scheme, and write it as compressed-tensors."""
    folder.mkdir()
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = describe(scheme, ignore=["lm_head"])
    config["dtype"] = "float32" if isinstance(scheme, FP8) else "float16"
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        layer = write_layer(scheme, scheme.pack(tensor))
        tensors |= {f"{module}.{suffix}": stored for suffix, stored in layer.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def read(folder: Path) -> Transformer:
    return load_transformer(
        folder,
        scheme=AsStored(),
        lm_head=AsStored(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def parts(label: str) -> list[str]:
    """Published names of the layers that one of ours is made of."""
    if label == "lm_head":
        return ["lm_head"]
    _, layer, place, name = label.split(".")
    room = "self_attn" if place == "attention" else "mlp"
    names = FUSED.get(f"{name}_proj", (f"{name[0]}_proj" if name == "out" else f"{name}_proj",))
    return [f"model.layers.{layer}.{room}.{part}" for part in names]


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    kv = model.cache(tokens.shape[1], batch=tokens.shape[0])
    return model.logits(model(tokens, torch.arange(tokens.shape[1]), kv).hidden)


@pytest.mark.parametrize("name", LOADS)
def test_weights_are_those_of_the_package_bit_for_bit(written: Path, name: str) -> None:
    reference = load_file(written / f"{name}.reference.safetensors")
    model = read(written / name)
    assert len(model.linears) == 4 * LAYERS + 1
    for label, layer in model.linears.items():
        expected = torch.cat([reference[f"{part}.weight"] for part in parts(label)])
        assert expected.dtype == getattr(torch, LOADS[name].dtype)
        assert torch.equal(layer.dequantize().to(expected.dtype), expected), label


@pytest.mark.parametrize("name", LOADS)
def test_logits_are_near_the_packages(written: Path, name: str) -> None:
    reference = load_file(written / f"{name}.reference.safetensors")
    found = logits(read(written / name), reference["tokens"])
    error = (found - reference["logits"]).norm() / reference["logits"].norm()
    assert error < NEAR[LOADS[name].inputs]


@pytest.mark.parametrize("name", LOADS)
def test_labels_name_schemes_and_the_format(written: Path, name: str) -> None:
    found = stored_in(written / name, AsStored(), AsStored())
    assert found.label == f"{LOADS[name].label}+compressed-tensors"


def test_layers_that_are_ignored_stay_dense_and_others_take_the_scheme_that_names_them(
    written: Path,
) -> None:
    linears = read(written / "two-schemes").linears
    kinds = {label: type(layer).__name__ for label, layer in linears.items()}
    assert kinds["blocks.0.attention.qkv"] == "WeightOnlyLinear"
    assert kinds["blocks.0.mlp.down"] == "W8A8Linear"
    assert kinds["blocks.0.attention.out"] == "DenseLinear"  # that no target names
    assert kinds["blocks.1.attention.qkv"] == "StackedLinear"  # its first part is ignored
    assert kinds["blocks.1.mlp.down"] == "DenseLinear"


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_scheme_computes_is_refused_by_name(written: Path, name: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        check_transformer(written / name)


def test_static_scales_of_activations_are_refused(written: Path, tmp_path: Path) -> None:
    group = {"group_0": {"input_activations": {"dynamic": False, "strategy": "tensor"}}}
    folder = edited(written / "fp8-tensor-dynamic", tmp_path, {"config_groups": group})
    with pytest.raises(ValueError, match="input_activations: dynamic must be True, got False"):
        check_transformer(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be null"),
        ({"quantization_status": "frozen"}, "quantization_status must be compressed.*'frozen'"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "empty or dense.*24-bitmask"),
        ({"config_groups": {"group_0": {"format": "marlin-24"}}}, "format must be .*'marlin-24'"),
        ({"config_groups": {"group_0": {"output_activations": {}}}}, "output_activations must be"),
        ({"config_groups": {"group_0": {"weights": None}}}, "got activations alone"),
        ({"config_groups": {"group_0": {"input_activations": {"num_bits": 8}}}}, "got 8 bits"),
        ({"config_groups": {"group_0": {"targets": "Linear"}}}, "targets must be a list of names"),
        ({"config_groups": {"group_0": {"targets": ["Conv1d"]}}}, "must name layers of the file"),
        ({"config_groups": {"group_0": {"weights": {"group_size": 48}}}}, "group_size=48.*K=128"),
        ({"config_groups": {"group_0": {"weights": {"actorder": "group"}}}}, "missing.*g_idx"),
    ],
)
def test_variants_are_refused_by_name(
    written: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    folder = edited(written / "w4a16-sym-g32", tmp_path, changes)
    with pytest.raises(ValueError, match=message):
        check_transformer(folder)


def edited(folder: Path, out: Path, changes: dict[str, Any]) -> Path:
    """The same files with some settings changed."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    merge(config["quantization_config"], changes)
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (out / "model.safetensors").symlink_to(folder / "model.safetensors")
    return out


def merge(values: dict[str, Any], changes: dict[str, Any]) -> None:
    for key, change in changes.items():
        if isinstance(change, dict) and isinstance(values.get(key), dict):
            merge(values[key], change)
        else:
            values[key] = change


def test_a_quantised_embedding_is_refused(written: Path, tmp_path: Path) -> None:
    folder = edited(written / "w4a16-sym-g32", tmp_path, {})
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    tensors["model.embed_tokens.weight_scale"] = torch.ones(1)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match="embed_tokens must be dense"):
        check_transformer(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_rows_and_outputs_may_end_within_a_word(written: Path, bits: int) -> None:
    tensors = load_file(written / f"odd-{bits}.safetensors")
    reference = tensors.pop("reference")
    layout = PackedLayout(
        bits=bits, group_size=-1, symmetric=False, per_tensor=False, ordered=False
    )
    found = layout.scheme.layer(layout.read(tensors)).dequantize()
    assert torch.equal(found, reference)
    for name, spec in layout.specs(*reference.shape).items():
        assert tensors[name].shape == spec.shape, name
        assert tensors[name].dtype in spec.dtypes, name


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["sym", "asym"])
def test_groups_of_scattered_inputs_are_gathered(bits: int, zeros: str) -> None:
    # By compressed-tensors 0.12.2 (scripts/fixtures/compressed_g_idx.py): no later one writes them.
    tensors = load_file(FIXTURES / f"{bits}bit-{zeros}.safetensors")
    reference = tensors.pop("reference")
    layout = ordered(bits=bits, symmetric=zeros == "sym")
    assert tensors.keys() == layout.specs(*reference.shape).keys()
    found = layout.scheme.layer(layout.read(tensors)).dequantize()
    assert torch.equal(found.to(reference.dtype), reference)


def test_groups_of_unlike_sizes_are_refused() -> None:
    tensors = load_file(FIXTURES / "4bit-sym.safetensors")
    tensors["weight_g_idx"][0] = (tensors["weight_g_idx"][0] + 1) % 3
    with pytest.raises(ValueError, match="g_idx must put 32 inputs into each group"):
        ordered(bits=4, symmetric=True).read(tensors)


def ordered(*, bits: int, symmetric: bool) -> PackedLayout:
    return PackedLayout(
        bits=bits, group_size=32, symmetric=symmetric, per_tensor=False, ordered=True
    )


@pytest.mark.parametrize("name", OURS)
def test_the_package_opens_our_files_to_our_weights(written: Path, name: str) -> None:
    reference = load_file(written / f"ours-{name}.reference.safetensors")
    for label, layer in read(written / f"ours-{name}").linears.items():
        expected = torch.cat([reference[f"{part}.weight"] for part in parts(label)])
        assert torch.equal(layer.dequantize().to(expected.dtype), expected), label


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize(("n", "k"), [(20, 64), (13, 32)])
def test_what_is_written_reads_back(name: str, n: int, k: int) -> None:
    scheme = OURS[name]
    stored = scheme.pack(torch.randn(n, k, generator=torch.Generator().manual_seed(n)))
    tensors = write_layer(scheme, stored)
    names = {f"lm_head.{suffix}" for suffix in tensors}
    layout = read_compressed(describe(scheme, ignore=[]), names).layout("lm_head")
    assert layout is not None
    for suffix, spec in layout.specs(n, k).items():
        assert tensors[suffix].shape == spec.shape, suffix
    found = layout.read(tensors)
    assert found.keys() == stored.keys()
    for key, tensor in stored.items():
        assert found[key].dtype == tensor.dtype, key
        assert torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8)), key


def test_what_the_format_cannot_hold_is_not_written() -> None:
    smooth = W8A8(smooth_alpha=0.5)
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="folded weights, got smooth"):
        write_layer(smooth, smooth.pack(weight, torch.ones(64)))
    ordered = OURS["w4a16"].pack(weight) | {"order": torch.arange(64, dtype=torch.int32)}
    with pytest.raises(ValueError, match="in their own order, got order"):
        write_layer(OURS["w4a16"], ordered)
    with pytest.raises(ValueError, match="got w4a8-qqq-channel"):
        describe(W4A8QQQ(group_size=-1, range_search=False), ignore=[])
