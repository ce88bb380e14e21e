"""One layer written by each package in each form it knows: what is asked of it."""

from dataclasses import dataclass
from typing import Any

N, K = 64, 256
MODULE = "model.layers.0.mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer [N, K]. package: who packs it; act_order: none, neighbours (static) or scattered."""

    package: str
    bits: int = 4
    version: str = ""
    symmetric: bool = True
    group_size: int = 128
    act_order: str = "none"
    dtype: str = "float16"
    k: int = K

    def __str__(self) -> str:
        zeros = "sym" if self.symmetric else "asym"
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        parts = [self.package, self.version, f"{self.bits}bit", zeros, group]
        parts += [self.act_order] if self.act_order != "none" else []
        parts += [self.dtype] if self.dtype != "float16" else []
        parts += [f"K{self.k}"] if self.k != K else []
        return "-".join(part for part in parts if part)

    @property
    def config(self) -> dict[str, Any]:
        """What the package writes of it into config.json."""
        return CONFIGS[self.package](self)


def _auto_gptq(case: Case) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "bits": case.bits,
        "group_size": case.group_size,
        "damp_percent": 0.01,
        "desc_act": case.act_order != "none",
        "static_groups": case.act_order == "static",
        "sym": case.symmetric,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "is_marlin_format": False,
    }


def _gptqmodel(case: Case) -> dict[str, Any]:
    return {
        "quant_method": "gptq",
        "method": "gptq",
        "bits": case.bits,
        "group_size": case.group_size,
        "desc_act": case.act_order != "none",
        "static_groups": case.act_order == "static",
        "sym": case.symmetric,
        "lm_head": False,
        "format": case.version,
        "checkpoint_format": case.version,
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:7.6.0"]},
    }


def _auto_awq(case: Case) -> dict[str, Any]:
    return {
        "quant_method": "awq",
        "zero_point": not case.symmetric,
        "group_size": case.group_size,
        "bits": case.bits,
        "version": "gemm",
        "modules_to_not_convert": None,
    }


def _gptqmodel_awq(case: Case) -> dict[str, Any]:
    values = _gptqmodel(case) | {"quant_method": "awq", "method": "awq", "version": "gemm"}
    return values | {
        "format": "gemm",
        "checkpoint_format": "gemm",
        "zero_point": not case.symmetric,
    }


def _gptqmodel_qqq(case: Case) -> dict[str, Any]:
    return _gptqmodel(case) | {
        "quant_method": "qqq",
        "method": "qqq",
        "format": "qqq",
        "checkpoint_format": "qqq",
    }


CONFIGS = {
    "autogptq": _auto_gptq,
    "gptqmodel": _gptqmodel,
    "autoawq": _auto_awq,
    "gptqmodel_awq": _gptqmodel_awq,
    "gptqmodel_qqq": _gptqmodel_qqq,
}

GPTQ = [
    Case(
        package=package,
        version=version,
        bits=bits,
        symmetric=symmetric,
        group_size=group_size,
        act_order=act_order,
    )
    for package, version in (("autogptq", ""), ("gptqmodel", "gptq"), ("gptqmodel", "gptq_v2"))
    for bits in (4, 8)
    for symmetric in (True, False)
    for group_size in (32, 64, 128, -1)
    for act_order in ("none", "static", "scattered")
]
GPTQ += [
    Case(package="autogptq", symmetric=False, group_size=64, dtype=dtype)
    for dtype in ("bfloat16", "float32")
]
AWQ = [
    Case(package=package, symmetric=symmetric, group_size=group_size, dtype=dtype)
    # AutoAWQ packs no GEMM layer without zeros, nor one of whole rows.
    for package, symmetric, groups, dtype in (
        ("autoawq", False, (32, 64, 128), "float16"),
        ("gptqmodel_awq", True, (32, 64, 128, -1), "float16"),
        ("gptqmodel_awq", False, (32, 64, 128, -1), "float16"),
        ("gptqmodel_awq", False, (64,), "bfloat16"),
    )
    for group_size in groups
]
QQQ = [
    Case(package="gptqmodel_qqq", group_size=-1),
    Case(package="gptqmodel_qqq", group_size=128),
    # A group as long as a row is packed as a row.
    Case(package="gptqmodel_qqq", group_size=128, k=128),
]
# A zero of 0, of which one is taken: AutoGPTQ's packing spoils the word, GPTQModel's borrows.
SPOILT = [
    Case(package="autogptq", bits=bits, symmetric=False, group_size=32, act_order="zero of 0")
    for bits in (4, 8)
]
