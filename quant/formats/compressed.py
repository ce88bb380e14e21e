"""compressed-tensors: what llm-compressor writes and vLLM reads.

    "quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "format": ..., "weights": {...},
                                      "input_activations": {...} or null}},
        "ignore": ["lm_head"], "kv_cache_scheme": null, "transform_config": {}, ...}

A module takes the scheme of the first target that names it: exact names come before patterns
(`re:...`, matched from the start), patterns before the class, `Linear`; `ignore` comes before all.

Activations are rounded by the schemes here: int8 on a scale of absmax / 127 per token, where the
package's own simulation takes absmax / 127.5.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from quant.formats.compressed_layouts import (
    WEIGHT_ONLY,
    ByteLayout,
    PackedLayout,
    SpreadLayout,
)
from quant.formats.layout import Layout, Quantization
from quant.fp8 import FP8
from quant.scheme import Scheme
from quant.w8a8 import W8A8

METHOD = "compressed-tensors"
PLACE = "quantization_config"
EMBEDDING = "model.embed_tokens"
CLASS = "Linear"
FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized")
# Where a rotation leaves nothing to do when the model runs: it is in the stored weights.
FOLDED = ("weight_input", "weight_output")


@dataclass(frozen=True, kw_only=True)
class CompressedQuantization(Quantization):
    """Layouts by target. targets: in the order in which they are tried, the class last."""

    targets: tuple[tuple[str, Layout], ...]
    ignore: tuple[str, ...]
    schemes: tuple[Scheme, ...] = ()  # of the layers that are there, the most common first

    @property
    def label(self) -> str:
        """All schemes; the file does not say who rounded."""
        labels = dict.fromkeys(scheme.label for scheme in self.schemes)
        return f"{'+'.join(labels)}+{METHOD}"

    @property
    def scheme(self) -> Scheme:
        """Of most layers."""
        return self.schemes[0]

    def layout(self, module: str) -> Layout | None:
        """By the first target that names it."""
        if module == EMBEDDING or any(_names(target, module) for target in self.ignore):
            return None
        for target, layout in self.targets:
            if _names(target, module):
                return layout
        return None


def read_compressed(values: Mapping[str, Any], names: Set[str]) -> Quantization:
    """Read the package's quantization_config. names: of every tensor in the folder."""
    _refuse_beyond_linear(values)
    groups = values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise ValueError(f"{PLACE}: config_groups must hold groups, got {groups!r}")
    layouts: dict[str, Layout] = {}
    for key, group in groups.items():
        place = f"{PLACE}.config_groups.{key}"
        if not isinstance(group, Mapping):
            raise ValueError(f"{place} must be an object, got {group!r}")
        layout = _read_group(place, group, values.get("format"))
        layouts |= dict.fromkeys(_strings(f"{place}.targets", group.get("targets")), layout)
    found = CompressedQuantization(
        targets=tuple(sorted(layouts.items(), key=_rank)),
        ignore=_strings(f"{PLACE}.ignore", values.get("ignore") or []),
    )
    modules = sorted(n.removesuffix(".weight_scale") for n in names if n.endswith(".weight_scale"))
    if EMBEDDING in modules:
        raise ValueError(f"{EMBEDDING} must be dense, got one quantised by {METHOD}")
    counts = Counter(own.scheme for module in modules if (own := found.layout(module)))
    if not counts:
        raise ValueError(f"{PLACE}: config_groups must name layers of the file, got none of them")
    schemes = tuple(scheme for scheme, _ in counts.most_common())
    return CompressedQuantization(targets=found.targets, ignore=found.ignore, schemes=schemes)


def _refuse_beyond_linear(values: Mapping[str, Any]) -> None:
    """Refuse what changes more than a linear layer's weight and input."""
    if values.get("kv_cache_scheme") is not None:
        raise ValueError(f"{PLACE}: kv_cache_scheme must be null, got a quantised KV cache")
    status = values.get("quantization_status", "compressed")
    if status != "compressed":
        raise ValueError(f"{PLACE}: quantization_status must be compressed, got {status!r}")
    sparsity = values.get("sparsity_config") or {}
    if sparsity and sparsity.get("format") != "dense":
        raise ValueError(
            f"{PLACE}: sparsity_config must be empty or dense, got {sparsity.get('format')!r}"
        )
    transforms = (values.get("transform_config") or {}).get("config_groups") or {}
    for key, transform in transforms.items():
        online = [a["location"] for a in transform["apply"] if a["location"] not in FOLDED]
        if online:
            raise ValueError(
                f"{PLACE}.transform_config.{key} must be folded into the weights, got one applied "
                f"while the model runs, at {', '.join(dict.fromkeys(online))}"
            )


def _read_group(place: str, group: Mapping[str, Any], common: object) -> Layout:
    kind = group.get("format") or common
    if kind not in FORMATS:
        raise ValueError(f"{place}: format must be one of {', '.join(FORMATS)}, got {kind!r}")
    if group.get("output_activations") is not None:
        raise ValueError(f"{place}: output_activations must be null, got quantised outputs")
    weights, inputs = group.get("weights"), group.get("input_activations")
    if weights is None:
        raise ValueError(f"{place}: weights must be quantised, got activations alone")
    if kind == "pack-quantized":
        if inputs is not None:
            raise ValueError(
                f"{place}: input_activations of packed weights must be null, got "
                f"{inputs.get('num_bits')} bits"
            )
        return _packed(f"{place}.weights", weights)
    if inputs is None:
        raise ValueError(
            f"{place}: input_activations must be quantised beside {kind} weights, got weights of "
            f"{weights.get('num_bits')} bits alone"
        )
    if weights.get("type") == "float":
        return _bytes(place, weights, inputs, FP8())
    if weights.get("num_bits") == 4:
        _require_matching(place, weights, inputs, bits=4)
        return SpreadLayout(per_tensor=weights.get("strategy") == "tensor")
    return _bytes(place, weights, inputs, W8A8(smooth_alpha=None))


def _packed(place: str, weights: Mapping[str, Any]) -> PackedLayout:
    _require(place, weights, "type", ["int"])
    _require(place, weights, "num_bits", list(WEIGHT_ONLY))
    _require(place, weights, "strategy", ["group", "channel", "tensor"])
    _require(place, weights, "symmetric", [True, False])
    strategy, symmetric = weights["strategy"], weights["symmetric"]
    if strategy == "tensor" and not symmetric:
        raise ValueError(f"{place}: symmetric must be true for one scale per tensor, got false")
    group_size = weights.get("group_size") if strategy == "group" else -1
    if not isinstance(group_size, int):
        raise ValueError(f"{place}: group_size must be an integer, got {group_size!r}")
    return PackedLayout(
        bits=weights["num_bits"],
        group_size=group_size,
        symmetric=symmetric,
        per_tensor=strategy == "tensor",
        ordered=_is_ordered(place, weights.get("actorder")),
    )


def _is_ordered(place: str, order: object) -> bool:
    """Whether groups are not of neighbours; older files say so by true and false."""
    known: dict[object, bool] = {"group": True, "dynamic": True, "weight": False, "static": False}
    if order is None or isinstance(order, bool):
        return bool(order)
    if not isinstance(order, str) or order not in known:
        named = ", ".join(map(str, known))
        raise ValueError(f"{place}: actorder must be one of {named}, got {order!r}")
    return known[order]


def _bytes(
    place: str, weights: Mapping[str, Any], inputs: Mapping[str, Any], own: W8A8 | FP8
) -> ByteLayout:
    _require_matching(place, weights, inputs, bits=8)
    return ByteLayout(own=own, per_tensor=weights["strategy"] == "tensor")


def _require_matching(
    place: str, weights: Mapping[str, Any], inputs: Mapping[str, Any], *, bits: int
) -> None:
    """Require symmetric weights per channel or tensor, and 8-bit inputs of the same type."""
    of_weights, of_inputs = f"{place}.weights", f"{place}.input_activations"
    _require(of_weights, weights, "num_bits", [bits])
    _require(of_weights, weights, "symmetric", [True])
    _require(of_weights, weights, "strategy", ["channel", "tensor"])
    _require(of_inputs, inputs, "type", [weights["type"]])
    _require(of_inputs, inputs, "num_bits", [8])
    _require(of_inputs, inputs, "dynamic", [True])
    _require(of_inputs, inputs, "strategy", ["token"])
    _require(of_inputs, inputs, "symmetric", [True])


def _require(place: str, values: Mapping[str, Any], key: str, wanted: Sequence[object]) -> None:
    given = values.get(key)
    if not any(type(given) is type(value) and given == value for value in wanted):
        listed = " or ".join(str(value) for value in wanted)
        raise ValueError(f"{place}: {key} must be {listed}, got {values.get(key)!r}")


def _strings(place: str, values: object) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{place} must be a list of names, got {values!r}")
    for value in values:
        if value.startswith("re:"):
            re.compile(value.removeprefix("re:"))
    return tuple(values)


def _rank(target: tuple[str, Layout]) -> tuple[bool, bool, str]:
    name = target[0]
    return name == CLASS, name.startswith("re:"), name


def _names(target: str, module: str) -> bool:
    """Whether a target names a linear layer."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target in (module, CLASS)
