"""Runs a function in a forked child that stops before and after every system call, by Linux's ptrace.

Needs Linux 5.3, whose PTRACE_GET_SYSCALL_INFO is the same on every machine, and the right to trace one's own child.
"""

import ctypes
import os
import platform
import signal
import sys
from dataclasses import dataclass

TRACEME, DETACH, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 17, 24, 0x4200, 0x420E
# syscall stops are told from signals; a child whose tracer dies dies too
OPTIONS = 0x1 | 0x100000
ENTRY, EXIT = 1, 2
SYSCALL_STOP = signal.SIGTRAP | 0x80

# the calls that change a file system, which is where a kill can matter and what a power loss undoes
NAMES = {
    "x86_64": {
        1: "write", 2: "open", 3: "close", 18: "pwrite64", 20: "writev", 32: "dup", 33: "dup2", 72: "fcntl", 74: "fsync",
        75: "fdatasync", 76: "truncate", 77: "ftruncate", 82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink",
        91: "fchmod", 257: "openat", 258: "mkdirat", 263: "unlinkat", 264: "renameat", 285: "fallocate", 316: "renameat2",
    },
    "aarch64": {
        23: "dup", 24: "dup3", 25: "fcntl", 34: "mkdirat", 35: "unlinkat", 37: "linkat", 38: "renameat", 45: "truncate",
        46: "ftruncate", 47: "fallocate", 52: "fchmod", 56: "openat", 57: "close", 64: "write", 66: "writev",
        68: "pwrite64", 82: "fsync", 83: "fdatasync", 276: "renameat2",
    },
}.get(platform.machine(), {})  # fmt: skip
CHANGING = set(NAMES.values()) - {"close", "dup", "dup2", "dup3", "fcntl"}


class _Info(ctypes.Structure):
    """Linux's struct ptrace_syscall_info; the union holds (nr, args) on entry and (result, is_error) on exit."""

    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("ip", ctypes.c_uint64),
        ("sp", ctypes.c_uint64),
        ("words", ctypes.c_uint64 * 8),
    )


@dataclass(frozen=True)
class Call:
    """One system call: its name where NAMES has it, its number, its six arguments, and once it is done its result."""

    name: str
    number: int
    args: tuple[int, ...]
    result: int | None = None


class Traced:
    """A child that runs `work` and is stopped at its system calls; it is dead when the `with` block is left."""

    def __init__(self, work):
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work)
        self.status = None
        self._wait()
        if self.status is None:
            self._ptrace(SETOPTIONS, 0, OPTIONS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def calls(self, *, after=False):
        """Each system call before it is made; with `after`, once more when it is done, and then with its result."""
        entry = None
        while self._to_next_stop():
            info = _Info()
            self._ptrace(GET_SYSCALL_INFO, ctypes.sizeof(info), ctypes.addressof(info))
            if info.op == ENTRY:
                number, *args = info.words[:7]
                entry = Call(NAMES.get(number, "other"), number, tuple(args))
                yield entry
            elif info.op == EXIT and after and entry is not None:
                yield Call(entry.name, entry.number, entry.args, ctypes.c_int64(info.words[0]).value)

    def kill(self):
        """Kills the child where it stands: a call that has not begun is never made."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.status is None:
                self._wait()

    def memory(self, address, size):
        """The bytes of the child's memory."""
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, address)

    def text(self, address):
        """The C string at an address, such as a path."""
        found = b""
        while b"\0" not in found:
            # to the end of the page, since the next one may not be there
            found += self.memory(address + len(found), 4096 - (address + len(found)) % 4096)
        return os.fsdecode(found.split(b"\0", 1)[0])

    def _run(self, work):
        status = 1
        try:
            self._ptrace(TRACEME, 0, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
            status = 0
        except BaseException as error:
            print(f"the traced child ended with {error!r}", file=sys.stderr, flush=True)
        finally:
            os._exit(status)

    def _to_next_stop(self):
        signum = 0
        while self.status is None:
            self._ptrace(SYSCALL, 0, signum)
            stopped = self._wait()
            if stopped == SYSCALL_STOP:
                return True
            # a signal of the child's own is handed on
            signum = stopped or 0
        return False

    def _wait(self):
        """The signal that stopped the child; None once it has ended, and then `status` says how."""
        _, status = os.waitpid(self.pid, 0)
        if os.WIFSTOPPED(status):
            return os.WSTOPSIG(status)
        self.status = os.waitstatus_to_exitcode(status)
        return None

    def _ptrace(self, request, address, data):
        arguments = (ctypes.c_long(request), ctypes.c_long(self.pid), ctypes.c_void_p(address), ctypes.c_void_p(data))
        if self._libc.ptrace(*arguments) < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"ptrace request {request:#x}: {os.strerror(number)}")


def can_trace():
    """Whether this machine lets a process trace its child."""
    if sys.platform != "linux" or not NAMES:
        return False
    try:
        with Traced(lambda: None) as child:
            return next(child.calls(), None) is not None
    except OSError:
        return False
