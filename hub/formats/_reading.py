"""The choice of a folder's format, and reading it by that format.

A PEFT folder names its type; a folder without adapter_config.json is shown to every format.
"""

import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

import loraweave.registry as registry
from loraweave.common.checks import entry
from loraweave.errors import AdapterUnsupported
from loraweave.hub.formats._config import CONFIG, AdapterConfig, config_fields, extension_module, missing_extension
from loraweave.hub.formats._contents import MAX_ERROR, Bound, Contents, cut_update, require_numbers
from loraweave.hub.formats._files import BESIDE, KEPT, MAX_LISTED, open_file, present, read_kept, require_unchanged
from loraweave.hub.formats._peft_config import PICKLE, WEIGHTS
from loraweave.hub.formats._safetensors import tensor_names
from loraweave.hub.formats.peft import Peft

_PROMPT = "trained vectors in front of the text or in the cache of attention, not an update of weights"
_ROUTED = "the update depends on the input, so that no one matrix is it"

# the types of PEFT 0.21 without a form as factors of linear layers, and those whose form the file does not determine
REFUSED = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"), _PROMPT),
    **dict.fromkeys(("CPT", "CARTRIDGE", "ADAPTION_PROMPT"), _PROMPT),
    "LILY": _ROUTED,
    "XLORA": f"{_ROUTED}; router = lw.router(folder, pool=[...]) opens it, hub.save_composition(name, router) keeps it",
    "SHADOW": "a second model beside the base one",
    "LN_TUNING": "trained norms, which are not linear layers",
    "TRAINABLE_TOKENS": "trained rows of an embedding, which may be tied to the output head",
    "ADAMSS": "its subspaces come from a randomised clustering of the base's weights that the file does not hold",
    "FROD": "a joint decomposition of all layers by category, of which the file holds only one half",
    "PSOFT": (
        "a rotation between singular vectors of the base's weights that the file does not hold; their signs, which differ "
        "between machines, change the update"
    ),
}

ARROW = "; router = lw.router(folder) opens what PEFT saved of an Arrow, and hub.add(folder) keeps it"

MAX_DEPTH = 3
MAX_ENTRIES = 10_000
MAX_FILES = 64


def read(
    folder: Path,
    *,
    model: nn.Module | None = None,
    rank: int | None = None,
    max_error: float = MAX_ERROR,
    allow_pickle: bool = False,
) -> Contents:
    """Return the contents of an adapter folder of any registered format, or of the only adapter folder below it.

    `<folder>/<part>` names one of several adapters in a folder (`part_of`). `model`, `rank`, `max_error` and `allow_pickle`
    go to the format's reader (`Reader.read`); a plain LoRA is cut only by `rank`. Raises AdapterUnsupported for a type
    without a form as factors and for several adapters, AdapterCorrupt if a file changed meanwhile, AdapterSuspicious for
    factors whose product is beyond fp32, and the errors of the format's reader.
    """
    part = part_of(Path(folder))
    folder = _adapter_folder(Path(folder)) if part is None else Path(folder).parent
    with require_unchanged(folder, {PICKLE, *known_names("pickles")}):
        if part is None:
            contents = _read(folder, model, rank, max_error, allow_pickle)
        else:
            contents = part.read(folder, model=model, rank=rank, max_error=max_error)
        if folder.is_dir():
            contents = replace(contents, files=read_kept(folder))
    require_numbers(contents.layers, contents.heads, f"{folder}:")
    return contents


def is_adapter(folder: Path) -> bool:
    """Return True if a folder has the files of an adapter of any format, intact or not."""
    # pickles are not opened here: the name decides
    pickles = known_names("pickles")
    pickled = any(name in pickles for _, name in lora_files(folder))
    return Peft.recognises(folder) or pickled or any(layout.recognises(folder) for layout in _own_formats())


def part_of(path: Path) -> Any:
    """Return the reader of one of several adapters in a folder, from its path `<folder>/<part>`; None for any other path.

    The folder's format has a method `part(name)`, which returns this reader, or None for an unknown name.
    """
    if not path.name or os.path.lexists(path):
        return None
    layout = _named(config_fields(path.parent).get("peft_type"))
    return layout.part(path.name) if hasattr(layout, "part") else None


def file_patterns(*, allow_pickle: bool) -> tuple[str, ...]:
    """Return the patterns of the files that formats and `read_kept` look for beside PEFT's own."""
    pickles = (PICKLE, *known_names("pickles")) if allow_pickle else ()
    return (*known_names("files"), *KEPT, *pickles)


def _read(folder: Path, model: nn.Module | None, rank: int | None, max_error: float, allow_pickle: bool) -> Contents:
    if present(folder, BESIDE):
        raise AdapterUnsupported(
            f"{folder}: {BESIDE} has norms and embeddings that were trained beside the LoRA (LongLoRA, SinkLoRA), which is "
            "not the whole update: merge both into the base by their merge_lora_weights_and_save_hf_model.py, and take the "
            "result as the base or lw.extract(base, merged, others='heads'); without this file the LoRA is read alone"
        )
    bound = Bound(rank, max_error)
    fields = AdapterConfig.of(folder).fields if present(folder, CONFIG) else {}
    layout = _layout_of(folder, fields, allow_pickle)
    if layout is None:
        return _cut_ranks(Peft.read(folder, allow_pickle=allow_pickle), bound, folder)
    # a format that is also written is read exactly, without a conversion
    if hasattr(layout, "write"):
        return _cut_ranks(layout.read(folder), bound, folder)
    contents: Contents = layout.read(folder, model=model, rank=rank, max_error=max_error, allow_pickle=allow_pickle)
    return contents


def _adapter_folder(folder: Path) -> Path:
    """Return `folder` if it holds an adapter itself, else the one folder below it that does, else `folder`.

    Links and hidden folders are not entered. Raises AdapterUnsupported, listing them, if several folders below it hold
    adapters, since nothing says which one is meant.
    """
    if not folder.is_dir() or is_adapter(folder):
        return folder
    adapter_paths = [path for path in _folders_below(folder) if is_adapter(path)]
    if len(adapter_paths) > 1:
        names = [path.relative_to(folder).as_posix() for path in adapter_paths]
        more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
        raise AdapterUnsupported(
            f"{folder}: {len(names)} folders in it hold adapters, and none stands above the others: "
            f"{', '.join(names[:MAX_LISTED])}{more}; give the path of one, for instance {str(adapter_paths[-1])!r}, or "
            f"store all: `loraweave hub add-tree {shlex.quote(str(folder))}`{ARROW if 'arrow_router' in names else ''}"
        )
    return adapter_paths[0] if adapter_paths else folder


def _folders_below(folder: Path) -> Iterator[Path]:
    """Yield the folders below `folder` by name, each before its own subfolders, at most MAX_DEPTH deep."""
    seen = 0
    for here, folders, files in os.walk(folder):
        path = Path(here)
        if path != folder:
            yield path
        if len(path.relative_to(folder).parts) == MAX_DEPTH:
            folders.clear()
            continue
        seen += len(folders) + len(files)
        if seen > MAX_ENTRIES:
            raise AdapterUnsupported(
                f"{folder}: no adapter in it, and below it more than {MAX_ENTRIES} files; give the adapter's own folder, or "
                f"store all that are there: `loraweave hub add-tree {shlex.quote(str(folder))}`"
            )
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not (path / name).is_symlink())


def _layout_of(folder: Path, fields: Mapping[str, Any], allow_pickle: bool) -> Any:
    """Return the format of a folder whose config has these fields, or None for a plain LoRA."""
    kind = entry(fields, "peft_type", str)
    if kind == "LORA":
        variants = (layout for layout in formats() if getattr(layout, "peft_type", "") == kind)
        return next((layout for layout in variants if layout.claims(folder, fields)), None)
    if kind is not None:
        return _foreign(kind, folder)
    if fields.get("peft_type") is None:
        for layout in _own_formats():
            consent = {"allow_pickle": allow_pickle} if hasattr(layout, "knows") else {}
            if layout.recognises(folder, **consent):
                return layout
        _refuse_unknown_file(folder, allow_pickle)
    return None


def _foreign(kind: str, folder: Path) -> Any:
    """Return the format of a peft_type. Raises AdapterUnsupported, with the reason or a near name, for other types."""
    if kind in REFUSED:
        raise AdapterUnsupported(f"{folder}: peft_type is {kind!r}, which cannot be read as factors: {REFUSED[kind]}")
    if (layout := _named(kind)) is not None:
        return layout
    known = [name.upper() for name in registry.names("formats")]
    hint = registry.nearest(kind.upper(), [*known, *REFUSED, "LORA"])
    raise AdapterUnsupported(
        f"{folder}: peft_type is {kind[:40]!r}, which no format here reads{hint}; see docs/adapters.md{missing_extension()}"
    )


def _named(kind: object) -> Any:
    """Return the format of a peft_type, or None if no format here reads it."""
    name = kind.lower() if isinstance(kind, str) else ""
    layout = registry.get("formats", name) if name in registry.names("formats") else None
    return layout if getattr(layout, "peft_type", None) == kind else None


def _own_formats() -> Iterator[Any]:
    """Return an iterator of the formats that are recognised by their files, not by the type in PEFT's config."""
    return (layout for layout in formats() if layout is not Peft and not hasattr(layout, "peft_type"))


def _refuse_unknown_file(source: Path, allow_pickle: bool) -> None:
    """Raise AdapterUnsupported for weights whose tensor names no layout knows; AdapterCorrupt for a damaged file."""
    files = [] if Peft.recognises(source) else lora_files(source)
    if not files:
        return
    folder, name = files[0]
    if source.is_file() and Peft.recognises(folder):
        raise AdapterUnsupported(f"{source} is the weights alone of an adapter whose folder has its config: give {folder}")
    refuse_pickle(folder, name, allow_pickle)
    layouts = [known for known in registry.names("formats") if hasattr(registry.get("formats", known), "knows")]
    raise AdapterUnsupported(
        f"{folder / name}: its tensors have names of no known layout ({', '.join(layouts)}): "
        f"{', '.join(map(repr, names_in(folder, name)[:3]))}; without a config, nothing says which layers of which model "
        f"they update{missing_extension()}"
    )


def _cut_ranks(contents: Contents, bound: Bound, folder: Path) -> Contents:
    if bound.rank is None:
        return contents
    layers, notes = {}, {}
    for name, factors in contents.layers.items():
        layers[name], note = cut_update(factors, bound, f"{folder}: layer {name!r}")
        if factors.rank > bound.rank:
            notes[name] = note
    card = {**contents.card, "conversion": notes} if notes else contents.card
    return replace(contents, layers=layers, card=card)


def lora_files(source: Path) -> list[tuple[Path, str]]:
    """Return (folder, name) of the weight files that `source`, a file or folder, is or holds, without PEFT's own files.

    A pickle in a folder counts only if a layout declares its name, and no safetensors file has the same stem.
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
    """Return all formats, those of packages on the import path `path` included. Cached: a folder takes 0.25 ms to list."""
    return tuple(registry.get("formats", name) for name in registry.names("formats"))


def known_names(attribute: str) -> tuple[str, ...]:
    """Return the names of files that the formats declare; `attribute` is "files" or "pickles"."""
    return tuple(name for layout in formats() for name in getattr(layout, attribute, ()))


def names_in(folder: Path, name: str) -> list[str]:
    """Return the names of a file's tensors, or all texts in a pickle, without loading tensors."""
    if not is_pickle(name):
        return tensor_names(folder, name)
    return list(extension_module("pickles", f"{folder / name}").texts_in_pickle(folder, name))


def is_pickle(name: str) -> bool:
    """Return True if a file of this name counts as a pickle, as all but safetensors files do."""
    return not name.endswith(".safetensors")


def refuse_pickle(folder: Path, name: str, allow_pickle: bool) -> None:
    """Raise AdapterUnsupported, with the ways out, if the file is a pickle and `allow_pickle` is False."""
    if is_pickle(name) and not allow_pickle:
        with open_file(folder, name):
            # only for its checks: a git-LFS pointer of that name needs another way out
            pass
        raise AdapterUnsupported(
            f"{folder / name} is a pickle, which can run code when it is read; have it read by the safe loader: "
            "allow_pickle=True (--allow-pickle in the shell), or save its tensors as safetensors"
        )
