"""What our kernels on Hopper share on the host: variants, limits, tensor maps, room for parts.

Their text is hopper.cuh, stream_k.cuh and a file of each kernel's own, with settings in front.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from quant.kernels import cuda_build

COMMON = ("hopper.cuh", "stream_k.cuh")  # files in front of every kernel's own
NARROWEST, WIDEST = 8, 64  # tokens of a launch; more are several launches
SHARED_BYTES = 200 * 1024  # of the 227 KiB a block may have; the rest is for its neighbours
STAGE_ALIGNMENT = 1024
SWIZZLED_BYTES = 128  # of a row of a box, as wgmma reads it
LEAST_BUSY = 0.9  # of the blocks that run at once
MOST_BLOCKS = 1 << 16  # of output features: as many count their parts
MOST_UNITS = 1 << 23  # chunks of all tiles, so that times 256 pairs they are counted in 32 bits
MOST_SUMS = 256 * 64  # of a block's tile: features times tokens


Sums = Literal["f32", "f16", "s32"]  # what tensor cores add in


@dataclass(frozen=True, kw_only=True)
class Variant(ABC):
    """What a binary is compiled for. tokens: a multiple of NARROWEST. bf16: x, else float16."""

    tokens: int
    bf16: bool

    @property
    @abstractmethod
    def files(self) -> tuple[str, ...]:
        """The kernel's own, in order."""

    @property
    @abstractmethod
    def stage_bytes(self) -> int:
        """Shared memory of one chunk."""

    @property
    @abstractmethod
    def settings(self) -> Mapping[str, object]:
        """What is set in front of the kernel's text besides what all kernels have."""

    @property
    def stages(self) -> int:
        """Chunks in flight."""
        return (SHARED_BYTES - STAGE_ALIGNMENT) // self.stage_bytes

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a launch."""
        return self.stages * self.stage_bytes + STAGE_ALIGNMENT

    @property
    def columns(self) -> int:
        """Of a product."""
        return self.tokens

    @property
    def sums(self) -> Sums:
        """What a product's are."""
        return "f32"

    @property
    def whole(self) -> bool:
        """Whether products are of integers."""
        return self.sums == "s32"

    @property
    def register(self) -> str:
        """A sum's kind of register, as inline assembly has it."""
        return "f" if self.sums == "f32" else "r"

    @property
    def held(self) -> int:
        """Registers of a product, of 64 features: the instruction's first operands."""
        return self.columns // (4 if self.sums == "f16" else 2)

    @property
    def source(self) -> str:
        """The kernel's text, its settings in front."""
        values = {
            "TOKENS": self.tokens,
            "STAGES": self.stages,
            "BF16": int(self.bf16),
            **self.settings,
            "WGMMA_SUMS(sum)": ", ".join(f'"+{self.register}"(sum[{i}])' for i in range(self.held)),
        }
        settings = "".join(f"#define {name} {value}\n" for name, value in values.items())
        files = (Path(__file__).with_name(n) for n in (*COMMON, *self.files))
        return settings + "".join(path.read_text(encoding="utf-8") for path in files)

    def wgmma(self, operands: str) -> str:
        """Give the product's instruction, quoted. operands: what comes behind its sums."""
        floats = "bf16.bf16" if self.bf16 else "f16.f16"
        kind = "k32.s32.s8.s8" if self.whole else f"k16.{self.sums}.{floats}"
        sums = ", ".join(f"%{i}" for i in range(self.held))
        name = f"wgmma.mma_async.sync.aligned.m64n{self.columns}{kind}"
        return f'"{name} {{{sums}}}, {operands};"'


@cache
def function(variant: Variant, device: torch.device) -> cuda_build.Function:
    """Compile a variant for a device, or find it compiled."""
    shared = variant.shared_bytes
    return cuda_build.function(variant.source, "product", shared_bytes=shared, device=device)


def compile_widths(variant: Callable[[int], Variant], device: torch.device) -> None:
    """Compile for every number of tokens. variant: gives that of so many."""
    widths = range(NARROWEST, WIDEST + 1, NARROWEST)
    cuda_build.at_once(partial(function, variant(tokens), device) for tokens in widths)


def width_of(n: int) -> int:
    """Give the tokens of the variant that reads n."""
    return -(-n // NARROWEST) * NARROWEST


def launches(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut rows into what one launch takes. x: [n, K], y: [n, N]."""
    for start in range(0, len(x), WIDEST):
        yield x[start : start + WIDEST], y[start : start + WIDEST]


def misfit(n: int, k: int, *, rows: int, chunk: int) -> tuple[str, str]:
    """Say what a shape must have and what it has; empty: it is taken.

    rows: outputs of a block. chunk: inputs of a stage.
    """
    if n % 8 or k % 8:
        return "N and K in multiples of 8", f"N={n}, K={k}"
    tiles = -(-n // (2 * rows))
    if 2 * tiles > MOST_BLOCKS:
        return f"N of {MOST_BLOCKS * rows} at most", str(n)
    if tiles * -(-k // chunk) > MOST_UNITS:
        return f"a weight of {MOST_UNITS * 2 * rows * chunk} numbers at most", f"N={n}, K={k}"
    return "", ""


def share_out(tiles: int, chunks: int, blocks: int) -> int:
    """Count the pairs of blocks that share a product. blocks: that the device runs at once.

    As many as run; but a few less where all tiles are then cut alike, between the same chunks, so
    that no pair works for two: a tile's sum waits for one after the other (H200, LOG.md).
    """
    pairs = min(blocks // 2, tiles * chunks)
    even = pairs // tiles * tiles
    return even if even >= LEAST_BUSY * pairs else pairs


@cache
def multiprocessors(device: torch.device) -> int:
    """Count a device's multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def workspace(device: torch.device) -> tuple[Tensor, Tensor]:
    """Give where blocks leave parts of sums, two each, and the counters of those that did.

    All products of a device share it, since a stream runs them one after the other, each touches
    it after the one in front has ended, and leaves every counter at 0. Products on two streams at
    once must not.
    """
    parts = torch.empty(multiprocessors(device), 2, MOST_SUMS, device=device)
    return parts, torch.zeros(MOST_BLOCKS, dtype=torch.int32, device=device)


def tensor_map(matrix: Tensor, rows: int) -> Any:  # noqa: ANN401  the driver's own type
    """Describe a matrix for swizzled copies of `rows` x 64; what lies outside comes as 0.

    matrix: [rows, columns] float16 or bfloat16, rows contiguous and aligned to 16 bytes.
    """
    return _map(matrix, (rows, SWIZZLED_BYTES // matrix.element_size()))


def digits_map(digits: Tensor, rows: int) -> Any:  # noqa: ANN401  the driver's own type
    """Describe planes of a matrix for swizzled copies of `rows` x 128 of one plane, likewise.

    digits: [planes, rows, columns] int8, rows contiguous and aligned to 16 bytes.
    """
    return _map(digits, (1, rows, SWIZZLED_BYTES))


def _map(tensor: Tensor, box: tuple[int, ...]) -> Any:  # noqa: ANN401  the driver's own type
    from cuda.bindings import driver

    types = driver.CUtensorMapDataType
    kinds = {
        torch.float16: types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.bfloat16: types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        torch.int8: types.CU_TENSOR_MAP_DATA_TYPE_UINT8,  # as copied: bytes
    }
    u32, u64 = driver.cuuint32_t, driver.cuuint64_t
    status, made = driver.cuTensorMapEncodeTiled(
        kinds[tensor.dtype],
        tensor.dim(),
        tensor.data_ptr(),
        [u64(size) for size in reversed(tensor.shape)],
        [u64(step * tensor.element_size()) for step in reversed(tensor.stride()[:-1])],
        [u32(size) for size in reversed(box)],
        [u32(1)] * tensor.dim(),
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if int(status):
        raise RuntimeError(
            f"no tensor map of {tensor.dtype} {list(tensor.shape)} {tensor.stride()}: {status!r}"
        )
    return made
