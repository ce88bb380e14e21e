"""Our own checkpoints: the stored tensors of a scheme under the published names of the layers.

    config.json    "quantization_config": {"quant_method": "specquant", "schema": 1,
                       "scheme": {"name": "W4A16", "group_size": 128, ...},
                       "lm_head": null or a scheme, "rounding": "gptq", ...}
    tensors        model.layers.0.self_attn.q_proj.packed, ....scales

Layers are written one by one, as published, so that any scheme's rows can be stacked on reading.
Other keys, such as the calibration's, are for people.
"""

from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor

from quant.formats.layout import Layout, Quantization, Spec
from quant.fp8 import FP8
from quant.scheme import Scheme
from quant.w4a8_qoq import W4A8QoQ
from quant.w4a8_qqq import W4A8QQQ
from quant.w4a16 import W4A16
from quant.w8a8 import W8A8
from quant.w8a16 import W8A16

METHOD = "specquant"
SCHEMA = 1
NEAREST = "nearest"
SCHEMES: dict[str, type[Scheme]] = {
    kind.__name__: kind for kind in (FP8, W4A16, W4A8QoQ, W4A8QQQ, W8A8, W8A16)
}


@dataclass(frozen=True, kw_only=True)
class NativeLayout(Layout):
    """The stored tensors themselves."""

    own: Scheme

    @property
    def scheme(self) -> Scheme:
        """What wrote it."""
        return self.own

    def specs(self, n: int, k: int) -> dict[str, Spec]:
        """What the scheme makes of a weight of this shape."""
        # Packing a weight of ones tells names, dtypes and shapes; one row stands for all.
        like = self.own.pack(torch.ones(1, k), self._absmax(k))
        return {name: Spec(dtypes=(t.dtype,), shape=_grown(name, t, n)) for name, t in like.items()}

    def optional(self, n: int, k: int) -> dict[str, Spec]:
        """The order of the inputs, where groups are not of neighbours."""
        takes_order = self.own.lattice(torch.ones(1, k), self._absmax(k)).takes_order
        return {"order": Spec(dtypes=(torch.int32,), shape=(k,))} if takes_order else {}

    def read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Nothing to turn."""
        return dict(tensors)

    def _absmax(self, k: int) -> Tensor | None:
        return torch.ones(k) if self.own.needs_absmax else None


@dataclass(frozen=True, kw_only=True)
class NativeQuantization(Quantization):
    """One scheme for the decoder, perhaps one for lm_head. rounding: how codes were chosen."""

    own: Scheme
    lm_head: Scheme | None
    rounding: str

    @property
    def label(self) -> str:
        """The scheme, and how it was rounded where not to nearest."""
        return self.own.label + ("" if self.rounding == NEAREST else f"+{self.rounding}")

    @property
    def scheme(self) -> Scheme:
        """Of the decoder."""
        return self.own

    def layout(self, module: str) -> Layout | None:
        """All of the decoder, and lm_head where it has a scheme."""
        if module == "lm_head":
            return None if self.lm_head is None else NativeLayout(own=self.lm_head)
        return NativeLayout(own=self.own) if module.endswith("_proj") else None


def native_config(*, scheme: Scheme, lm_head: Scheme | None, rounding: str) -> dict[str, Any]:
    """Give the quantization_config that `read_native` reads back."""
    return {
        "quant_method": METHOD,
        "schema": SCHEMA,
        "scheme": describe(scheme),
        "lm_head": None if lm_head is None else describe(lm_head),
        "rounding": rounding,
    }


def describe(scheme: Scheme) -> dict[str, Any]:
    """Give a scheme as config.json holds it; ValueError where it stores nothing of its own."""
    name = type(scheme).__name__
    if SCHEMES.get(name) is not type(scheme):
        raise ValueError(f"a checkpoint's scheme must be one of {', '.join(SCHEMES)}, got {name}")
    settings = asdict(scheme)
    del settings["kernel"]  # of whoever computes with the file, not of the file
    return {"name": name, **settings}


def read_native(values: Mapping[str, Any], names: Set[str]) -> Quantization:
    """Read our own quantization_config."""
    if values.get("schema") != SCHEMA:
        raise ValueError(
            f"quantization_config: schema must be {SCHEMA}, got {values.get('schema')!r}"
        )
    lm_head = values.get("lm_head")
    rounding = values.get("rounding", NEAREST)
    if not isinstance(rounding, str) or not rounding.isascii():
        raise ValueError(f"quantization_config: rounding must be a name, got {rounding!r}")
    return NativeQuantization(
        own=_scheme(values.get("scheme"), "scheme"),
        lm_head=None if lm_head is None else _scheme(lm_head, "lm_head"),
        rounding=rounding,
    )


def _scheme(values: object, key: str) -> Scheme:
    place = f"quantization_config.{key}"
    got = values.get("name") if isinstance(values, Mapping) else values
    if not isinstance(values, Mapping) or not isinstance(got, str) or got not in SCHEMES:
        raise ValueError(f"{place}.name must be one of {', '.join(SCHEMES)}, got {got!r}")
    settings = {str(key): value for key, value in values.items() if key != "name"}
    hints = get_type_hints(SCHEMES[got])
    if "kernel" in settings:
        raise ValueError(f"{place}: there is no key kernel in a file, got {settings['kernel']!r}")
    for name, value in settings.items():
        kinds = get_args(hints.get(name)) or (hints.get(name),)
        if name in hints and type(value) not in kinds:  # bool is no int, and 1 no float
            raise ValueError(f"{place}.{name} must be {hints[name]}, got {value!r}")
    try:
        return SCHEMES[got](**settings)
    except TypeError as error:
        raise ValueError(f"{place}: {error}") from error


def _grown(name: str, tensor: Tensor, n: int) -> tuple[int, ...]:
    """Shape for N rows of a tensor that was made from one."""
    return tuple(tensor.shape) if name in Scheme.per_input else (n, *tensor.shape[1:])
