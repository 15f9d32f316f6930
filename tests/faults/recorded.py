"""What a traced process does to the files below a folder, call by call, played on a `Disk`."""

import os

import disk
import traced


class Recorder:
    """Follows the calls of a child; `done` once it wrote to the descriptor `told_on`.

    Files are told by their inodes, so that copies of descriptors need no account.
    """

    def __init__(self, child, root, *, told_on):
        self.child = child
        self.told_on = told_on
        self.done = False
        self.root = os.path.realpath(root)
        self.disk = disk.Disk(self.root)
        self.numbers = {}
        for parent, folders, files in os.walk(self.root):
            for path in [parent, *(os.path.join(parent, name) for name in [*folders, *files])]:
                self.numbers[os.stat(path).st_ino] = self.disk.find(path)

    def changes(self):
        """The calls that changed something, each when it is done and the disk has it."""
        for call in self.child.calls(after=True):
            succeeded = call.result is not None and call.result >= 0
            self.done |= call.name == "write" and call.args[0] == self.told_on
            if succeeded and call.name in traced.CHANGING and self._play(call):
                yield call

    def _play(self, call):
        name, (first, second, third, fourth, *_) = call.name, call.args
        if name in ("write", "pwrite64", "ftruncate", "fsync", "fdatasync"):
            return self._on_descriptor(name, first, second, fourth, call.result)
        if name in ("open", "openat", "mkdir", "mkdirat"):
            path = self._path(second, first) if name.endswith("at") else self._path(first)
            return path is not None and self._created(path, folder=name.startswith("mkdir"))
        if name in ("unlink", "rmdir", "unlinkat"):
            path = self._path(second, first) if name == "unlinkat" else self._path(first)
            return self._if_ours(self.disk.remove, path)
        if name == "rename":
            return self._if_ours(self.disk.rename, self._path(first), self._path(second))
        if name in ("renameat", "renameat2"):
            return self._if_ours(self.disk.rename, self._path(second, first), self._path(fourth, third))
        if name == "fchmod":
            return False
        raise NotImplementedError(f"{name} is not played on the disk")

    def _on_descriptor(self, name, descriptor, address, offset, result):
        number = self._number(descriptor)
        if number is None:
            return False
        if name in ("fsync", "fdatasync"):
            self.disk.sync(number)
        elif name == "ftruncate":
            self.disk.truncate(number, address)
        else:
            start = offset if name == "pwrite64" else self._position(descriptor) - result
            self.disk.write(number, start, self.child.memory(address, result))
        return True

    def _number(self, descriptor):
        here = f"/proc/{self.child.pid}/fd/{descriptor}"
        inside = os.readlink(here).startswith(self.root)
        return self.numbers[os.stat(here).st_ino] if inside else None

    def _position(self, descriptor):
        with open(f"/proc/{self.child.pid}/fdinfo/{descriptor}") as file:
            return int(file.readline().split()[1])

    def _path(self, address, folder=traced.AT_FDCWD):
        path = self.child.path_at(address, folder)
        return path if path.startswith(f"{self.root}/") or path == self.root else None

    def _created(self, path, *, folder):
        if path == self.root or self.disk.find(path) is not None:
            return False
        self.disk.create(path, folder=folder)
        self.numbers[os.stat(path).st_ino] = self.disk.find(path)
        return True

    def _if_ours(self, act, *paths):
        if any(path is None for path in paths):
            return False
        act(*paths)
        return True
