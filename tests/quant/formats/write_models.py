"""Quantise tiny models with the packages: python -m tests.quant.formats.write_models OUT.

In a process of its own, as tests.quant.formats.write_layers. For each model OUT has a folder as the
package saves it, and beside it <name>.safetensors with what the package makes of the folder:
`logits` [T, V] of `tokens` [T], and under each quantised layer's name its weight [N, K].
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float16",
}
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
}
# What GPTQModel is asked for, of which family.
GPTQMODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "gptq-llama": ("llama", {"bits": 4, "group_size": 32, "desc_act": True, "sym": False}),
    "gptq-dynamic-llama": (
        "llama",
        {
            "bits": 8,
            "group_size": 64,
            "desc_act": False,
            "format": "gptq_v2",
            "lm_head": True,
            "dynamic": {
                r"-:model\.layers\.1\.mlp\.down_proj": {},
                r".*\.0\.self_attn\.o_proj": {"bits": 4, "group_size": 32},
            },
        },
    ),
    "gptq-static-qwen2": (
        "qwen2",
        {"bits": 4, "group_size": 64, "desc_act": True, "static_groups": True, "sym": True},
    ),
    "awq-llama": ("llama", {"method": "awq", "format": "gemm", "bits": 4, "group_size": 32}),
    "awq-asym-qwen2": (
        "qwen2",
        {"method": "awq", "format": "gemm", "bits": 4, "group_size": 64, "sym": False},
    ),
    "qqq-llama": ("llama", {"method": "qqq", "format": "qqq", "bits": 4, "group_size": -1}),
}
# Models that are not of float16.
DTYPES = {"awq-asym-qwen2": torch.bfloat16}


def write_models(out: Path) -> None:
    """Write a folder and what it means for each entry of GPTQMODEL, and one by AutoAWQ."""
    torch.set_num_threads(1)
    dense = {family: _write_dense(out / f"dense-{family}", family) for family in FAMILIES}
    for name, (family, settings) in GPTQMODEL.items():
        _write_gptqmodel(dense[family], out / name, DTYPES.get(name, torch.float16), settings)
    _write_auto_awq(dense["llama"], out / "autoawq-llama")


def _write_dense(folder: Path, family: str) -> Path:
    torch.manual_seed(len(family))
    config, kind = FAMILIES[family]
    model = kind(config(**SIZES)).half()
    for name, parameter in model.named_parameters():
        if name.endswith("_proj.bias"):
            nn.init.normal_(parameter, std=0.5)
        elif parameter.ndim == 2:
            # Decided logits, so that a wrong weight shows.
            nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w0"
    ).save_pretrained(folder)
    return folder


def _texts(count: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


def _write_gptqmodel(
    dense: Path, folder: Path, dtype: torch.dtype, settings: Mapping[str, Any]
) -> None:
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.looper.qqq_processor import QQQProcessor
    from gptqmodel.nn_modules.qlinear.qqq import QQQTorchLinear

    method = settings.get("method", "gptq")
    backend = {
        "gptq": BACKEND.GPTQ_TORCH,
        "awq": BACKEND.AWQ_TORCH,
        "qqq": BACKEND.QQQ_TORCH,
    }[method]
    # On a CPU it packs with the class for GPUs, which refuses, wherever this is not a Mac.
    QQQProcessor._quant_linear_kernel = lambda self: (QQQTorchLinear, BACKEND.QQQ_TORCH)
    # Left to itself it takes bfloat16, to which it rounds the scales of a float16 file on loading.
    config = QuantizeConfig(**settings, offload_to_disk=False)
    model = GPTQModel.load(str(dense), config, dtype=dtype)
    texts = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in _texts(8, 64)]
    model.quantize(texts, batch_size=1, backend=backend)
    model.save(str(folder))
    loaded = GPTQModel.load(str(folder), backend=backend, device="cpu", dtype=dtype)
    if method == "qqq":
        # Loading rounded the float32 scales of channels to float16 on their way.
        loaded.model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    _write_meaning(folder, loaded.model, OPENED[method])


def _write_auto_awq(dense: Path, folder: Path) -> None:
    import awq.modules.linear.gemm as gemm
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    # Its other path needs a GPU, though it is taken wherever triton imports.
    gemm.TRITON_AVAILABLE = False
    model = AutoAWQForCausalLM.from_pretrained(str(dense), device_map="cpu", safetensors=True)
    settings = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    words = PreTrainedTokenizerFast.from_pretrained(dense)
    model.quantize(words, quant_config=settings, calib_data=_texts(8, 64), max_calib_seq_len=64)
    model.save_quantized(str(folder), safetensors=True)

    def open_layer(layer: nn.Module) -> Tensor | None:
        if not isinstance(layer, gemm.WQLinear_GEMM):
            return None
        return dequantize_gemm(
            layer.qweight, layer.qzeros, layer.scales, layer.w_bit, layer.group_size
        ).t()

    _write_meaning(folder, model.model, open_layer)


def _write_meaning(
    folder: Path, model: nn.Module, open_layer: Callable[[nn.Module], Tensor | None]
) -> None:
    tokens = torch.tensor(_texts(1, 24)[0])
    with torch.no_grad():
        logits = model(tokens.unsqueeze(0)).logits[0]
    opened = {name: open_layer(layer) for name, layer in model.named_modules()}
    weights = {name: w.contiguous() for name, w in opened.items() if w is not None}
    save_file({"tokens": tokens, "logits": logits, **weights}, f"{folder}.safetensors")


def _open_gptq(layer: nn.Module) -> Tensor | None:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    return layer.dequantize_weight().t() if isinstance(layer, TorchLinear) else None


def _open_awq(layer: nn.Module) -> Tensor | None:
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    if not isinstance(layer, AwqTorchLinear):
        return None
    return dequantize_gemm(
        layer.qweight, layer.qzeros, layer.scales, layer.bits, layer.group_size
    ).t()


def _open_qqq(layer: nn.Module) -> Tensor | None:
    from gptqmodel.nn_modules.qlinear.qqq import QQQTorchLinear

    if not isinstance(layer, QQQTorchLinear):
        return None
    weight, s_channel = layer._dequantize_weight_for_torch()
    return (weight * s_channel).t()


OPENED: dict[str, Callable[[nn.Module], Tensor | None]] = {
    "gptq": _open_gptq,
    "awq": _open_awq,
    "qqq": _open_qqq,
}

if __name__ == "__main__":
    write_models(Path(sys.argv[1]))
