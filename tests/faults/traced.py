"""Runs a function in a forked child that stops before and after every system call, by Linux's ptrace.

Needs Linux 5.3, whose PTRACE_GET_SYSCALL_INFO is the same on every machine, and the right to trace one's own child.
"""

import ctypes
import os
import platform
import signal
import sys
from dataclasses import dataclass

TRACEME, GETREGS, SETREGS, SYSCALL, SETOPTIONS, GET_SYSCALL_INFO = 0, 12, 13, 24, 0x4200, 0x420E
# syscall stops are told from signals; a child whose tracer dies dies too
OPTIONS = 0x1 | 0x100000
ENTRY, EXIT = 1, 2
AT_FDCWD = -100 % 2**64
# places of a call's result and number in x86_64's struct user_regs_struct
NUM_REGISTERS, RAX, ORIG_RAX = 27, 10, 15
SYSCALL_STOP = signal.SIGTRAP | 0x80

# the calls on files; those of them that change a file system are where a kill can matter and what a power loss undoes
NAMES = {
    "x86_64": {
        0: "read", 1: "write", 2: "open", 3: "close", 4: "stat", 5: "fstat", 6: "lstat", 17: "pread64", 18: "pwrite64",
        20: "writev", 32: "dup", 33: "dup2", 72: "fcntl", 74: "fsync", 75: "fdatasync", 76: "truncate", 77: "ftruncate",
        82: "rename", 83: "mkdir", 84: "rmdir", 86: "link", 87: "unlink", 91: "fchmod", 217: "getdents64", 257: "openat",
        258: "mkdirat", 262: "newfstatat", 263: "unlinkat", 264: "renameat", 285: "fallocate", 316: "renameat2",
    },
    "aarch64": {
        23: "dup", 24: "dup3", 25: "fcntl", 34: "mkdirat", 35: "unlinkat", 37: "linkat", 38: "renameat", 45: "truncate",
        46: "ftruncate", 47: "fallocate", 52: "fchmod", 56: "openat", 57: "close", 64: "write", 66: "writev",
        68: "pwrite64", 82: "fsync", 83: "fdatasync", 276: "renameat2",
    },
}.get(platform.machine(), {})  # fmt: skip
READING = {"read", "pread64", "stat", "fstat", "lstat", "newfstatat", "getdents64"}
CHANGING = set(NAMES.values()) - READING - {"close", "dup", "dup2", "dup3", "fcntl"}
# whose first argument is a path, or a folder's descriptor and then a path, and not a descriptor
BY_PATH = {"open", "stat", "lstat", "truncate", "rename", "mkdir", "rmdir", "link", "unlink"}
BY_FOLDER = {"openat", "mkdirat", "newfstatat", "unlinkat", "renameat", "renameat2"}


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
        self._failure = None
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
            elif info.op == EXIT and self._failure is not None:
                self._set_register(RAX, -self._failure)
                self._failure = None
            elif info.op == EXIT and after and entry is not None:
                yield Call(entry.name, entry.number, entry.args, ctypes.c_int64(info.words[0]).value)

    def kill(self):
        """Kills the child where it stands: a call that has not begun is never made."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            while self.status is None:
                self._wait()

    def fail(self, number):
        """Has the call that the child is about to make fail with that errno instead (x86_64 only)."""
        self._set_register(ORIG_RAX, -1)
        self._failure = number

    def path(self, call):
        """The file that a call is about: its path, or that of its descriptor; None where there is none."""
        if call.name in BY_PATH:
            return self.path_at(call.args[0])
        if call.name in BY_FOLDER:
            return self.path_at(call.args[1], call.args[0])
        try:
            return os.readlink(f"/proc/{self.pid}/fd/{call.args[0]}") if call.name != "other" else None
        except OSError:
            return None

    def path_at(self, address, folder=AT_FDCWD):
        """The absolute form of a path in the child's memory, which may be relative to a folder's descriptor."""
        path = self.text(address)
        if os.path.isabs(path):
            return path
        base = "cwd" if folder % 2**32 == AT_FDCWD % 2**32 else f"fd/{folder}"
        return os.path.join(os.readlink(f"/proc/{self.pid}/{base}"), path)

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

    def _set_register(self, place, value):
        registers = (ctypes.c_uint64 * NUM_REGISTERS)()
        self._ptrace(GETREGS, 0, ctypes.addressof(registers))
        registers[place] = value % 2**64
        self._ptrace(SETREGS, 0, ctypes.addressof(registers))

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
