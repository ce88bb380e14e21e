"""Biases beside quantised layers: a family's own are added, a writer's zeros left out."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from methods.architecture import DENSE, FUSED, stored_tensors
from methods.checkpoint import build_transformer, check_transformer
from methods.packer import Packer
from methods.transformer import Transformer
from quant.dense import Dense
from quant.formats import Spec
from quant.formats.native import NativeQuantization
from quant.stored import AsStored
from tests.family import family_config, llama_config, write_llama
from tests.methods.test_stored import GROUPS, native_tensors, read, write_native


@dataclass(frozen=True, kw_only=True)
class FusedQuantization(NativeQuantization):
    """Our own tensors, with the projections of one input already joined."""

    @property
    def fused(self) -> bool:
        return True


def fused_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Join what FUSED joins, outputs under outputs."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for whole, parts in FUSED.items():
            if f".{parts[0]}." in name:
                pieces = [tensors[name.replace(parts[0], part)] for part in parts]
                made[name.replace(parts[0], whole)] = torch.cat(pieces)
        if not any(f".{part}." in name for parts in FUSED.values() for part in parts):
            made[name] = tensor
    return made


def logits(model: Transformer) -> Tensor:
    tokens = torch.tensor([[0, 5, 17, 23, 42]])
    return model.logits(model(tokens, torch.arange(5), model.cache(5)).hidden)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("qwen2") / "model", family_config("qwen2"), seed=1)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    dense = write_llama(tmp_path / "model", llama_config(), seed=1)
    return write_native(dense, tmp_path / "stored", GROUPS)


def give_biases(folder: Path, bias: Tensor, *modules: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors |= {f"model.layers.1.{module}.bias": bias.clone() for module in modules}
    save_file(tensors, folder / "model.safetensors")


def test_a_familys_biases_are_added_to_quantised_projections(qwen2: Path, tmp_path: Path) -> None:
    stored = write_native(qwen2, tmp_path / "stored", GROUPS)
    assert torch.equal(logits(read(stored, AsStored())), logits(read(qwen2, GROUPS)))


def test_fused_projections_have_fused_biases(qwen2: Path) -> None:
    tensors = fused_tensors(native_tensors(qwen2, GROUPS))
    quantization = FusedQuantization(own=GROUPS, lm_head=None, rounding="nearest")
    shape = check_transformer(qwen2)
    required, _ = stored_tensors(shape, quantization)
    assert required.keys() == tensors.keys()
    fused = Spec(dtypes=DENSE, shape=((4 + 2 + 2) * 32,))
    assert required["model.layers.0.self_attn.qkv_proj.bias"] == fused
    packer = Packer(
        tensors,
        AsStored(),
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization=quantization,
    )
    model = build_transformer(shape, packer, Dense())
    assert torch.equal(logits(model), logits(read(qwen2, GROUPS)))


def test_biases_of_zeros_beside_layers_without_are_left_out(llama: Path) -> None:
    without = logits(read(llama, AsStored()))
    give_biases(llama, torch.zeros(128, dtype=torch.float16), "self_attn.o_proj", "mlp.down_proj")
    give_biases(llama, torch.zeros(64, dtype=torch.float16), "self_attn.k_proj")
    assert torch.equal(logits(read(llama, AsStored())), without)


@pytest.mark.parametrize("module", ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"])
def test_a_bias_that_would_be_dropped_is_refused(llama: Path, module: str) -> None:
    give_biases(llama, torch.zeros(128).index_fill(0, torch.tensor([7]), 1e-3), module)
    with pytest.raises(ValueError, match=f"layers.1.{module}.bias must be all zero"):
        read(llama, AsStored())


def test_a_bias_of_another_size_is_refused(llama: Path) -> None:
    give_biases(llama, torch.zeros(5), "self_attn.q_proj")
    with pytest.raises(ValueError, match=r"q_proj.bias must be \[128\], got \[5\]"):
        check_transformer(llama)


def test_a_bias_beside_a_dense_layer_without_is_refused(tmp_path: Path) -> None:
    folder = write_llama(tmp_path / "model", llama_config(), seed=1)
    give_biases(folder, torch.zeros(128), "self_attn.q_proj")
    with pytest.raises(ValueError, match=r"superfluous model.layers.1.self_attn.q_proj.bias"):
        check_transformer(folder)
