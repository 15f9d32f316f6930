"""Files beside an adapter's weights that belong to it: tokenizer, chat template, a reward model's value head.

They are kept byte by byte and not interpreted: neither mixtures nor the content hash depend on them.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.formats._files import open_file, present

_KEPT = """
added_tokens.json chat_template.jinja chat_template.json merges.txt sentencepiece.bpe.model special_tokens_map.json
spiece.model tokenizer.json tokenizer.model tokenizer_config.json value_head.safetensors vocab.json vocab.txt
"""
KEPT = tuple(_KEPT.split())
# the largest tokenizers have half of this size
MAX_KEPT_BYTES = 64 * 2**20
# files that may belong to it, too, but are left out with a warning
_PICKLES = ("value_head.bin",)


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
    """Return the files as an adapter has them. Raises AdapterUnsupported for other names and sizes."""
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
    """Return the files that every one of several adapters has, byte for byte the same."""
    tables = [as_kept_files(files).files for files in parents]
    first = tables[0]
    alike = [name for name in first if all(name in one and one[name].sha256 == first[name].sha256 for one in tables)]
    return KeptFiles({name: first[name] for name in alike})


def read_kept(folder: Path) -> KeptFiles:
    """Return the kept files in a folder. Warns of those left out: damaged, too large, or a pickle."""
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
    for name in _PICKLES:
        if present(folder, name) and f"{Path(name).stem}.safetensors" not in files:
            _warn(
                f"{folder}: {name}, a pickle, is left out of the adapter, whose factors are read; save it as "
                f"{Path(name).stem}.safetensors to keep it"
            )
    return KeptFiles(files)


# many adapters of one base bring the same tokenizer
_in_use: WeakValueDictionary[str, KeptFile] = WeakValueDictionary()


def _in_memory(data: bytes) -> KeptFile:
    digest = hashlib.sha256(data).hexdigest()
    return _in_use.setdefault(digest, KeptFile(digest, len(data), lambda: data))


def _warn(text: str) -> None:
    warnings.warn(text, UserWarning, stacklevel=5)
