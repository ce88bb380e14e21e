"""Turn, write and attend in one launch on Hopper: rope_write and the pieces of attention.

The rules are those of `methods.kernels.attention`: a node's bits do not depend on how it is read.
What differs is what one launch does, and how.

- Queries and keys of this read are turned where they are needed, every node's path by the block
  that reads it, so that no launch stands between the projection and attention; the block of a
  node's last step also writes its entry into the cache.
- A step is two products of a warpgroup, of 64 rows by its 64 keys and by its values, whatever it
  is read for. A number of either depends on its row and column alone, so rows that nobody asked for
  are left as they lie; and sums over a step's weights run in one order.

Pieces are merged and added by `methods.kernels.combine`. The text is in FILES, compiled at its
first use for a head's size, the number of heads and the dtype.

Letters: n new tokens, H query heads, G key-value heads, S slots, d head dimension, P positions.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from methods.kernels.combine import combine
from methods.kernels.pieces import STEP, cut, longest_path, room, scale_of
from quant.block_float import BlockFloat
from quant.kernels import cuda_build

FILES = ("attention_hopper.cuh", "attention_hopper.cu")
CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)
DIMS = (64, 128)
ROWS, THREADS = 64, 128
HELD = 32  # sums of a thread
MOST_SHARED = 16  # query heads of a key-value head: a block's threads turn all at once
# Blocks of one step each up to which a launch is fine, if they are as many steps at least (H200: 24
# nodes of 64 heads after 512 take 10.9 us for 12.9 in a coarse one, 48 take 20.8 for 13.9; one node
# after 1,500 takes 6.7 for 8.4, and after 4,096 16.9 for 11.9).
FEW, LEAST = 256, 8


class Task(ctypes.Structure):
    """What the kernel takes, by the names of attention_hopper.cuh."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("qkv", "cos", "sin", "positions", "cache", "base")),
        *((name, ctypes.c_void_p) for name in ("ancestors", "tops", "totals", "sums")),
        *((name, ctypes.c_longlong) for name in ("stride_kind", "stride_group")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("nodes", "scratch", "depth", "tiles")),
        *((name, ctypes.c_int) for name in ("shared_blocks", "hop", "own_at", "fine_steps")),
    ]


def takes(cache: Tensor, heads: int) -> bool:
    """Whether reads of a cache, [2, G, S, d], by `heads` query heads are taken."""
    groups, dim = cache.shape[1], cache.shape[3]
    return (
        cache.dtype in DTYPES
        and dim in DIMS
        and cache.stride()[2:] == (dim, 1)
        and heads // groups <= MOST_SHARED
        and _compiles(cache.device)
    )


def rope_attend(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    cache: Tensor,
    base: Tensor,
    scratch: int,
    *,
    ancestors: Tensor | None,
    digits: bool,
) -> Tensor | BlockFloat:
    """See `methods.fused.rope_attend`; a path's positions follow one another."""
    nodes = len(qkv)
    _, groups, capacity, dim = cache.shape
    heads = qkv.shape[1] // dim - 2 * groups
    assert heads % groups == 0
    assert qkv.dtype == cache.dtype == cos.dtype == sin.dtype
    assert cos.is_contiguous()
    assert sin.is_contiguous()
    assert len(positions) == nodes
    assert ancestors is None or len(ancestors) == nodes
    tiles = -(-nodes * heads // groups // ROWS)
    steps = FEW // (tiles * groups)
    parts = cut(
        *(tiles, groups, capacity),
        longest=longest_path(ancestors, scratch, nodes),
        fine_steps=steps if steps >= LEAST else -1,
    )
    queries = qkv.view(nodes, -1, dim)[:, :heads]
    outs, scale = room(queries, parts), scale_of(dim)
    depth = 0 if ancestors is None else ancestors.shape[1]
    tensors = (qkv, cos, sin, positions, cache, base, ancestors, *outs)
    task = Task(
        *(0 if tensor is None else tensor.data_ptr() for tensor in tensors),
        *cache.stride()[:2],
        scale,
        *(nodes, scratch, depth, tiles, parts.shared_programs),
        *(parts.hop, parts.own_at, parts.fine_steps),
    )
    _function(qkv.dtype, dim, groups, heads // groups, qkv.device).launch(
        parts.shared_programs + parts.hop * nodes * groups,
        THREADS,
        _shared_bytes(dim),
        [task],
        overlapped=True,
    )
    return combine(
        queries,
        outs,
        base,
        ancestors,
        scale=scale,
        scratch=scratch,
        parts=parts,
        digits=digits,
    )


@cache
def _compiles(device: torch.device) -> bool:
    found = device.type == "cuda" and torch.cuda.get_device_capability(device) == CAPABILITY
    return found and not torch.version.hip and not cuda_build.missing()


def _shared_bytes(dim: int) -> int:
    """A step's keys, its values, and queries; each begins at a whole KiB."""
    return 3 * STEP * dim * 2 + 1024


@cache
def _function(
    dtype: torch.dtype, dim: int, groups: int, shared: int, device: torch.device
) -> cuda_build.Function:
    source, size = text(dtype, dim, groups, shared), _shared_bytes(dim)
    return cuda_build.function(source, "attend", shared_bytes=size, device=device)


def text(dtype: torch.dtype, dim: int, groups: int, shared: int) -> str:
    """The kernel's text, settings in front."""
    kind = "bf16" if dtype == torch.bfloat16 else "f16"
    values = {
        "DIM": dim,
        "GROUPS": groups,
        "SHARED": shared,
        "BF16": int(kind == "bf16"),
        # Of 64 keys or of 64 numbers of a head; keys are read by rows, values by columns.
        "SCORE": _product(kind, "{0}, {1}, adds, 1, 1, 0, 0", operands=2),
        "WEIGH": _product(kind, "{{{0}, {1}, {2}, {3}}}, {4}, adds, 1, 1, 1", operands=5),
        "SUMS(sum)": ", ".join(f'"+f"(sum[{i}])' for i in range(HELD)),
    }
    defines = (f"#define {name} {value}\n" for name, value in values.items())
    files = (Path(__file__).with_name(name).read_text(encoding="utf-8") for name in FILES)
    return "".join((*defines, *files))


def _product(kind: str, form: str, *, operands: int) -> str:
    """Quote a product of 64 rows; the last operand says if it adds to its sums."""
    sums = ", ".join(f"%{i}" for i in range(HELD))
    rest = form.format(*(f"%{HELD + i}" for i in range(operands)))
    adds = f".reg .pred adds; setp.ne.b32 adds, %{HELD + operands}, 0;"
    name = f"wgmma.mma_async.sync.aligned.m64n64k16.f32.{kind}.{kind}"
    return f'"{{{adds} {name} {{{sums}}}, {rest};}}"'
