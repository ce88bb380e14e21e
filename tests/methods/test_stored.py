"""Checkpoints whose layers are quantised already: read as they are, or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.build import ROOT, build
from methods.architecture import FUSED, transformer_shapes
from methods.checkpoint import check_transformer, load_transformer, stored_in
from methods.transformer import Transformer
from quant.dense import Dense
from quant.formats.native import SCHEMES, describe, native_config
from quant.scheme import Scheme, rows
from quant.stored import AsStored
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from tests.family import llama_config, write_llama

NAMES = {"qkv": "self_attn.qkv_proj", "gate_up": "mlp.gate_up_proj"}
GROUPS = W4A16(group_size=32, symmetric=True, range_search=False)


def scheme_of(name: str) -> Scheme:
    node = OmegaConf.load(ROOT / "conf" / "quant" / f"{name}.yaml")
    return build(node, Scheme, key="quant")  # type: ignore[type-abstract]


def read(folder: Path, scheme: Scheme, lm_head: Scheme | None = None) -> Transformer:
    return load_transformer(
        folder,
        scheme=scheme,
        lm_head=lm_head or Dense(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def native_tensors(folder: Path, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a dense folder, its decoder layers packed one by one."""
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        absmax = torch.ones(tensor.shape[1]) if scheme.needs_absmax else None
        for suffix, stored in scheme.pack(tensor, absmax).items():
            tensors[f"{module}.{suffix}"] = stored
    return tensors


def write_native(folder: Path, out: Path, scheme: Scheme) -> Path:
    out.mkdir()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = native_config(scheme=scheme, lm_head=None, rounding="nearest")
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(native_tensors(folder, scheme), out / "model.safetensors")
    return out


def edit(folder: Path, **changes: Any) -> None:  # noqa: ANN401
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("dense") / "model", llama_config(), seed=1)


@pytest.fixture
def stored(dense: Path, tmp_path: Path) -> Path:
    return write_native(dense, tmp_path / "stored", GROUPS)


def native_yamls() -> list[str]:
    names = sorted(path.stem for path in (ROOT / "conf" / "quant").glob("*.yaml"))
    return [name for name in names if type(scheme_of(name)).__name__ in SCHEMES]


@pytest.mark.parametrize("name", native_yamls())
def test_layers_packed_apart_read_as_the_dense_layers_packed_together(
    dense: Path, tmp_path: Path, name: str
) -> None:
    scheme = scheme_of(name)
    if scheme.needs_absmax:
        pytest.skip("its smoothing depends on which layers are packed together")
    folder = write_native(dense, tmp_path / "stored", scheme)
    check_transformer(folder)
    expected, found = read(dense, scheme), read(folder, AsStored())
    assert found.linears.keys() == expected.linears.keys()
    for label, layer in found.linears.items():
        assert type(layer) is type(expected.linears[label])
        assert torch.equal(layer.dequantize(), expected.linears[label].dequantize())
    assert found.weight_bytes == expected.weight_bytes


def test_layers_that_treat_their_input_alike_only_in_part_are_kept_apart(
    dense: Path, tmp_path: Path
) -> None:
    scheme = W8A8(smooth_alpha=0.5)
    model = read(write_native(dense, tmp_path / "stored", scheme), AsStored())
    weights = load_file(dense / "model.safetensors")
    parts = [weights[f"model.layers.0.self_attn.{part}.weight"] for part in FUSED["qkv_proj"]]
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0))
    apart = [scheme.layer(scheme.pack(part, torch.ones(128))) for part in parts]
    layer = model.linears["blocks.0.attention.qkv"]
    assert torch.equal(layer(x), torch.cat([part(x) for part in apart], dim=-1))
    assert layer.weight_bytes == sum(part.weight_bytes for part in apart)


def test_fused_rows_are_cut_where_the_parts_end() -> None:
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(0))
    cut = rows(GROUPS.pack(weight), 4, 9)
    assert torch.equal(
        GROUPS.layer(cut).dequantize(), GROUPS.layer(GROUPS.pack(weight)).dequantize()[4:9]
    )


def test_every_published_layer_has_a_place_in_the_file(stored: Path) -> None:
    names = set(load_file(stored / "model.safetensors"))
    for name in transformer_shapes(check_transformer(stored)):
        module = name.removesuffix(".weight")
        assert (f"{module}.packed" if module.endswith("_proj") else name) in names


def test_a_label_tells_how_codes_were_chosen(stored: Path) -> None:
    assert stored_in(stored, AsStored(), AsStored()).label == "w4a16-g32"
    edit(stored, rounding="gptq")
    assert stored_in(stored, AsStored(), AsStored()).label == "w4a16-g32+gptq"


def test_another_scheme_over_quantised_layers_is_refused(stored: Path) -> None:
    with pytest.raises(ValueError, match="scheme must be `checkpoint`, got dense"):
        stored_in(stored, Dense(), Dense())


def test_a_dense_lm_head_may_be_packed_beside_quantised_layers(stored: Path) -> None:
    model = read(stored, AsStored(), W8A8(smooth_alpha=None))
    assert type(model.lm_head).__name__ == "W8A8Linear"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method must be one of .*got 'bitsandbytes'"),
        ({"schema": 2}, "schema must be 1, got 2"),
        ({"scheme": {"name": "W2A2"}}, r"scheme.name must be one of .*got 'W2A2'"),
        ({"scheme": {"name": "W4A16", "bits": 4}}, "scheme: .*bits"),
        ({"scheme": describe(GROUPS) | {"group_size": 48}}, "multiple of group_size=48, got K=128"),
    ],
)
def test_an_unknown_format_is_refused_by_name(
    stored: Path, changes: dict[str, Any], message: str
) -> None:
    edit(stored, **changes)
    with pytest.raises(ValueError, match=message):
        check_transformer(stored)


def test_a_stored_tensor_of_another_dtype_is_refused(stored: Path) -> None:
    path = stored / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.down_proj.packed"
    tensors[name] = tensors[name].to(torch.int32)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"down_proj.packed must be torch.uint8, got torch.int32"):
        check_transformer(stored)
