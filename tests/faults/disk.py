"""A file system's promise and no more: what a power loss may leave of the calls that a program made.

Bytes last once their file was synced, names once their folder was. What was not synced may be there or not: writes in any
order and cut into sectors, names in the order they were given. A rename happens as a whole.
"""

import os
from dataclasses import dataclass, field

SECTOR = 512


@dataclass
class File:
    """Bytes that last, and the writes (offset, data) and truncations (size, None) since the last sync."""

    durable: bytes = b""
    pending: list = field(default_factory=list)


@dataclass
class Names:
    """Changes of names that happen together: (folder, name, what it names from then on, or None)."""

    changes: list

    def touches(self, folder):
        return any(changed == folder for changed, _, _ in self.changes)


class Disk:
    """Files and folders by number; folder 0 is the root. It starts as a copy of a real folder, all of it synced."""

    def __init__(self, root):
        self.root = root
        self.files = {}
        self.now = {0: {}}
        self.durable = {0: {}}
        self.pending = []
        for parent, folders, files in os.walk(root):
            for name in folders:
                self.durable[self._place(os.path.join(parent, name), folder=True)] = {}
            for name in files:
                path = os.path.join(parent, name)
                with open(path, "rb") as file:
                    self.files[self._place(path)].durable = file.read()
        self.durable = {number: dict(names) for number, names in self.now.items()}
        self.pending = []

    def find(self, path):
        """The number of what is at the path now; None for nothing."""
        number = 0
        for name in self._parts(path):
            number = self.now.get(number, {}).get(name)
        return number

    def create(self, path, *, folder=False):
        if self.find(path) is None:
            self._place(path, folder=folder)

    def rename(self, source, target):
        number = self.find(source)
        self._change([(*self._where(source), None), (*self._where(target), number)])

    def remove(self, path):
        self._change([(*self._where(path), None)])

    def write(self, number, offset, data):
        self.files[number].pending.append((offset, data))

    def truncate(self, number, size):
        self.files[number].pending.append((size, None))

    def sync(self, number):
        if number in self.files:
            file = self.files[number]
            file.durable, file.pending = _applied(file.durable, file.pending), []
            return
        for names in [names for names in self.pending if names.touches(number)]:
            self._apply(self.durable, names)
            self.pending.remove(names)

    def image(self, *, num_names, keeps):
        """Path -> bytes after a power loss at this moment, folders as None.

        `num_names` of the changes of names made it to the disk, and of the writes those pieces for which `keeps()` is true.
        """
        folders = {number: dict(names) for number, names in self.durable.items()}
        for names in self.pending[:num_names]:
            self._apply(folders, names)
        found = {}
        waiting = [(0, "")]
        while waiting:
            number, path = waiting.pop()
            if number in self.files:
                file = self.files[number]
                found[path] = _applied(file.durable, [piece for piece in _pieces(file.pending) if keeps()])
                continue
            found[path] = None
            waiting += [(inner, os.path.join(path, name)) for name, inner in sorted(folders.get(number, {}).items())]
        return found

    def _place(self, path, *, folder=False):
        number = len(self.now) + len(self.files)
        if folder:
            self.now[number] = {}
        else:
            self.files[number] = File()
        self._change([(*self._where(path), number)])
        return number

    def _change(self, changes):
        names = Names(changes)
        self._apply(self.now, names)
        self.pending.append(names)

    def _apply(self, folders, names):
        for folder, name, number in names.changes:
            entries = folders.setdefault(folder, {})
            if number is None:
                entries.pop(name, None)
            else:
                entries[name] = number

    def _where(self, path):
        *parents, name = self._parts(path)
        return self.find(os.path.join(self.root, *parents)), name

    def _parts(self, path):
        return [part for part in os.path.relpath(path, self.root).split(os.sep) if part != "."]


def _pieces(pending):
    """The writes cut where sectors end; each may be lost alone."""
    for offset, data in pending:
        if data is None:
            yield offset, None
            continue
        begin = 0
        while begin < len(data):
            end = min(len(data), begin + SECTOR - (offset + begin) % SECTOR)
            yield offset + begin, data[begin:end]
            begin = end


def _applied(content, changes):
    content = bytearray(content)
    for offset, data in changes:
        end = offset if data is None else offset + len(data)
        if len(content) < end:
            content.extend(bytes(end - len(content)))
        if data is None:
            del content[offset:]
        else:
            content[offset:end] = data
    return bytes(content)
