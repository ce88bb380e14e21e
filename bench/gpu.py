"""What the driver says of a GPU, asked in a process of its own.

    python bench/gpu.py 0

A CUDA context in the process that plans would take memory from those that compute. The driver's own
library is asked, without torch, which takes seconds to come.
"""

import ctypes
import json
import subprocess
import sys
import uuid
from dataclasses import dataclass
from functools import cache

LIBRARY = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
MOST_NAME = 256
UUID_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as the driver describes it. free_bytes: of its memory, before we take any.

    uuid: what all of the driver's libraries call it; its number is CUDA's alone.
    """

    name: str
    capability: tuple[int, int]
    free_bytes: int
    uuid: str = ""


@cache
def ask(index: int) -> Gpu | None:
    """Describe a GPU, by the number that torch gives it; None where nobody says."""
    line = [sys.executable, "-I", "-S", __file__, str(index)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    name, major, minor, free_bytes, own = json.loads(done.stdout)
    return Gpu(name=name, capability=(major, minor), free_bytes=free_bytes, uuid=own)


def _describe(index: int) -> tuple[str, int, int, int, str]:
    """Ask the driver; OSError where it is not there or refuses."""
    cuda = ctypes.CDLL(LIBRARY)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    major, minor = ctypes.c_int(), ctypes.c_int()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(MOST_NAME)
    own = (ctypes.c_ubyte * UUID_BYTES)()
    for call, *arguments in (
        (cuda.cuInit, 0),
        (cuda.cuDeviceGet, ctypes.byref(device), index),
        (cuda.cuDeviceGetName, name, MOST_NAME, device),
        (cuda.cuDeviceGetUuid, own, device),
        (cuda.cuDeviceGetAttribute, ctypes.byref(major), MAJOR, device),
        (cuda.cuDeviceGetAttribute, ctypes.byref(minor), MINOR, device),
        (cuda.cuDevicePrimaryCtxRetain, ctypes.byref(context), device),
        (cuda.cuCtxSetCurrent, context),
        (cuda.cuMemGetInfo_v2, ctypes.byref(free), ctypes.byref(total)),
    ):
        if (code := call(*arguments)) != 0:
            raise OSError(f"{call.__name__} gave {code}")
    named = str(uuid.UUID(bytes=bytes(own)))
    return name.value.decode(), major.value, minor.value, free.value, named


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_describe(int(sys.argv[1]))))
