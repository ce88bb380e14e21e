"""What a generated program may and may not do: by the verdict, and by what the host saw of it."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from bench import sandbox
from bench.build import ROOT
from bench.sandbox import Limits, Outcome
from bench.trial import UNREADABLE, decode, encode

LIMITS = Limits(timeout_s=2, memory_mib=256, processes=4, files=32, file_mib=4)
NEXT = "def f(x):\n    return x + 1\n"
UNPRIVILEGED = 65534


def can_isolate() -> bool:
    try:
        sandbox.check()
    except ValueError:
        return False
    return True


pytestmark = pytest.mark.skipif(not can_isolate(), reason="no namespaces on this machine")


def tried(program: str, test: str = "assert f(1) == 2", setup: str = "") -> Outcome:
    return sandbox.run(program, "f", setup=setup, test=test, limits=LIMITS)


@pytest.fixture
def listener() -> Iterator[tuple[int, list[object]]]:
    """A port of the host's loopback, and who came."""
    came: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)

        def accept() -> None:
            connection, address = server.accept()
            came.append(address)
            connection.close()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1], came
        with socket.create_connection(server.getsockname()):
            thread.join()


def test_a_right_program_passes_and_the_walls_are_named() -> None:
    found = tried(NEXT)
    assert (found.outcome, found.detail) == ("passed", "")
    assert {"mount", "pid", "net", "ipc"} <= set(found.sandbox.split("+"))


def test_a_wrong_program_fails_with_the_tests_error() -> None:
    assert tried("def f(x):\n    return x\n", "assert f(1) == 2, 'one'").detail == (
        "AssertionError: one"
    )


def named(mark: str) -> str:
    """Source that gives the program's process, and those it forks, a name on the host."""
    return f"import ctypes\nctypes.CDLL(None).prctl(15, b'{mark}', 0, 0, 0)\n"  # PR_SET_NAME


def living(mark: str) -> int:
    """How many of the host's processes have that name."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):  # it ended while we looked
            count += path.read_text(encoding="utf-8").strip() == mark
    return count


def test_a_fork_bomb_is_stopped_and_leaves_no_process() -> None:
    bomb = (
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass\n"
    )
    mark, most = f"bomb{os.getpid()}", []
    with ThreadPoolExecutor(1) as pool:
        trial = pool.submit(tried, named(mark) + bomb)
        while not trial.done():
            most.append(living(mark))
    assert trial.result().outcome == "timeout"
    assert 1 < max(most) <= LIMITS.processes + 1
    assert living(mark) == 0


def test_a_program_has_the_processes_of_its_limit() -> None:
    forks = "import os, time\nfor _ in range(50):\n    if not os.fork():\n        time.sleep(9)\n"
    assert tried(forks + NEXT).detail.startswith("BlockingIOError")


def test_an_allocation_of_10_gb_is_stopped() -> None:
    assert tried("x = bytearray(10 * 10**9)\n" + NEXT).detail.startswith("MemoryError")


def test_memory_cannot_be_had_as_files_or_shared_segments() -> None:
    files = "for i in range(99):\n    open(str(i), 'wb').write(bytes(1 << 20))\n"
    assert tried(files + NEXT).detail.startswith("OSError: [Errno 28]")
    big = "open('x', 'wb').write(bytes(8 << 20))\n"
    assert tried(big + NEXT).outcome == "failed"
    segment = "import ctypes\nx = ctypes.CDLL(None).shmget(0, 4096, 0o1777)\nf = lambda _: x\n"
    if "noshm" in tried(NEXT).sandbox:  # an ordinary user's, on an older kernel, may have some
        assert tried(segment, "assert f(0) == -1").outcome == "passed"


@pytest.mark.parametrize(
    "grow",
    [
        "os.write(fd, bytes(4 << 20)) and os.write(fd, b'x')",
        "os.ftruncate(fd, (4 << 20) + 1)",
        "os.posix_fallocate(fd, 0, (4 << 20) + 1)",
    ],
)
def test_a_file_in_memory_without_a_name_is_bounded_like_any_file(grow: str) -> None:
    start = "import ctypes, os\nfd = os.memfd_create('x')\n"
    assert tried(f"{start}os.write(fd, bytes(4 << 20))\n{NEXT}").outcome == "passed"
    assert tried(f"{start}{grow}\n{NEXT}").detail == "OSError: [Errno 27] File too large"


def test_a_file_in_memory_has_no_memory_behind_its_end() -> None:
    keep_size = (
        "import ctypes, os\nfd = os.memfd_create('x')\n"
        "def f(x):\n    size = ctypes.c_long((4 << 20) + x)\n"
        "    return ctypes.CDLL(None).fallocate(fd, 1, ctypes.c_long(0), size)\n"
    )
    assert tried(keep_size, "assert [f(0), f(1)] == [0, -1]").outcome == "passed"


def test_files_in_memory_without_a_name_are_as_many_as_files_may_be_open() -> None:
    count = (
        "import os\nmade = 0\ntry:\n    while True:\n        os.memfd_create('x')\n"
        "        made += 1\nexcept OSError:\n    pass\nf = lambda _: made\n"
    )
    assert tried(count, f"assert 0 < f(0) < {LIMITS.files}, f(0)").outcome == "passed"


def test_an_answer_too_large_for_the_judges_memory_is_a_failure() -> None:
    forged = (
        "import socket, struct\n"
        # 1.5 million lists: 4.5 MB as text, 96 MB in memory
        "text = b'{\"value\": {\"list\": [' + b'[],' * 1_500_000 + b'[]]}}'\n"
        "for number in range(3, 16):\n    try:\n"
        "        judge = socket.socket(fileno=number)\n    except OSError:\n        continue\n"
        "    judge.sendall(struct.pack('!Q', len(text)))\n    judge.sendall(text)\n"
    )
    small = replace(LIMITS, memory_mib=64, timeout_s=20)
    found = sandbox.run(forged + NEXT, "f", setup="", test="f(1)", limits=small)
    assert (found.outcome, found.detail) == ("failed", "the program's answer cannot be read")


def test_standard_input_is_at_its_end_and_not_where_the_tests_come_from() -> None:
    read = (
        "import os, stat, sys\ndef f(x):\n"
        "    return [os.read(0, 1), sys.stdin.read(), stat.S_ISCHR(os.fstat(0).st_mode)]\n"
    )
    assert tried(read, "assert f(0) == [b'', '', True]").outcome == "passed"


def test_no_program_gains_rights_by_what_it_starts() -> None:
    asked = "import ctypes\nf = lambda _: ctypes.CDLL(None).prctl(39, 0, 0, 0, 0)\n"
    assert tried(asked, "assert f(0) == 1").outcome == "passed"  # PR_GET_NO_NEW_PRIVS


@pytest.mark.parametrize(
    ("value", "test"),
    [
        ("Fraction(x + 1, 1)", "assert f(1) == 2"),
        ("Fraction(x, 2)", "assert f(1) == 0.5"),
        ("Decimal(x + 1)", "assert f(1) == 2"),
        ("Decimal('0.10')", "assert str(f(1)) == '0.10'"),
        ("[Decimal(x), Fraction(x)]", "assert f(1) == [1, 1]"),
        ("Decimal(x)", "assert round(f(1), 2) == 1 and f(2) < 2.5"),
    ],
)
def test_exact_numbers_compare_as_they_would_in_one_process(value: str, test: str) -> None:
    imports = "from decimal import Decimal\nfrom fractions import Fraction\n"
    source = f"{imports}def f(x):\n    return {value}\n"
    names: dict[str, object] = {}
    exec(f"{source}\n{test}", names)  # noqa: S102  what the data set's own harness does
    assert tried(source, test).outcome == "passed"
    assert tried(source.replace("(x", "(7 * x").replace("0.10", "0.1"), test).outcome == "failed"


@pytest.mark.parametrize(
    "answer",
    [
        {"fraction": ["0x1", "0x0"]},
        {"fraction": ["0x1"]},
        {"fraction": [1, 2]},
        {"decimal": "one"},
        {"decimal": None},
        {"decimal": {"int": "0x1"}},
    ],
)
def test_a_number_that_is_none_cannot_be_read(answer: object) -> None:
    with pytest.raises(UNREADABLE):
        decode(answer)


def test_a_write_outside_is_stopped(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    planted = tmp_path / "planted"
    assert tried(f"open({str(planted)!r}, 'w').write('x')\n" + NEXT).outcome == "failed"
    assert tried("open('/usr/planted', 'w')\n" + NEXT).detail.startswith("OSError: [Errno 30]")
    assert not planted.exists()


def test_a_file_of_ones_own_may_be_written_and_is_gone_afterwards() -> None:
    assert tried("open('x', 'w').write('1')\n" + NEXT).outcome == "passed"
    assert tried("open('x').read()\n" + NEXT).detail.startswith("FileNotFoundError")


def test_the_hosts_files_are_not_there() -> None:
    look = f"import os\ndef f(x):\n    return os.path.exists({str(ROOT)!r}) or os.listdir('/tmp')\n"
    assert tried(look, "assert f(0) == []").outcome == "passed"


def test_a_socket_reaches_nobody(listener: tuple[int, list[object]]) -> None:
    port, came = listener
    call = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)\n"
    assert tried(call + NEXT).detail.startswith("OSError: [Errno 101]")
    assert came == []


def test_an_endless_loop_is_stopped() -> None:
    assert tried("def f(x):\n    while True:\n        pass\n").outcome == "timeout"
    assert tried("while True:\n    print('x' * 10**6)\n").outcome == "timeout"


def test_an_endless_test_is_stopped() -> None:
    assert (
        tried(
            NEXT, "while True:\n    try:\n        f(1)\n    except BaseException:\n        pass"
        ).outcome
        == "timeout"
    )


def test_an_orphan_holds_nothing_up_and_does_not_live_on() -> None:
    mark = f"orphan{os.getpid()}"
    orphan = "import os, time\nif not os.fork():\n    os.setsid()\n    time.sleep(600)\n"
    assert tried(named(mark) + orphan + NEXT).outcome == "passed"
    assert living(mark) == 0


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos._exit(0)\n",
        "import sys\nsys.exit(0)\n",
        "import os\ndef f(x):\n    os._exit(0)\n",
        'print(\'{"outcome": "passed", "detail": "", "sandbox": ""}\')\n',
        "import os\nfor i in range(99):\n    try:\n"
        '        os.write(i, b\'{"outcome": "passed"}\')\n    except OSError:\n        pass\n',
        "class E:\n    def __eq__(self, other):\n        return True\ndef f(x):\n    return E()\n",
        "class E(int):\n    def __eq__(self, other):\n        return True\nf = lambda x: E()\n",
        "import builtins\nbuiltins.AssertionError = type('Quiet', (Exception,), {})\n"
        "def f(x):\n    raise AssertionError\n",
        "import gc\ndef f(x):\n"
        "    seen = [o for o in gc.get_objects() if isinstance(o, dict) and 'test' in o]\n"
        "    return 2 if seen else 0\n",
        "import os, signal\nos.kill(1, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGTERM)\n",
    ],
)
def test_a_pass_cannot_be_faked(program: str) -> None:
    assert tried(program).outcome == "failed"


def test_the_judge_cannot_be_traced() -> None:
    trace = "import ctypes\nf = lambda x: ctypes.CDLL(None).ptrace(16, 1, 0, 0)\n"  # PTRACE_ATTACH
    assert tried(trace, "assert f(0) == -1").outcome == "passed"


def test_walls_cannot_be_taken_down() -> None:
    undo = (
        "import ctypes\nc = ctypes.CDLL(None)\n"
        "def f(x):\n    return [c.umount2(b'/usr', 2), c.unshare(0x10020000), c.unshare(0x20000),\n"
        "            c.mount(b'x', b'/tmp', b'tmpfs', 0, None), c.setresuid(0, 0, 0)]\n"
    )
    assert tried(undo, "assert f(0) == [-1] * 5, f(0)").outcome == "passed"


def test_tests_draw_the_same_numbers_every_time() -> None:
    draw = "import random\nassert f(random.random()) == 0"
    first = tried("def f(x):\n    raise ValueError(x)\n", draw)
    assert first.detail.startswith("ValueError: 0.")
    assert tried("def f(x):\n    raise ValueError(x)\n", draw) == first


@pytest.mark.parametrize(
    "value",
    [None, True, 3, 2**80, -1.5, float("inf"), "\u65e5\ud800", [1, (2, [3])], {(1, 2): {"a": {3}}}],
)
def test_plain_values_come_back_as_they_are(value: object) -> None:
    again = decode(encode(value))
    assert again == value
    assert type(again) is type(value)


def test_what_is_not_plain_does_not_cross() -> None:
    with pytest.raises(TypeError, match="a object cannot be returned"):
        encode(object())


@pytest.mark.parametrize("name", ["timeout_s", "memory_mib", "processes", "files", "file_mib"])
def test_a_limit_is_above_0(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        Limits(**{**vars(LIMITS), name: 0})


ASK = """
from bench import sandbox
try:
    sandbox.check()
    print('isolated')
except ValueError as error:
    print(error)
"""


def asked(*before: str, python: str = sys.executable, user: int | None = None) -> str:
    """What `sandbox.check` says in a process of other rights."""
    path = os.pathsep.join([str(ROOT), *(p for p in sys.path if p.endswith("site-packages"))])
    done = subprocess.run(
        [*before, python, "-B", "-c", ASK],
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        cwd="/",
        user=user,
        group=user,
        extra_groups=[] if user else None,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or done.stderr.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give rights away")
def test_without_namespaces_nothing_runs() -> None:
    said = asked("setpriv", "--bounding-set", "-sys_admin")
    assert said.startswith("score.execute needs mount, PID and network namespaces")
    assert said.endswith("this machine refuses: new namespaces: Operation not permitted")


@pytest.mark.skipif(os.geteuid() != 0, reason="runs as an ordinary user already")
def test_an_ordinary_user_has_the_same_walls() -> None:
    python = f"/usr/bin/python3.{sys.version_info.minor}"
    if not Path(python).exists():
        pytest.skip("no interpreter that every user may read")
    said = asked(python=python, user=UNPRIVILEGED)
    if "Operation not permitted" in said:
        pytest.skip(f"no user namespaces for ordinary users: {said}")
    assert said == "isolated"
