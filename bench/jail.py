"""Inside of the sandbox: a process shuts itself in, and a program answers to its tests there.

Run by `bench.sandbox` in a bare interpreter; nothing but the standard library may be imported.
Three processes, each the next one's parent:

    keeper   makes the namespaces and a root of its own, then waits
    judge    first process of the PID namespace: runs the tests; when it ends, all in there end
    program  runs what the model wrote, and calls of it that the judge asks for

The program cannot forge a verdict. It is made before the judge reads the tests, holds no end of
the pipe that takes the verdict, may not trace the judge, and gives it plain values only (JSON):
leaving early, printing, an object that equals everything or a patched module change no test.
"""

import contextlib
import ctypes
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from bench import trial

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442  # the same on every architecture
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID = 1, 2
PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534
INODES = 4096  # of the program's own folder
DEVICES = ("null", "zero", "full", "random", "urandom")
# Where shared libraries of an interpreter may lie; a link is made again, a folder is mounted.
SYSTEM = ("/usr", "/bin", "/lib", "/lib32", "/lib64", "/nix/store", "/etc/ld.so.cache")

_libc = ctypes.CDLL(None, use_errno=True)


class Refused(Exception):  # noqa: N818  an outcome with a name of its own
    """Isolation that cannot be had on this machine."""


def main() -> NoReturn:
    """Read a job from standard input, and write one verdict to standard output."""
    order = trial.receive(0)
    verdict = os.dup(1)
    try:
        sandbox = enclose(**order["cell"])
        judge = os.fork()
        if not judge:
            _judge(order["trial"], verdict, sandbox)
    except (Refused, OSError) as error:
        trial.tell(verdict, "refused", str(error))
        os._exit(0)
    _, status = os.waitpid(judge, 0)
    if status:
        how = f"the judge was ended by signal {os.WTERMSIG(status)}"
        trial.tell(verdict, "killed", how if os.WIFSIGNALED(status) else "the judge broke off")
    os._exit(0)


def enclose(*, root: str, python: Sequence[str], scratch_mib: int) -> str:
    """Leave the host's files, network, processes and semaphores; give what was left.

    root: an empty folder to build in. python: folders that the interpreter needs.
    """
    had = "mount+pid+net+ipc+uts"
    kinds = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    if os.geteuid() == 0:
        _call("unshare", kinds, doing="new namespaces")
    else:
        maps = {
            "setgroups": "deny",
            "uid_map": f"0 {os.geteuid()} 1",
            "gid_map": f"0 {os.getegid()} 1",
        }
        _call("unshare", kinds | CLONE_NEWUSER, doing="new namespaces")
        for name, text in maps.items():
            _write(f"/proc/self/{name}", text)
        had += "+user"
    with contextlib.suppress(Refused):  # a user namespace owns this file on newer kernels only
        _write("/proc/sys/kernel/shmmni", "0")  # shared segments escape the limit of memory
        had += "+noshm"
    _build_root(root, [*SYSTEM, *python], scratch_mib)
    _check_network()
    return had


def _build_root(root: str, places: Sequence[str], scratch_mib: int) -> None:
    """Make a read-only root of the interpreter, some devices and an empty /tmp; move into it."""
    # Nothing that is mounted here may reach the host.
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for place in [*places, *(f"/dev/{device}" for device in DEVICES)]:
        _show(place, root)
    Path(f"{root}/tmp").mkdir(exist_ok=True)
    size = f"size={scratch_mib}m,nr_inodes={INODES},mode=1777"
    _mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    os.chdir(root)
    _call("pivot_root", b".", b".", doing="pivot_root")  # the old root now lies over the new one
    _call("umount2", b".", MNT_DETACH, doing="umount of the old root")
    _read_only("/", recursive=False)
    os.chdir("/tmp")
    if not os.statvfs("/").f_flag & os.ST_RDONLY:
        raise Refused("the root must be read-only, and is not")


def _show(place: str, root: str) -> None:
    """Give a host's file or folder the same place in the new root, read-only."""
    source, target = Path(place), Path(root + place)
    if target.exists() or target.is_symlink() or not source.exists():
        return  # shown with a folder above it, or not on this machine
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    if source.is_dir():
        target.mkdir()
    else:
        target.touch()
    _mount(place, str(target), None, MS_BIND | MS_REC)
    _read_only(str(target), recursive=True)


def _read_only(place: str, *, recursive: bool) -> None:
    attributes = (ctypes.c_uint64 * 4)(MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    _call(
        "syscall",
        ctypes.c_long(SYS_MOUNT_SETATTR),
        ctypes.c_long(AT_FDCWD),
        place.encode(),
        ctypes.c_long(flags),
        ctypes.byref(attributes),
        ctypes.c_long(ctypes.sizeof(attributes)),
        doing="mount_setattr (Linux 5.12)",
    )


def _check_network() -> None:
    """Ask for a route out; connecting a datagram socket sends nothing."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # an address for documentation, RFC 5737
        raise Refused("the network must be unreachable, and is not")


def _judge(order: dict[str, Any], verdict: int, sandbox: str) -> NoReturn:
    """First process of its PID namespace: give up every right, start the program, judge it."""
    code = 1
    try:
        if os.getpid() != 1:
            raise Refused("the judge must be the first process of a PID namespace")
        sandbox = _drop_rights(sandbox)
        null = os.open("/dev/null", os.O_RDWR)
        for standard in (1, 2):
            os.dup2(null, standard)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # which the first process then never gets
        asking, answering = socket.socketpair()
        if not os.fork():
            os.dup2(null, 0)  # the tests come from there
            os.close(verdict)
            asking.close()
            trial.serve(order, answering)
        answering.close()
        signal.signal(signal.SIGALRM, trial.time_is_up)
        signal.setitimer(signal.ITIMER_REAL, order["timeout_s"])
        trial.hold(trial.receive(0), asking, verdict, sandbox, memory_mib=order["memory_mib"])
        code = 0
    except (Refused, OSError) as error:
        trial.tell(verdict, "refused", str(error))
        code = 0
    finally:
        os._exit(code)  # nothing of the keeper's may run in its fork


def _drop_rights(had: str) -> str:
    """Become nobody where we are root, without capabilities; give the namespaces that we are in.

    A user namespace that maps nobody lets the program make no other, in which it might mount; and
    its processes are counted apart from those of other sandboxes.
    """
    as_user = "user" in had
    if not as_user:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    if _libc.unshare(CLONE_NEWUSER) == 0:
        had += "" if as_user else "+user"
    elif as_user:  # for root it is one wall more, not the wall
        raise Refused("a user namespace in a user namespace cannot be had")
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, doing="no_new_privs")
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", ctypes.byref(header), ctypes.byref(none), doing="capset")
    _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0, doing="PR_SET_DUMPABLE")  # nobody may trace us
    return had


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _call("mount", *texts, ctypes.c_ulong(flags), data.encode(), doing=f"mount of {target}")


def _call(name: str, *arguments: object, doing: str) -> None:
    if getattr(_libc, name)(*arguments) != 0:
        raise Refused(f"{doing}: {os.strerror(ctypes.get_errno())}")


def _write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text, encoding="ascii")
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from error


def interpreter() -> Sequence[str]:
    """Folders that this interpreter is made of."""
    paths = {sys.base_prefix, sys.base_exec_prefix, str(Path(sys.executable).resolve().parent)}
    return sorted(path for path in paths if path not in ("", "/"))


if __name__ == "__main__":
    main()
