"""Layers are rounded in order, on what the layers rounded before them give."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.architecture import EMBEDDING
from methods.checkpoint import build_transformer, check_transformer, open_packer
from methods.packer import Packer
from methods.quantize import LAYERS, BlockQuantizer, Rounded, published
from methods.transformer import Transformer
from quant.dense import Dense
from quant.formats import native_config, read_quantization
from quant.gptq import GPTQ
from quant.rounding import Nearest, Rounding
from quant.scheme import Scheme
from quant.stored import AsStored
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from tests.family import llama_config, write_llama

CPU = torch.device("cpu")
SCHEME = W4A16(group_size=32, symmetric=True, range_search=False)
GPTQ_ = GPTQ(damping=0.01, max_damping=1.0, block_size=32, desc_act=False, static_groups=False)
TEXTS = [[(7 * i + j) % 96 for i in range(60)] for j in range(6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=2)
    return write_llama(tmp_path_factory.mktemp("dense") / "model", config, seed=1)


def quantizer(
    folder: Path, scheme: Scheme, rounding: Rounding, texts: list[list[int]]
) -> BlockQuantizer:
    dense = open_packer(folder, Dense(), dtype=torch.float32, device=CPU)
    return BlockQuantizer(
        dense,
        check_transformer(folder),
        scheme=scheme,
        rounding=rounding,
        embedding=dense.tensor(EMBEDDING),
        texts=texts,
    )


def all_blocks(work: BlockQuantizer) -> list[list[Rounded]]:
    return [list(work.block(number)) for number in range(work.shape.num_layers)]


def in_scheme(folder: Path, scheme: Scheme) -> Transformer:
    packer = open_packer(folder, scheme, dtype=torch.float32, device=CPU)
    return build_transformer(check_transformer(folder), packer, Dense())


def test_nearest_gives_what_loading_in_the_scheme_gives(folder: Path) -> None:
    expected = in_scheme(folder, SCHEME)
    for number, block in enumerate(all_blocks(quantizer(folder, SCHEME, Nearest(), []))):
        assert tuple(rounded.layer for rounded in block) == LAYERS
        for rounded in block:
            found = SCHEME.layer(rounded.stored).dequantize()
            layer = expected.linears[f"blocks.{number}.{rounded.layer}"]
            assert torch.equal(found, layer.dequantize())
            assert rounded.output_error is None


def test_hidden_states_are_those_of_the_rounded_model(folder: Path) -> None:
    work = quantizer(folder, SCHEME, Nearest(), TEXTS[:1])
    all_blocks(work)
    model = in_scheme(folder, SCHEME)
    n = len(TEXTS[0])
    read = model(torch.tensor(TEXTS[:1]), torch.arange(n), model.cache(n))
    torch.testing.assert_close(model.norm(work.hidden[0]), read.hidden)


def inputs_of(model: Transformer, name: str) -> Tensor:
    """What a layer of a model reads of all texts. [rows, K]."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0].flatten(0, -2))

    handle = model.get_submodule(name).register_forward_pre_hook(keep)
    for text in TEXTS:
        model(torch.tensor([text]), torch.arange(len(text)), model.cache(len(text)))
    handle.remove()
    return torch.cat(kept)


def test_errors_are_those_of_the_outputs_on_the_inputs_that_come(folder: Path) -> None:
    # The last layer of the last block reads what all rounded layers before it give.
    last = all_blocks(quantizer(folder, SCHEME, Nearest(), TEXTS))[-1][-1]
    x = inputs_of(in_scheme(folder, SCHEME), "blocks.1.mlp.down")
    weight = in_scheme(folder, Dense()).linears["blocks.1.mlp.down"].dequantize()
    rounded = SCHEME.layer(last.stored).dequantize()
    lost = F.linear(x, weight - rounded).square().sum() / F.linear(x, weight).square().sum()
    assert last.output_error == pytest.approx(float(lost), rel=1e-4)
    own = (weight - rounded).square().sum() / weight.square().sum()
    assert last.weight_error == pytest.approx(float(own), rel=1e-5)


@pytest.mark.parametrize("scheme", [SCHEME, W4A8QQQ(group_size=-1, range_search=True)])
def test_gptq_loses_less_of_every_layers_output_than_nearest(folder: Path, scheme: Scheme) -> None:
    nearest = next(quantizer(folder, scheme, Nearest(), TEXTS).block(0))
    calibrated = next(quantizer(folder, scheme, GPTQ_, TEXTS).block(0))
    assert nearest.output_error is not None
    assert calibrated.output_error is not None
    assert calibrated.output_error < 0.8 * nearest.output_error
    assert calibrated.weight_error > nearest.weight_error  # it trades the one for the other


def test_smoothing_looks_at_the_largest_inputs(folder: Path) -> None:
    scheme = W8A8(smooth_alpha=0.5)
    (first, *_) = all_blocks(quantizer(folder, scheme, Nearest(), TEXTS))[0]
    x = inputs_of(in_scheme(folder, Dense()), "blocks.0.attention.qkv")
    weight = in_scheme(folder, Dense()).linears["blocks.0.attention.qkv"].dequantize()
    expected = scheme.pack(weight, x.abs().amax(0))
    assert torch.equal(first.stored["smooth"], expected["smooth"])


def test_text_is_asked_for_where_it_is_needed(folder: Path) -> None:
    with pytest.raises(ValueError, match="w4a16-g32 by gptq needs calibration texts"):
        quantizer(folder, SCHEME, GPTQ_, [])


def test_a_skipped_block_leaves_the_texts_where_the_rounded_one_did(folder: Path) -> None:
    worked, skipped = (quantizer(folder, SCHEME, GPTQ_, TEXTS) for _ in range(2))
    shape = worked.shape
    tensors: dict[str, Tensor] = {}
    for rounded in worked.block(0):
        tensors |= published(0, rounded.layer, rounded.stored, shape)
    dense = worked.dense.weights.items()
    weights = {name: tensor for name, tensor in dense if "_proj" not in name} | tensors
    own = native_config(scheme=SCHEME, lm_head=None, rounding="gptq")
    packer = Packer(
        weights,
        AsStored(),
        dtype=torch.float32,
        device=CPU,
        quantization=read_quantization({"quantization_config": own}, set()),
    )
    skipped.skip(packer.block(0, shape))
    for a, b in zip(worked.hidden, skipped.hidden, strict=True):
        assert torch.equal(a, b)
