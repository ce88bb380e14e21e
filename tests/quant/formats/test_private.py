"""SpecMQuant's layouts, packed by the toolkits it takes them from: read bit for bit, or refused."""

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
from methods.checkpoint import load_transformer, stored_in
from methods.transformer import Transformer
from quant.formats import read_quantization
from quant.formats.marlin import MARLIN, QQQ_CHANNEL, QQQ_GROUPS, TileOrder, tiles_spec, untile
from quant.stored import AsStored
from quant.w8a8 import W8A8
from tests.family import llama_config, write_checkpoint, write_llama

LAYERS = 2
# The packers want outputs in multiples of 256 and inputs in multiples of 128.
SIZES = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
NAMES = ("w4a16-g128", "w4a16-channel", "w4a8-qqq-g128", "w4a8-qqq-channel")
PLACES = {
    "attention.qkv": "self_attn.qkv_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate_up": "mlp.gate_up_proj",
    "mlp.down": "mlp.down_proj",
}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=LAYERS, **SIZES)
    return write_llama(tmp_path_factory.mktemp("dense"), config, seed=1)


@pytest.fixture(scope="module")
def written(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in ("auto_gptq", "gptqmodel"):
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    out = tmp_path_factory.mktemp("private")
    module = "tests.quant.formats.write_private"
    command = [sys.executable, "-m", module, str(dense), str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def read(folder: Path) -> Transformer:
    return load_transformer(
        folder,
        scheme=AsStored(),
        lm_head=AsStored(),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_those_of_the_packer_bit_for_bit(written: Path, name: str) -> None:
    reference = load_file(written / f"{name}.reference.safetensors")
    linears = read(written / name).linears
    assert len(reference) == len(linears) - 1 == len(PLACES) * LAYERS
    for layer in range(LAYERS):
        for ours, published in PLACES.items():
            expected = reference[f"model.layers.{layer}.{published}"]
            found = linears[f"blocks.{layer}.{ours}"].dequantize()
            assert torch.equal(found.to(expected.dtype), expected), published


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_near_those_of_the_opened_weights(
    written: Path, dense: Path, tmp_path: Path, name: str
) -> None:
    # Of whole models, so that parts of fused layers are taken for what they are.
    reference = load_file(written / f"{name}.reference.safetensors")
    tensors = load_file(dense / "model.safetensors")
    for fused, opened in reference.items():
        place, _, last = fused.rpartition(".")
        parts = [f"{place}.{part}.weight" for part in FUSED.get(last, (last,))]
        rows = opened.float().split([len(tensors[part]) for part in parts])
        tensors |= {part: row.contiguous() for part, row in zip(parts, rows, strict=True)}
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    opened_folder = write_checkpoint(tmp_path / "opened", config, tensors)
    tokens = torch.arange(24).reshape(2, 12) * 7 % 96
    expected = logits(read(opened_folder), tokens)
    found = logits(read(written / name), tokens)
    assert (found - expected).norm() / expected.norm() < (0.1 if "a8" in name else 0.01)


def logits(model: Transformer, tokens: Tensor) -> Tensor:
    kv = model.cache(tokens.shape[1], batch=tokens.shape[0])
    return model.logits(model(tokens, torch.arange(tokens.shape[1]), kv).hidden)


@pytest.mark.parametrize("name", NAMES)
def test_labels_name_the_scheme_and_the_toolkit(written: Path, name: str) -> None:
    toolkit = "qqq" if "qqq" in name else "gptq"
    assert stored_in(written / name, AsStored(), AsStored()).label == f"{name}+{toolkit}"


def by_the_definition(order: TileOrder, words: Tensor) -> list[list[int]]:
    """Walk the warps as quant.formats.marlin describes them. words: [K / 16, 2N]."""
    rows, width = words.shape
    weight = [[-1] * (rows * 16) for _ in range(width // 2)]
    for row in range(rows):
        for word, value in enumerate(words[row].tolist()):
            tile, place = divmod(word, 128)
            thread, sixteen = divmod(place, 4)
            for nibble in range(8):
                slot = order.slots[nibble]
                n = 64 * tile + 16 * sixteen + thread // 4 + 8 * (slot // 4)
                k = 16 * row + order.inputs[slot % 4] + order.step * (thread % 4)
                weight[n][k] = (value >> (4 * nibble)) & 15
    return weight


@pytest.mark.parametrize("order", [MARLIN, QQQ_GROUPS, QQQ_CHANNEL])
def test_tiles_are_opened_as_threads_hold_them(order: TileOrder) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (3, 256), dtype=torch.int32, generator=generator)
    assert untile(words, order).tolist() == by_the_definition(order, words)


def w8a8_folder(dense: Path, out: Path) -> tuple[Path, dict[str, Tensor]]:
    """A folder as the engine's loader takes it: DeepCompressor's names, no quantization_config."""
    tensors, reference = {}, {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            tensors[name] = tensor
            continue
        scale = (tensor.abs().amax(1) / 127).half()
        codes = (tensor / scale.float().unsqueeze(1)).round().clamp(-127, 127).to(torch.int8)
        tensors |= {f"{module}.weight": codes, f"{module}.dequant_scale": scale}
        reference[module] = codes.float() * scale.float().unsqueeze(1)
    (out / "config.json").write_text((dense / "config.json").read_text("utf-8"), encoding="utf-8")
    save_file(tensors, out / "model.safetensors")
    return out, reference


def test_w8a8_is_told_by_its_names_and_taken_as_it_is(dense: Path, tmp_path: Path) -> None:
    folder, reference = w8a8_folder(dense, tmp_path)
    model = read(folder)
    for layer in range(LAYERS):
        place = f"model.layers.{layer}.self_attn"
        expected = torch.cat([reference[f"{place}.{part}"] for part in FUSED["qkv_proj"]])
        assert torch.equal(model.linears[f"blocks.{layer}.attention.qkv"].dequantize(), expected)
    assert stored_in(folder, AsStored(), AsStored()).label == "w8a8+deepcompressor"
    assert stored_in(folder, AsStored(), AsStored()).scheme == W8A8(smooth_alpha=None)


def test_qoq_tiles_are_refused_by_name() -> None:
    names = {"model.layers.0.self_attn.q_proj.s1_scales"}
    with pytest.raises(ValueError, match="got QServe's 32 x 32 tiles of W4A8-QoQ"):
        read_quantization({"model_type": "llama"}, names)


FUSED_NAMES = {f"model.layers.0.self_attn.qkv_proj.{name}" for name in ("qweight", "scales")}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}


def config(values: dict[str, Any], model_type: str = "llama") -> dict[str, Any]:
    return {"model_type": model_type, "quantization_config": values}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits must be 4, got 8"),
        ({"sym": False}, "sym must be True .*keeps no zeros.*got False"),
        ({"desc_act": True}, "desc_act must be false, or static_groups true.*got desc_act true"),
        ({"group_size": None}, "group_size must be an integer, got None"),
    ],
)
def test_what_the_converter_dropped_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_quantization(config(GPTQ | changes), FUSED_NAMES)


def test_act_order_in_static_groups_needs_nothing_that_was_dropped() -> None:
    values = GPTQ | {"desc_act": True, "static_groups": True}
    found = read_quantization(config(values), FUSED_NAMES)
    assert found is not None
    assert found.fused
    assert found.label == "w4a16-g128+gptq"


@pytest.mark.parametrize(("n", "k"), [(96, 64), (64, 72)])
def test_shapes_that_tiles_cannot_hold_are_refused(n: int, k: int) -> None:
    with pytest.raises(ValueError, match=f"multiple of 64 and K of 16, got N={n} and K={k}"):
        tiles_spec(n, k)
