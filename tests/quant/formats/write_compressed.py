"""Write checkpoints with llm-compressor: python -m tests.quant.formats.write_compressed DENSE OUT.

In a process of its own: the packages patch torch and transformers, set thread pools and log. DENSE
is a folder of dense weights. Beside each checkpoint OUT/NAME lies OUT/NAME.reference.safetensors:
the weights that compressed-tensors makes of it, in its own dtype, and the logits of `tokens` in
float32. Folders named OUT/ours-NAME were written before, by us; of these there is only the first.
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform import SpinQuantModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.quant.formats.compressed_cases import LOADS, REFUSED, Case

# Rows that do not fill their last word, and outputs that do not fill their zeros' last word.
ODD_SHAPES = [(4, 20, 36), (8, 10, 18)]


def write_checkpoints(dense: Path, out: Path) -> None:
    """Write every case, those to be refused without a reference."""
    torch.set_num_threads(1)
    tokens = torch.arange(24).reshape(2, 12) * 7 % 96
    for name, case in LOADS.items():
        folder = out / name
        _compress(dense, folder, case)
        reference = {"tokens": tokens, **_opened(folder)}
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            reference["logits"] = whole(tokens).logits
        save_file(reference, out / f"{name}.reference.safetensors")
    for name, (case, _) in REFUSED.items():
        _compress(dense, out / name, case)
    for folder in sorted(out.glob("ours-*")):
        save_file(_opened(folder), out / f"{folder.name}.reference.safetensors")
    for bits, n, k in ODD_SHAPES:
        layer = {name: tensor.contiguous() for name, tensor in _odd_layer(bits, n, k).items()}
        save_file(layer, out / f"odd-{bits}.safetensors")


def _compress(dense: Path, folder: Path, case: Case) -> None:
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=getattr(torch, case.dtype))
    asked: dict[str, Any] = {"ignore": list(case.ignore)}
    if case.preset:
        asked |= {"scheme": case.preset, "targets": "Linear"}
    else:
        asked["config_groups"] = {f"group_{i}": group for i, group in enumerate(case.groups)}
    recipe: list[Any] = [GPTQModifier(**asked) if case.gptq else QuantizationModifier(**asked)]
    if case.rotation:
        rotations = case.rotation.split()
        recipe.insert(0, SpinQuantModifier(rotations=rotations, transform_type="hadamard"))
    data = {}
    if case.gptq:
        rows = torch.randint(0, 96, (8, 32), generator=torch.Generator().manual_seed(0))
        data = {
            "dataset": Dataset.from_dict({"input_ids": rows.tolist()}),
            "num_calibration_samples": 8,
            "max_seq_length": 32,
            # Never used: the rows are tokens already.
            "processor": PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")), pad_token="a"
            ),
        }
    oneshot(model=model, recipe=recipe, **data)
    model.save_pretrained(folder, save_compressed=True)


def _opened(folder: Path) -> dict[str, Tensor]:
    """Give the weights that the package opens a checkpoint to, in the dtype of its file."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    with torch.inference_mode():
        model(torch.zeros(1, 1, dtype=torch.long))
    return {
        f"{name}.weight": module.weight.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def _odd_layer(bits: int, n: int, k: int) -> dict[str, Tensor]:
    torch.manual_seed(bits)
    half = 2 ** (bits - 1)
    args = QuantizationArgs(num_bits=bits, symmetric=False, strategy="channel")
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    tensors = {
        "weight": torch.randn(n, k),
        "weight_scale": torch.rand(n, 1) * 2 / half + 0.01,
        "weight_zero_point": torch.randint(-half, half, (n, 1), dtype=torch.int8),
    }
    written = compressor.compress(tensors, scheme)
    return {**written, "reference": compressor.decompress(written, scheme)["weight"]}


if __name__ == "__main__":
    write_checkpoints(Path(sys.argv[1]), Path(sys.argv[2]))
