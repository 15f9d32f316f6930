"""The files of a foreign folder: only regular files inside it, sizes capped, JSON without surprises.

Files beside an adapter's weights that belong to it (tokenizer, chat template, a reward model's value head) are kept byte by
byte and not interpreted: neither mixtures nor the content hash depend on them.
"""

import errno
import hashlib
import json
import os
import stat
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, HubError

SUFFIXES = {".json", ".safetensors", ".md"}
# norms and embeddings that LongLoRA and SinkLoRA train beside a LoRA
BESIDE = "trainable_params.bin"
# a file written this lately may be rewritten with the same time stamp: clocks of file systems have coarse steps
FRESH_S = 2.0

State = tuple[int, int, int, int, str]


@contextmanager
def require_unchanged(folder: Path, names: Collection[str]) -> Iterator[None]:
    """Raise AdapterCorrupt, naming the file, if one was replaced, rewritten, added or removed within the block.

    Files with a suffix in `SUFFIXES` or a name in `names` count. The error replaces a HubError of the block, which becomes
    its cause. Files are compared by identity, size and time of writing; only files written in the last seconds, whose time
    may not tell, are also compared by hash.
    """
    fresh_ns = time.time_ns() - int(FRESH_S * 1e9)
    before = _states(folder, fresh_ns, names)
    cause: HubError | None = None
    try:
        yield
    except HubError as error:
        cause = error
    after = _states(folder, fresh_ns, names)
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        sizes = [f"{state[changed[0]][2]} bytes" if changed[0] in state else "absent" for state in (before, after)]
        raise AdapterCorrupt(
            f"{folder}: {changed[0]} changed while it was read ({sizes[0]} before, {sizes[1]} after); read the adapter "
            "again when nothing writes to the folder"
        ) from cause
    if cause is not None:
        raise cause


def _states(folder: Path, fresh_ns: int, names: Collection[str]) -> dict[str, State]:
    try:
        held = os.listdir(folder) if folder.is_dir() else None
    except OSError:
        return {}
    counted = [name for name in held or () if name in names or os.path.splitext(name)[1] in SUFFIXES]
    states: dict[str, State] = {}
    for path in [folder] if held is None else [folder / name for name in counted]:
        # a dangling link has no state; reading it raises
        with suppress(OSError):
            status = path.stat()
            fresh = status.st_mtime_ns >= fresh_ns and stat.S_ISREG(status.st_mode)
            digest = _digest(path) if fresh else ""
            states[path.name] = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, digest)
    return states


def _digest(path: Path) -> str:
    try:
        # another kind of file may have taken the place meanwhile, and opening a FIFO would wait
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            require_held(descriptor, os.fstat(descriptor).st_size, str(path))
            file.seek(0)
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, HubError):
        # reading the file raises
        return ""


LFS_MARK = b"version https://git-lfs.github.com/spec/"
MAX_JSON_BYTES = 4 * 2**20
# no adapter has a larger file of weights
MAX_FILE_BYTES = 32 * 2**30
# from this size on, the disk must hold at least one of every MOST_PER_HELD bytes of a file: the rest may be holes
HOLES_FROM_BYTES = 2**28
MOST_PER_HELD = 16
MAX_LISTED = 12


@contextmanager
def open_file(folder: Path, name: str) -> Iterator[tuple[BinaryIO, int]]:
    """Yield the file `name` of the folder, open for reading, and its size in bytes.

    Raises AdapterCorrupt for anything but a regular file (a FIFO would block, a device never end), for a link that leaves
    the folder, for a git-LFS pointer, and for a file that is nearly all holes; AdapterUnsupported above `MAX_FILE_BYTES`.
    Links from a snapshot of the model hub's cache to its own blobs are followed.
    """
    path = _inside(folder, name)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise AdapterCorrupt(
            f"{folder}: cannot open {name} ({error.strerror}); the folder holds {listing(folder)}"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO"}
        what = kinds.get(stat.S_IFMT(status.st_mode), "a device or socket")
        raise AdapterCorrupt(f"{folder}: {name} is {what}, not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        require_held(descriptor, status.st_size, f"{folder}: {name}")
        if status.st_size < 1024 and file.read(len(LFS_MARK)) == LFS_MARK:
            raise AdapterCorrupt(
                f"{folder}: {name} is a git-LFS pointer of {status.st_size} bytes, not the file itself; "
                "run `git lfs pull` in the clone, or download the repository with huggingface_hub"
            )
        file.seek(0)
        yield file, status.st_size


def require_held(descriptor: int, size: int, where: str) -> None:
    """Raise AdapterUnsupported for a file above the limit, AdapterCorrupt for a large one that is nearly all holes."""
    if size > MAX_FILE_BYTES:
        raise AdapterUnsupported(
            f"{where} has {size:,} bytes, above the limit of {MAX_FILE_BYTES:,} for a file of an adapter"
        )
    held = size if size < HOLES_FROM_BYTES else _held_bytes(descriptor, size)
    if held * MOST_PER_HELD < size:
        raise AdapterCorrupt(
            f"{where} has {size:,} bytes, but the disk holds only {held:,} of them and the rest are holes, as a download or "
            "copy that broke off leaves them; get the file again"
        )


def _held_bytes(descriptor: int, size: int) -> int:
    """Return the bytes outside of holes, counted up to the number required; `size` if the file system cannot tell."""
    held = end = 0
    try:
        while held * MOST_PER_HELD < size:
            begin = os.lseek(descriptor, end, os.SEEK_DATA)
            end = os.lseek(descriptor, begin, os.SEEK_HOLE)
            held += end - begin
    except AttributeError:
        return size
    except OSError as error:
        # no data after `end`
        return held if error.errno == errno.ENXIO else size
    return held


def read_json(folder: Path, name: str, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """Return the JSON object in a file. Raises AdapterCorrupt, with the reason, for anything else or a file too large."""
    try:
        return parse_json(read_bytes(folder, name, max_bytes))
    except ValueError as error:
        raise AdapterCorrupt(f"{folder}: {name} is not a valid JSON object: {error}") from error


def read_bytes(folder: Path, name: str, max_bytes: int) -> bytes:
    """Return the file's bytes. Raises AdapterCorrupt above `max_bytes`."""
    with open_file(folder, name) as (file, size):
        if size > max_bytes:
            raise AdapterCorrupt(f"{folder}: {name} has {size} bytes, more than the limit of {max_bytes}")
        # no more than the file's size, since reading allocates as many bytes as it is asked for
        return file.read(size + 1)


def parse_json(raw: bytes) -> dict[str, Any]:
    """Parse a strict JSON object: UTF-8 without a byte order mark, no NaN or Infinity, no key twice, not deeply nested.

    Raises ValueError with the reason.
    """
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ValueError("it begins with a byte order mark; save it as UTF-8 without one")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_no_duplicates)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError(f"it is a {type(value).__name__}, not an object")
    return value


def listing(folder: Path) -> str:
    """Return a phrase that lists a folder's entries, with a hint at adapter folders in it."""
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        return f"nothing readable ({error.strerror})"
    names = [f"{entry.name}/" if entry.is_dir() else entry.name for entry in entries[:MAX_LISTED]]
    if len(entries) > MAX_LISTED:
        names.append(f"and {len(entries) - MAX_LISTED} more")
    nested = [entry.name for entry in entries if entry.is_dir() and (entry / "adapter_config.json").is_file()]
    hint = f"; did you mean {', '.join(f'{name}/' for name in nested[:3])}?" if nested else ""
    return (", ".join(names) or "nothing") + hint


def present(folder: Path, name: str) -> bool:
    """Return True if the folder has an entry of this name, of any kind; a dangling link counts."""
    return os.path.lexists(os.path.join(folder, name))


def folder_within(folder: Path, name: str) -> Path:
    """Return the folder of that name in `folder`. Raises AdapterCorrupt if there is none or its link leaves `folder`."""
    where = folder / name
    if not where.is_dir() or not where.resolve().is_relative_to(folder.resolve()):
        raise AdapterCorrupt(f"{folder} has no folder {name!r} in it")
    return where


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    # os.path: a name that no file can have is not a link either, and is refused on opening
    if not os.path.islink(path):
        return path
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        # Python before 3.13 raises for a link that leads to itself, and later versions return it
        target = path
    if os.path.islink(target):
        raise AdapterCorrupt(f"{folder}: {name} is a link that leads to itself; copy the file into the folder")
    # a snapshot in the model hub's cache is links to the blobs of its folder `models--owner--name`
    snapshots = [parent.parent for parent in folder.absolute().parents if parent.name == "snapshots"]
    roots = [folder, *(repository for repository in snapshots if repository.name.startswith("models--"))]
    if not any(target.is_relative_to(root.resolve()) for root in roots):
        raise AdapterCorrupt(f"{folder}: {name} is a link that leaves the folder; copy the file into it")
    return target


def _no_constant(literal: str) -> Any:
    raise ValueError(f"it has the literal {literal}, which is not a number in JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:100]!r} occurs twice")
    return result


_KEPT = """
added_tokens.json chat_template.jinja chat_template.json merges.txt sentencepiece.bpe.model special_tokens_map.json
spiece.model tokenizer.json tokenizer.model tokenizer_config.json value_head.safetensors vocab.json vocab.txt
"""
KEPT = tuple(_KEPT.split())
# the largest tokenizers have half of this size
MAX_KEPT_BYTES = 64 * 2**20
# this file may belong to an adapter, too, but as a pickle it is left out with a warning
_PICKLED_HEAD = "value_head.bin"


@dataclass(frozen=True, eq=False)
class KeptFile:
    """A file's sha256, its size, and the function that returns its bytes."""

    sha256: str
    size_bytes: int
    read: Callable[[], bytes]


class KeptFiles(Mapping[str, bytes]):
    """The bytes of an adapter's files by name, sorted; those of a hub are read when they are used."""

    def __init__(self, files: Mapping[str, KeptFile]) -> None:
        self.files = dict(sorted(files.items()))

    def __getitem__(self, name: str) -> bytes:
        return self.files[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def __contains__(self, name: object) -> bool:
        # Mapping's own __contains__ would read it
        return name in self.files

    def __reduce__(self) -> tuple[Any, ...]:
        return as_kept_files, (dict(self),)

    def __repr__(self) -> str:
        return f"KeptFiles({', '.join(f'{name}: {file.size_bytes:,} bytes' for name, file in self.files.items())})"


def as_kept_files(files: Mapping[str, bytes]) -> KeptFiles:
    """Return the files as `KeptFiles`. Raises AdapterUnsupported for a name not in KEPT or a file that is too large."""
    if isinstance(files, KeptFiles):
        return files
    for name, data in files.items():
        if name not in KEPT or not isinstance(data, bytes):
            raise AdapterUnsupported(
                f"{name!r} with {type(data).__name__} is not a file of an adapter; those are bytes under the names "
                f"{', '.join(KEPT)}"
            )
        if len(data) > MAX_KEPT_BYTES:
            raise AdapterUnsupported(f"{name} has {len(data):,} bytes; a file of an adapter has at most {MAX_KEPT_BYTES:,}")
    return KeptFiles({name: _in_memory(data) for name, data in files.items()})


def shared_files(parents: Sequence[Mapping[str, bytes]]) -> KeptFiles:
    """Return the files that all parents have with the same bytes."""
    tables = [as_kept_files(files).files for files in parents]
    first = tables[0]
    alike = [name for name in first if all(name in one and one[name].sha256 == first[name].sha256 for one in tables)]
    return KeptFiles({name: first[name] for name in alike})


def read_kept(folder: Path) -> KeptFiles:
    """Return the files in a folder that have a name in KEPT. Warns of files left out: damaged, too large, or a pickle."""
    files = {}
    for name in KEPT:
        if present(folder, name):
            try:
                with open_file(folder, name) as (file, size):
                    if size > MAX_KEPT_BYTES:
                        raise AdapterUnsupported(
                            f"{folder}: {name} has {size:,} bytes, above the limit of {MAX_KEPT_BYTES:,}"
                        )
                    files[name] = _in_memory(file.read(size))
            except (AdapterCorrupt, AdapterUnsupported) as error:
                _warn(f"{name} is left out of the adapter, whose factors are read: {error}")
    if present(folder, _PICKLED_HEAD) and "value_head.safetensors" not in files:
        _warn(
            f"{folder}: {_PICKLED_HEAD}, a pickle, is left out of the adapter, whose factors are read; save it as "
            "value_head.safetensors to keep it"
        )
    return KeptFiles(files)


# many adapters of one base bring the same tokenizer
_in_use: WeakValueDictionary[str, KeptFile] = WeakValueDictionary()


def _in_memory(data: bytes) -> KeptFile:
    digest = hashlib.sha256(data).hexdigest()
    return _in_use.setdefault(digest, KeptFile(digest, len(data), lambda: data))


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=5)
