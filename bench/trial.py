"""A trial in the sandbox: the judge's tests ask, the program answers, in plain values.

Both sides speak frames of JSON: eight bytes of length, then the text. The program is told its own
source and the name to be called, never the tests.
"""

import builtins
import json
import math
import os
import random
import resource
import signal
import socket
import struct
from collections.abc import Callable, Set
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any, NoReturn

MAX_ANSWER_BYTES = 1 << 24
MAX_DETAIL = 200
# What reading an answer that `encode` did not write can raise.
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)
_LENGTH = struct.Struct("!Q")


class Ended(BaseException):
    """The trial is over, whatever a test catches."""

    def __init__(self, outcome: str, detail: str) -> None:
        super().__init__(detail)
        self.outcome = outcome


def time_is_up(_signal: int, _frame: object) -> NoReturn:
    """Handle the judge's alarm."""
    raise Ended("timeout", "the time is up")


def receive(file: int) -> dict[str, Any]:
    """Read one frame from a pipe, and no byte more."""
    (length,) = _LENGTH.unpack(_exactly(lambda n: os.read(file, n), _LENGTH.size))
    values: dict[str, Any] = json.loads(_exactly(lambda n: os.read(file, n), length))
    return values


def frame(values: object) -> bytes:
    """Make a frame."""
    text = json.dumps(values).encode()
    return _LENGTH.pack(len(text)) + text


def tell(file: int, outcome: str, detail: str, *, sandbox: str = "") -> None:
    """Write the verdict."""
    values = {"outcome": outcome, "detail": detail[:MAX_DETAIL], "sandbox": sandbox}
    os.write(file, json.dumps(values).encode())


def hold(
    case: dict[str, Any], program: socket.socket, verdict: int, sandbox: str, *, memory_mib: int
) -> None:
    """Run the tests against the program, and write the verdict."""
    _limit(resource.RLIMIT_AS, memory_mib << 20)
    outcome, detail = "passed", ""
    try:
        candidate = _Candidate(program)
        random.seed(0)  # tests that draw at random draw the same for every answer
        names: dict[str, Any] = {"__name__": "tests"}
        exec(case["setup"], names)  # noqa: S102  the sandbox is the place for it
        names[case["entry_point"]] = candidate
        exec(case["test"], names)  # noqa: S102
    except Ended as end:
        outcome, detail = end.outcome, str(end)
    except Exception as error:  # noqa: BLE001  whatever a test raises is its verdict
        outcome, detail = "failed", f"{type(error).__name__}: {error}".rstrip(": ")
    # The program may signal us: nothing may break off what follows, or two verdicts are written.
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    tell(verdict, outcome, detail, sandbox=sandbox)


class _Candidate:
    """Stands for the program's function in the tests."""

    def __init__(self, program: socket.socket) -> None:
        self._program = program
        self._answer()

    def __call__(self, *arguments: object, **named: object) -> object:
        """Call it over there."""
        question = {"arguments": encode(arguments), "named": encode(named)}
        try:
            self._program.sendall(frame(question))
        except OSError as error:
            raise Ended("failed", "the program ended before its tests") from error
        return self._answer()

    def _answer(self) -> object:
        """Give the value, or raise what was raised."""
        try:
            (length,) = _LENGTH.unpack(_exactly(self._program.recv, _LENGTH.size))
            if length > MAX_ANSWER_BYTES:
                raise Ended("failed", f"an answer must have {MAX_ANSWER_BYTES} bytes at most")
            answer = json.loads(_exactly(self._program.recv, length))
            if "value" in answer:
                return decode(answer["value"])
            raised, detail = str(answer["raised"]), str(answer["detail"])
        except (EOFError, OSError) as error:
            raise Ended("failed", "the program ended before its tests") from error
        except UNREADABLE as error:
            raise Ended("failed", "the program's answer cannot be read") from error
        kind = getattr(builtins, raised, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            raise kind(detail)
        raise RuntimeError(f"{raised}: {detail}")


def serve(order: dict[str, Any], judge: socket.socket) -> NoReturn:
    """Be the program: limit ourselves, run the source, then answer calls until the judge ends."""
    try:
        _limit_all(order)
        function = _run(order["program"], order["entry_point"], judge)
        while True:
            (length,) = _LENGTH.unpack(_exactly(judge.recv, _LENGTH.size))
            question = json.loads(_exactly(judge.recv, length))
            judge.sendall(frame(_outcome(partial(_call, function, question))))
    finally:
        os._exit(1)


def _run(source: str, entry_point: str, judge: socket.socket) -> Callable[..., object]:
    names: dict[str, Any] = {"__name__": "program"}

    def run() -> None:
        exec(compile(source, "program.py", "exec"), names)  # noqa: S102
        if not callable(names.get(entry_point)):
            raise NameError(f"the program has no function {entry_point}")

    judge.sendall(frame(_outcome(run)))
    function: Callable[..., object] = names[entry_point]
    return function


def _call(function: Callable[..., object], question: dict[str, Any]) -> object:
    return encode(function(*decode(question["arguments"]), **decode(question["named"])))


def _outcome(act: Callable[[], object]) -> dict[str, object]:
    try:
        return {"value": act()}
    except BaseException as error:  # noqa: BLE001  SystemExit too is the program's answer
        return {"raised": type(error).__name__, "detail": str(error)[:MAX_DETAIL]}


def _limit_all(order: dict[str, Any]) -> None:
    """Bound what the program takes of the host.

    Files in memory without a name (memfd) are no address space, but have the size of any file, and
    live while they are open: processes x files x file_mib bounds all of them together.
    """
    _limit(resource.RLIMIT_AS, order["memory_mib"] << 20)
    _limit(resource.RLIMIT_CPU, math.ceil(order["timeout_s"]) + 1)
    _limit(resource.RLIMIT_FSIZE, order["file_mib"] << 20)
    _limit(resource.RLIMIT_NOFILE, order["files"])
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_NPROC, order["processes"] + 2)  # keeper and judge count as well


def _limit(kind: int, most: int) -> None:
    _, hard = resource.getrlimit(kind)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(kind, (most, most))


def encode(value: object) -> object:
    """Write a value as JSON that `decode` reads; TypeError where it is more than plain data."""
    if value is None or isinstance(value, bool | float | str):
        return value
    if isinstance(value, int):
        return {"int": hex(value)}
    for name, kind in (("list", list), ("tuple", tuple), ("set", Set)):
        if isinstance(value, kind):
            return {name: [encode(item) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(item)] for key, item in value.items()]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, Fraction):
        return {"fraction": [hex(value.numerator), hex(value.denominator)]}
    if isinstance(value, Decimal):
        return {"decimal": str(value)}
    if isinstance(value, bytes | bytearray):
        return {"bytes": bytes(value).hex()}
    raise TypeError(f"a {type(value).__name__} cannot be returned")


def decode(value: Any) -> Any:  # noqa: ANN401  a value of any plain type
    """Read what `encode` wrote; ValueError where it is something else."""
    if not isinstance(value, dict):
        return value
    ((name, content),) = value.items()
    match name:
        case "int":
            return int(content, 16)
        case "list":
            return [decode(item) for item in content]
        case "tuple":
            return tuple(decode(item) for item in content)
        case "set":
            return {decode(item) for item in content}
        case "dict":
            return {decode(key): decode(item) for key, item in content}
        case "complex":
            return complex(*content)
        case "fraction":
            numerator, denominator = content
            return Fraction(int(numerator, 16), int(denominator, 16))
        case "decimal":
            return Decimal(content)
        case "bytes":
            return bytes.fromhex(content)
    raise ValueError(f"a value must be of a known kind, got {name!r}")


def _exactly(read: Callable[[int], bytes], length: int) -> bytes:
    parts = []
    while length:
        part = read(min(length, 1 << 16))
        if not part:
            raise EOFError
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
