"""The interface of layouts that are one file without a config, alone or in a folder, and the reading that they share."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.base import fingerprint
from loraweave.hub.formats._card import base_model_of_readme, read_card
from loraweave.hub.formats._contents import Contents, Reader
from loraweave.hub.formats._conversion import Bound
from loraweave.hub.formats._files import listing, open_file
from loraweave.hub.formats._peft_config import WEIGHTS
from loraweave.hub.formats._pickle import read_pickle, texts_in_pickle
from loraweave.hub.formats._safetensors import INTEGERS, dtype_name, file_metadata, read_tensors, tensor_names
from loraweave.lowrank.algebra import all_finite
from loraweave.types import Factors

MAX_FILES = 64
MAX_NOTES = 40
MAX_NOTE_TEXT = 400

Held = dict[str, dict[str, Tensor]]


class FileFormat(Reader):
    """A layout of one file of tensors, alone or in a folder, recognised by the tensors' names."""

    # the names of one layer's factors in such a file
    example: ClassVar[tuple[str, str]]
    # the names that its program gives such files, to download them, and pickles, which count in a folder only by these
    files: ClassVar[tuple[str, ...]] = ()
    pickles: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def knows(cls, names: Collection[str]) -> bool:
        """Return whether these tensor names are of this layout; the file's state is not checked."""

    @classmethod
    @abstractmethod
    def split(cls, name: str) -> tuple[str, str] | None:
        """Return (module as the file names it, part of its update) of a tensor; None for a name of another layout."""

    @classmethod
    @abstractmethod
    def layers(
        cls, held: Held, metadata: Mapping[str, str], bound: Bound, model: nn.Module | None, where: str
    ) -> tuple[dict[str, Factors], dict[str, Any]]:
        """Return the update of every layer, and the notes of those that were converted.

        `held` has the tensors by module and part, and may be emptied on the way; `metadata` is the file's own.
        """

    @classmethod
    def base_id(cls, source: Path) -> str:
        """Return the base model's id by a folder's card; "" for a file, whose neighbours say nothing about it."""
        return base_model_of_readme(source) if source.is_dir() else ""

    @classmethod
    def recognises(cls, source: Path, *, allow_pickle: bool = False) -> bool:
        """Return whether `source` is, or has in it, a file of this layout; pickles count with `allow_pickle`."""
        return bool(cls._files(source, allow_pickle))

    @classmethod
    def _read(cls, source: Path, bound: Bound, model: nn.Module | None, allow_pickle: bool) -> Contents:
        """Return the update of every module, under the paths of the base's modules.

        With `model`, its names decide what the file's mean. Raises AdapterUnsupported for names that cannot be mapped
        without a guess, and for several such files in one folder.
        """
        folder, name = cls._file(source, allow_pickle)
        metadata = {} if is_pickle(name) else file_metadata(folder, name)
        held, dtypes = cls._held(folder, name)
        layers, notes = cls.layers(held, metadata, bound, model, str(folder / name))
        # a lone file's neighbours say nothing about it
        card = read_card(source)[0] if source.is_dir() else {}
        texts = {key: text for key, text in sorted(metadata.items()) if len(text) <= MAX_NOTE_TEXT}
        card |= {"file_metadata": dict(list(texts.items())[:MAX_NOTES])} if texts else {}
        card["stored_dtype"] = "+".join(sorted(dtypes))
        card |= {"conversion": notes} if notes else {}
        model_fingerprint = None if model is None else fingerprint(model)
        return Contents(cls.base_id(source), layers, model_fingerprint, card)

    @classmethod
    def _files(cls, source: Path, allow_pickle: bool = False) -> list[str]:
        names = []
        for folder, name in lora_files(source):
            if is_pickle(name) and not allow_pickle:
                continue
            try:
                if cls.knows(names_in(folder, name)):
                    names.append(name)
            except (AdapterCorrupt, AdapterUnsupported):
                continue
        return names

    @classmethod
    def _file(cls, source: Path, allow_pickle: bool) -> tuple[Path, str]:
        if source.is_file():
            refuse_pickle(source.parent, source.name, allow_pickle)
            return source.parent, source.name
        names = cls._files(source, allow_pickle)
        if len(names) > 1:
            raise AdapterUnsupported(
                f"{source}: {len(names)} files in it are adapters: {', '.join(names[:12])}; give the path of one, for "
                f"instance {str(source / names[0])!r}"
            )
        if not names:
            raise AdapterUnsupported(
                f"{source}: no LoRA file of {cls.__name__}'s layout; the folder holds {listing(source)}"
            )
        return source, names[0]

    @classmethod
    def _held(cls, folder: Path, name: str) -> tuple[Held, set[str]]:
        """Return the tensors by module and part, and the dtypes in which they are stored."""
        where = str(folder / name)
        held: Held = defaultdict(dict)
        dtypes: set[str] = set()
        pickled = is_pickle(name)
        stored = read_pickle(folder, name, integers=True) if pickled else read_tensors(folder, [name], integers=True)
        for key, dtype, tensor in stored:
            place = cls.split(key)
            if place is None:
                raise AdapterUnsupported(f"{where}: tensor {key!r} is not part of {cls.__name__}'s layout")
            module, part = place
            if part in held[module]:
                raise AdapterCorrupt(f"{where}: several tensors are {part!r} of module {module!r}, one is {key!r}")
            if not tensor.numel() or not all_finite(tensor):
                raise AdapterCorrupt(f"{where}: {key!r} of shape {tuple(tensor.shape)} is empty, or has NaN or infinity")
            held[module][part] = tensor
            if dtype not in INTEGERS and part != "alpha":
                dtypes.add(dtype_name(dtype))
        if not held:
            raise AdapterCorrupt(f"{where}: the file holds no tensors")
        return held, dtypes


def lora_files(source: Path) -> list[tuple[Path, str]]:
    """Return (folder, name) of the files of weights that `source` is or holds, without PEFT's own.

    Pickles in a folder count only under the names of a layout, and only without safetensors of the same name.
    """
    if source.is_file():
        return [(source.parent, source.name)]
    try:
        held = sorted(path.name for path in source.iterdir())
    except OSError:
        return []
    names = [name for name in held if name.endswith(".safetensors")]
    others = [name for name in names if name != WEIGHTS and not name.startswith("adapter_model-")]
    pickled = [name for name in known_names("pickles") if name in held and f"{Path(name).stem}.safetensors" not in names]
    return [(source, name) for name in [*others[:MAX_FILES], *pickled]]


def formats() -> tuple[Any, ...]:
    """Return the classes of all formats, in the order of their names."""
    return _formats_on(tuple(sys.path))


@cache
def _formats_on(path: tuple[str, ...]) -> tuple[Any, ...]:
    """Return all formats; other packages' are found on the path. A folder takes a quarter of a millisecond to list."""
    return tuple(registry.get("formats", name) for name in registry.names("formats"))


def known_names(attribute: str) -> tuple[str, ...]:
    """Return the names of files that the formats declare; `attribute` is "files" or "pickles"."""
    return tuple(name for layout in formats() for name in getattr(layout, attribute, ()))


def names_in(folder: Path, name: str) -> list[str]:
    """Return the names of a file's tensors, or all texts in a pickle; nothing is loaded."""
    return texts_in_pickle(folder, name) if is_pickle(name) else tensor_names(folder, name)


def is_pickle(name: str) -> bool:
    return not name.endswith(".safetensors")


def refuse_pickle(folder: Path, name: str, allow_pickle: bool) -> None:
    """Raise AdapterUnsupported, with the ways out, for a pickle without consent."""
    if is_pickle(name) and not allow_pickle:
        with open_file(folder, name):
            # only for its checks: a git-LFS pointer of that name needs another way out
            pass
        raise AdapterUnsupported(
            f"{folder / name} is a pickle, which can run code when it is read; have it read by the safe loader: "
            "allow_pickle=True (--allow-pickle in the shell), or save its tensors as safetensors"
        )
