"""Write SpecMQuant's layouts with the toolkits' packers: python -m ...write_private DENSE OUT.

In a process of its own: the packages patch torch, set thread pools and log. Layers are packed by
the toolkits; joining them under fused names is all that the engine's converter adds, and done here.
Beside each folder OUT/NAME lies OUT/NAME.reference.safetensors: the weights that were handed to the
packer or, of QQQ, that the package opens its file to.
"""

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from methods.architecture import FUSED

# GPTQModel fails on two cores unless it is told how many workers to take.
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

Tensors = dict[str, Tensor]
Pack = Callable[[list[Tensor]], tuple[Tensors, Tensor]]

GPTQ_CONFIG = {
    "quant_method": "gptq",
    "bits": 4,
    "damp_percent": 0.01,
    "desc_act": False,
    "is_marlin_format": False,
    "model_file_base_name": None,
    "model_name_or_path": None,
    "static_groups": False,
    "sym": True,
    "true_sequential": True,
}


def write_folders(dense: Path, out: Path) -> None:
    """Write every kind in every grouping its engine takes."""
    torch.set_num_threads(1)
    config = json.loads((dense / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(dense / "model.safetensors")
    marlin = _import_marlin()
    for label, group_size in (("g128", 128), ("channel", -1)):
        pack = _marlin_packer(marlin, group_size)
        values = GPTQ_CONFIG | {"group_size": group_size}
        _write(out / f"w4a16-{label}", config, values, _joined(tensors, pack))
        values = {"quant_method": "qqq", "wbits": 4, "group_size": group_size}
        pack = _qqq_packer(group_size)
        _write(out / f"w4a8-qqq-{label}", config, values, _joined(tensors, pack))


def _write(
    folder: Path, config: dict[str, Any], values: dict[str, Any], made: tuple[Tensors, Tensors]
) -> None:
    folder.mkdir()
    text = json.dumps(config | {"quantization_config": values})
    (folder / "config.json").write_text(text, encoding="utf-8")
    tensors, reference = ({k: t.contiguous() for k, t in part.items()} for part in made)
    save_file(tensors, folder / "model_gptq.safetensors")
    save_file(reference, folder.with_name(f"{folder.name}.reference.safetensors"))


def _joined(dense: Tensors, pack: Pack) -> tuple[Tensors, Tensors]:
    """Give a folder's tensors, projections of the same input as one, and opened weights."""
    places = {parts[0]: (name, parts) for name, parts in FUSED.items()}
    skipped = {part for parts in FUSED.values() for part in parts[1:]}
    made, reference = {}, {}
    for name, tensor in dense.items():
        module = name.removesuffix(".weight")
        place, _, last = module.rpartition(".")
        if not last.endswith("_proj"):
            made[name] = tensor.half()
        elif last not in skipped:
            fused, parts = places.get(last, (last, (last,)))
            packed, opened = pack([dense[f"{place}.{part}.weight"] for part in parts])
            made |= {f"{place}.{fused}.{suffix}": t for suffix, t in packed.items()}
            reference[f"{place}.{fused}"] = opened
    return made, reference


def _import_marlin() -> Any:  # noqa: ANN401
    """Import AutoGPTQ's packing class, which asks for a device only to multiply on it."""
    found = importlib.util.find_spec("auto_gptq")
    assert found is not None
    assert found.origin is not None
    root = Path(found.origin).parent
    for name in ("auto_gptq", "auto_gptq.nn_modules", "auto_gptq.nn_modules.qlinear"):
        package = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    torch.cuda.get_device_capability = lambda device=None: (8, 0)
    return importlib.import_module("auto_gptq.nn_modules.qlinear.qlinear_marlin").QuantLinear


def _marlin_packer(packer: Any, group_size: int) -> Pack:  # noqa: ANN401
    def pack(parts: list[Tensor]) -> tuple[Tensors, Tensor]:
        # The converter joins parts before it orders them.
        weight = torch.cat(parts)
        n, k = weight.shape
        size = k if group_size == -1 else group_size
        groups = weight.view(n, -1, size)
        scales = (groups.abs().amax(-1) / 7.5).half()
        steps = scales.float().unsqueeze(-1)
        codes = (groups / steps).round().clamp(-8, 7)
        linear = _linear((codes * steps).flatten(1).half())
        layer = packer(4, size, k, n, bias=False)
        layer.pack(linear, scales)
        return {"qweight": layer.B, "scales": layer.s}, linear.weight.data

    return pack


def _qqq_packer(group_size: int) -> Pack:
    from gptqmodel.nn_modules.qlinear.qqq import QQQTorchLinear

    def pack_part(weight: Tensor) -> tuple[Tensors, Tensor]:
        n, k = weight.shape
        whole = group_size == -1
        groups = weight.view(n, -1, k if whole else group_size)
        scales = groups.abs().amax(-1) / (7 if whole else 7.5)
        low = -7 if whole else -8
        rounded = (groups / scales.unsqueeze(-1)).round().clamp(low, 7) * scales.unsqueeze(-1)
        rounded = rounded.flatten(1)
        layer = QQQTorchLinear(
            bits=4,
            group_size=group_size,
            sym=True,
            desc_act=False,
            in_features=k,
            out_features=n,
            register_buffers=False,
        )
        channel = None if whole else rounded.abs().amax(1) / 127
        layer.pack(_linear(rounded), scales, s_extra=channel)
        opened, s_channel = layer._dequantize_weight_for_torch()
        return layer.state_dict(), (opened * s_channel).t()

    def pack(parts: list[Tensor]) -> tuple[Tensors, Tensor]:
        made = [pack_part(part) for part in parts]
        tensors = {name: torch.cat([each[name] for each, _ in made], dim=-1) for name in made[0][0]}
        return tensors, torch.cat([opened for _, opened in made])

    return pack


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight
    return linear


if __name__ == "__main__":
    write_folders(Path(sys.argv[1]), Path(sys.argv[2]))
