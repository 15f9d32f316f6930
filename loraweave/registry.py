"""A folder is a registry: `get("methods", "ties")` imports `composer/merge/methods/ties.py` and returns its `ties`.

Other packages add a file of theirs by an entry point, `loraweave.methods` with `name = package.name` for a method; a name
of ours stays ours. Nothing has to be listed anywhere else.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any, TypeVar

from loraweave.errors import PluginFailed, UnknownName

FOLDERS: dict[str, tuple[str, ...]] = {
    "methods": ("loraweave.composer.merge.methods",),
    "kernels": ("loraweave.composer.live.kernels",),
    "objectives": ("loraweave.composer.compose.objectives",),
    "continual": ("loraweave.composer.train.ordered",),
    "strategies": ("loraweave.composer.federated.strategies",),
    "routers": ("loraweave.routers.searches", "loraweave.routers.tokens"),
    "experts": ("loraweave.routers.recipes",),
    "losses": ("loraweave.routers.losses",),
    "forms": ("loraweave.composer.experts.forms",),
    "embedders": ("loraweave.hub.embedders",),
    "keys": ("loraweave.retrieval.keys",),
    "indexes": ("loraweave.hub.indexes",),
    "formats": ("loraweave.hub.formats",),
    "targets": ("loraweave.hub.targets",),
}

_SAVED = "of the same adapters (adapters/0, adapters/1 and so on of a router saved with its pool; see docs/tried.md)"
# names that a folder had once: why they went, and what to use
WITHDRAWN = {
    ("routers", "mass"): f"it did not choose as the published MASS does; make 'arrow' or 'spectr' {_SAVED}",
    ("routers", "hilora"): f"it did not route as the published HiLoRA does; make 'similarity' or 'logistic' {_SAVED}",
}

T = TypeVar("T", bound=Callable[..., Any])

# where a folder's entry points are called otherwise than the folder
GROUPS = {"experts": "loraweave.recipes"}


def names(folder: str) -> list[str]:
    """The sorted names that `get(folder, name)` accepts; only the folder is read, none of its files is imported."""
    return sorted(modules(folder))


def modules(folder: str) -> dict[str, str]:
    """{name: module} of a registry: our files, then what other packages register. Of one name the first counts."""
    return {name: point.module for name, point in _plugins(folder, tuple(sys.path)).items()} | _files(folder)


def get(folder: str, name: str) -> Any:
    """The function `name` or the class `Name` of the file `name.py` in a registry folder, or of another package's.

    Raises UnknownName, which names near misses, and PluginFailed for another package's file that cannot be used.
    """
    if not isinstance(name, str):
        raise UnknownName(f"{name!r:.80} is not a name of {folder}; there are {', '.join(names(folder))}")
    module = _loaded(folder, name)
    if module is None:
        # a folder takes a millisecond to list, and reading an adapter asks for every format
        files = _files(folder)
        if name not in files:
            return _from_plugin(folder, name)
        module = importlib.import_module(files[name])
    return _entry(module, name)


def traits(*names: str) -> Callable[[T], T]:
    """Says beside a function or class of a registry what is true of it, for `traits_of`; a subclass inherits its bases' own.

    The conformance suite of each registry knows the words and skips what a trait rules out, so that no list elsewhere has to
    name the newcomer.
    """

    def said(thing: T) -> T:
        thing.__traits__ = traits_of(thing) | set(names)  # type: ignore[attr-defined]
        return thing

    return said


def traits_of(thing: Any) -> frozenset[str]:
    """What `traits` says of a function or class; nothing where nothing is said."""
    return frozenset(getattr(thing, "__traits__", ()))


def _entry(module: ModuleType, name: str) -> Any:
    camel = "".join(part.capitalize() for part in name.split("_"))
    for attribute in (name, camel):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    raise UnknownName(f"{module.__name__} defines neither {name!r} nor {camel!r}")


def _files(folder: str) -> dict[str, str]:
    """{name: module} of our own files."""
    found: dict[str, str] = {}
    for package in _packages(folder):
        try:
            path = importlib.import_module(package).__path__
        except ModuleNotFoundError:
            continue
        for module in pkgutil.iter_modules(path):
            if not module.ispkg and not module.name.startswith("_"):
                found.setdefault(module.name, f"{package}.{module.name}")
    return found


@cache
def _plugins(folder: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """{name: entry point} of the packages on a path; nothing of them is imported."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUPS.get(folder, f"loraweave.{folder}")):
        found.setdefault(point.name, point)
    return found


def _from_plugin(folder: str, name: str) -> Any:
    point = _plugins(folder, tuple(sys.path)).get(name)
    what = folder.removesuffix("s")
    if point is None:
        known = modules(folder)
        raise UnknownName(f"no {what} {name!r}{instead(folder, name, known)}; there are {', '.join(sorted(known))}")
    whose = f"{what} {name!r} of package {point.dist.name if point.dist else '?'!r} ({point.value})"
    if point.module.rpartition(".")[2] != name:
        # saved folders know a thing by the name of its file
        raise PluginFailed(f"{whose} is registered by another name than its file has; give both the same")
    try:
        found = point.load()
        return _entry(found, name) if isinstance(found, ModuleType) else found
    except Exception as error:
        raise PluginFailed(f"{whose} cannot be used: {type(error).__name__}: {error}") from error


def _packages(folder: str) -> tuple[str, ...]:
    if folder not in FOLDERS:
        raise UnknownName(f"no registry {folder!r}{nearest(folder, list(FOLDERS))}; there are {', '.join(FOLDERS)}")
    return FOLDERS[folder]


def _loaded(folder: str, name: str) -> ModuleType | None:
    """The module of an entry that has been imported."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    for package in _packages(folder):
        module = sys.modules.get(f"{package}.{name}")
        # another thread may be in the midst of importing it
        ready = not getattr(getattr(module, "__spec__", None), "_initializing", False)
        if module is not None and ready and not hasattr(module, "__path__"):
            return module
    return None


def instead(folder: str, name: str, known: Iterable[str]) -> str:
    """Return ": it was withdrawn, since .." for a name that a folder had once, else what `nearest` says of `known`."""
    why = WITHDRAWN.get((folder, name))
    return nearest(name, known) if why is None else f": it was withdrawn, since {why}"


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" with the one of `known` that is most like a name, for an error; "" where none is alike."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
