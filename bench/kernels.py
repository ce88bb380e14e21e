"""Door: time every kernel that takes a scheme's layers, and keep which is fastest.

    specquant kernels quant=w4a16
    specquant kernels -m quant=dense,w8a8,fp8,w4a16,w4a8_qqq dtype=bfloat16
    specquant kernels -m quant=w4a16 model=llama3_8b,llama3_70b

`python -m bench.kernels` does the same. Every product is checked against float64 in the same run;
one that is off is told and never chosen.
"""

import csv
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from bench.build import as_mapping, build, typed, without
from bench.config import parse_model, plain_tree
from bench.door import OK, UNFINISHED, collect, unusable
from bench.kernel_timing import Layer, Product, Timings, copy_tb_per_s, products
from bench.machine import check_gpu, check_machine
from methods.architecture import read_shape, stacked_shapes
from methods.weights import read_config
from quant.kernels import triton_cache
from quant.kernels.choice import missing
from quant.kernels.machine import machine_of
from quant.kernels.table import Table, entry, write_table
from quant.scheme import AUTO, Scheme

CSV = "kernels.csv"
# ||y - y64|| / ||y64||: some roundings of the dtype, one after the other. Tensor cores keep sums of
# e4m3 products to about 14 bits: 2e-3 at K = 8192, measured.
MOST_ERROR = {"float16": 2e-3, "bfloat16": 5e-3}
MOST_ERROR_FP8 = 5e-3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The keys of conf/kernels.yaml that are not groups; their meaning is written there."""

    campaign: str
    results_dir: str
    device: str
    dtype: str
    exact: bool
    seed: int
    widths: tuple[int, ...]
    repeats: int
    warmup: int
    rotated_bytes: int

    def __post_init__(self) -> None:
        if torch.cuda.device_count() == 0:
            raise ValueError(
                "kernels are timed on a GPU, got none: all layers are kernel=reference"
            )
        check_machine(device=self.device, dtype=self.dtype, threads=None)
        if self.dtype not in MOST_ERROR:
            raise ValueError(f"dtype must be one of {', '.join(MOST_ERROR)}, got {self.dtype!r}")
        if torch.device(self.device).type != "cuda":
            raise ValueError(f"device must be cuda, where kernels are, got {self.device!r}")
        check_gpu(self.device)
        if not self.widths or min(self.widths) < 1 or self.repeats < 1:
            raise ValueError(
                f"widths and repeats must be 1 or more, got {self.widths} and {self.repeats}"
            )


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One scheme's layers to be timed. model: that they are of; empty where conf/ lists them."""

    settings: Settings
    scheme: Scheme
    model: str
    layers: tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of kernels.csv; M tokens. model: as of `Planned`."""

    model: str
    scheme: str
    dtype: str
    exact: bool
    kernel: str
    layer: str
    k: int
    n: int
    m: int
    median_us: float
    min_us: float
    max_us: float
    weight_bytes: int
    copy_tb_per_s: float
    max_rel_error: float
    uneven: int  # first M at which a row's bits are others than among the most; 0: none


class Jobs:
    """Collects the schemes of one command."""

    def __init__(self) -> None:
        self.planned: list[Planned] = []

    def add(
        self, config: DictConfig, *, names: Mapping[str, str], overrides: Sequence[str]
    ) -> None:
        """Check one; ValueError where something is wrong with it."""
        tree = plain_tree(config)
        settings = typed(without(tree, "quant", "model", "layers"), Settings, key="")
        scheme = build(tree["quant"], Scheme, key="quant")  # type: ignore[type-abstract]
        if scheme.as_stored:
            raise ValueError("quant must be a format of its own, got checkpoint")
        if reason := missing(scheme.kernel, torch.device(settings.device)):
            raise ValueError(reason)
        own = "model" in tree
        self.planned.append(
            Planned(
                settings=settings,
                scheme=scheme,
                model=names["model"] if own else "",
                layers=_layers_of(tree["model"]) if own else _layers(tree["layers"]),
            )
        )


def main() -> int:
    """Time what the command line asks for; give the exit code."""
    return collect("kernels", Jobs, finish=_work)


def _layers(node: object) -> tuple[Layer, ...]:
    found = as_mapping(node, "layers")
    return tuple(
        typed({"name": name} | as_mapping(size, f"layers.{name}"), Layer, key=f"layers.{name}")
        for name, size in found.items()
    )


def _layers_of(model: object) -> tuple[Layer, ...]:
    """Layers of a model's target, by its config.json alone."""
    folder = parse_model(model).family.target
    shapes = stacked_shapes(read_shape(read_config(folder)))
    return tuple(Layer(name=name, k=k, n=n) for name, (n, k) in shapes.items())


def _work(jobs: Jobs) -> int:
    triton_cache.prepare()
    rows: dict[Path, list[Row]] = {}
    whole = True
    for planned in jobs.planned:
        settings = planned.settings
        out = Path(settings.results_dir) / settings.campaign / CSV
        device = torch.device(settings.device)
        copied = copy_tb_per_s(device, repeats=settings.repeats)
        for layer in planned.layers:
            made = list(_timed(planned, layer, copied))
            whole = _is_whole(made, _most_error(planned)) and whole
            rows.setdefault(out, []).extend(made)
            _write(out, rows[out])
            _keep(made, planned, device)
    for out in rows:
        sys.stdout.write(f"{out}\n")
    return OK if whole else UNFINISHED


def _timed(planned: Planned, layer: Layer, copied: float) -> Iterable[Row]:
    settings = planned.settings
    asked = None if planned.scheme.kernel == AUTO else planned.scheme.kernel
    for product in products(
        planned.scheme,
        layer,
        Timings(
            dtype=getattr(torch, settings.dtype),
            device=torch.device(settings.device),
            widths=settings.widths,
            repeats=settings.repeats,
            warmup=settings.warmup,
            rotated_bytes=settings.rotated_bytes,
            seed=settings.seed,
            exact=settings.exact,
        ),
        asked=asked,
    ):
        yield from _rows(planned, layer, product, copied)


def _rows(planned: Planned, layer: Layer, product: Product, copied: float) -> Iterable[Row]:
    if product.refusal:
        sys.stdout.write(f"{planned.scheme.label} {layer.name}: {product.refusal}\n")
        return
    told = []
    for m, times in product.times_us.items():
        ordered = sorted(times)
        median = ordered[len(ordered) // 2]
        told.append(f"{m}: {median:.1f}")
        yield Row(
            model=planned.model,
            scheme=planned.scheme.label,
            dtype=planned.settings.dtype,
            exact=planned.settings.exact,
            kernel=product.kernel,
            layer=layer.name,
            k=layer.k,
            n=layer.n,
            m=m,
            median_us=round(median, 3),
            min_us=round(ordered[0], 3),
            max_us=round(ordered[-1], 3),
            weight_bytes=product.weight_bytes,
            copy_tb_per_s=round(copied, 3),
            max_rel_error=product.max_rel_error,
            uneven=product.uneven,
        )
    sys.stdout.write(
        f"{_entry(planned)} {layer.name} {product.kernel}: us at {', '.join(told)}; "
        f"error {product.max_rel_error:.1e}\n"
    )
    sys.stdout.flush()


def _entry(planned: Planned) -> str:
    return entry(planned.scheme.label, exact=planned.settings.exact)


def _most_error(planned: Planned) -> float:
    own = MOST_ERROR[planned.settings.dtype]
    return max(own, MOST_ERROR_FP8) if planned.scheme.activation_format == "fp8" else own


def _is_whole(rows: Sequence[Row], most: float) -> bool:
    off = {row.kernel for row in rows if not row.max_rel_error <= most}
    for kernel in sorted(off):
        sys.stderr.write(f"error: {kernel} is off by more than {most:g}, not chosen\n")
    uneven = {row.kernel: row.uneven for row in rows if row.uneven}
    for kernel, m in sorted(uneven.items()):
        sys.stderr.write(f"error: {kernel} gives a row of {m} other bits, not chosen\n")
    return not (off or uneven)


def _keep(rows: Sequence[Row], planned: Planned, device: torch.device) -> None:
    """Note the kernel with the least time over all widths, of those that are right."""
    dtype = planned.settings.dtype
    total: dict[str, float] = {}
    for row in rows:
        if row.max_rel_error <= _most_error(planned) and not row.uneven:
            total[row.kernel] = total.get(row.kernel, 0.0) + row.median_us
    if not total or planned.scheme.kernel != AUTO:
        return
    fastest = min(total, key=total.__getitem__)
    best = {_entry(planned): {f"{rows[0].k}x{rows[0].n}": {dtype: fastest}}}
    try:
        write_table(Table(machine=machine_of(device), best=best))
    except OSError as error:
        sys.stderr.write(f"note: kernel=auto will not know of it: {unusable(error)}\n")


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer: Any = csv.writer(file)
        writer.writerow(_header(f.name) for f in fields(Row))
        writer.writerows(astuple(row) for row in rows)


def _header(name: str) -> str:
    return name.upper() if len(name) == 1 else name


if __name__ == "__main__":
    sys.exit(main())
