"""A folder is a registry: `get("methods", "ties")` imports `composer/merge/methods/ties.py` and returns its `ties`.

An extension adds its own files in a folder of the registry's name, `extensions/x/methods/` for a method; another package
adds a file by an entry point, `loraweave.methods` with `name = package.name`. The core's names take precedence. Nothing has
to be listed anywhere else.
"""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from loraweave.errors import PluginFailed, UnknownName

FOLDERS: dict[str, tuple[str, ...]] = {
    "methods": ("loraweave.composer.merge.methods",),
    "kernels": ("loraweave.composer.live.kernels",),
    # filled by extensions alone
    "bases": (),
    "hooks": (),
    "pipelines": (),
    "checks": (),
    "writers": (),
    "sources": (),
    "packings": (),
    "examiners": (),
    "objectives": ("loraweave.composer.compose.objectives",),
    "routers": ("loraweave.routers.searches", "loraweave.routers.tokens"),
    "experts": ("loraweave.routers.recipes",),
    "losses": ("loraweave.routers.losses",),
    "forms": ("loraweave.composer.experts.forms",),
    "embedders": ("loraweave.hub.embedders",),
    "keys": ("loraweave.retrieval.keys",),
    "indexes": ("loraweave.hub.indexes",),
    "formats": ("loraweave.hub.formats",),
    # filled by extensions alone, too: `save_pretrained` writes PEFT's own format
    "targets": (),
    # likewise, and named after the scheme of a hub's URL (`open_stores`): the core keeps hubs in folders
    "catalogues": (),
    "blobs": (),
    # likewise, and named after the first word of joblib's backend (`spread`): the core's workers are local processes
    "workers": (),
}

_SAVED = "of the same adapters (adapters/0, adapters/1 and so on of a router saved with its pool; see docs/tried.md)"
# {(registry, former name): why it was withdrawn, and what to use instead}
WITHDRAWN = {
    ("routers", "mass"): f"it did not choose as the published MASS does; make 'arrow' or 'spectr' {_SAVED}",
    ("routers", "hilora"): f"it did not route as the published HiLoRA does; make 'similarity' or 'logistic' {_SAVED}",
}

# {registry: {trait, a word that `traits` takes: meaning}} for conformance suites; docs/registries.md lists them
TRAITS: dict[str, dict[str, str]] = {
    "methods": {
        "lossy": "an adapter comes back only in part, by the formula, however the weights are set",
        "shares": "only the proportions of the weights count, and their signs mean nothing",
        "pairs": "it takes two experts and no other number",
        "by_factors": "a and b are mixed apart, so that the split of an update into factors counts",
        "one_a": "all experts have one a",
    },
    "routers": {
        "ends_early": "a search that may come to an end of its own within the budget",
        "orderless": "a search without draws, which gives each expert its weight wherever it stands",
    },
    "experts": {"images": "it is for models of images"},
    "keys": {"relative": "a score depends on the other adapters that are compared"},
    "targets": {
        "images": "it is for adapters of pipelines of images",
        "unread": "this package does not read what it writes",
    },
}

# {registry: {parameter: meaning}} of parameters that are not a user's options: the code that calls an entry sets them
RESERVED: dict[str, dict[str, str]] = {
    "methods": {
        "seeds": "a seed for each expert, of the merge's `seed`, the expert's content and the layer",
        "statistics": "each expert's statistics in the layer; a merge without any is refused",
        "survey": "what the survey that `@surveys` declares returned of all layers; its `where` says whether it is needed",
        "rank": "the rank that the merge was asked for, or None; what else is returned is cut to it",
    },
    "routers": {
        "scores": "of a search: {expert: score} by retrieval; without a hub the search is refused",
        "layers": "of a search: the layers that the pool updates",
        "weights": "of a search: the weights given to `compose`, for `manual` alone",
        "texts": "of a search: {expert: sample inputs} of the adapters' cards",
        "asked": "of a search: the task's inputs",
    },
}

T = TypeVar("T", bound=Callable[..., Any])

# the module of each entry that `get` has returned
_got: dict[tuple[tuple[str, ...], str, str], str] = {}

# {registry: its name in the folders of extensions and in entry points} where the two names differ
CALLED = {"experts": "recipes"}

# the package whose folders are the extensions; no file of the core names an extension
EXTENSIONS = "loraweave.extensions"


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a package's `__getattr__`, which imports on first use; `names` maps modules to names, separated by blanks."""
    places = {name: module for module, held in names.items() for name in held.split()}

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # with a name to take from it, a module that is a package loads a submodule of that name too
        return getattr(__import__(places[name], fromlist=[name]), name)

    return load


def face(
    package: str, names: Mapping[str, str], below: str | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return a package's `__getattr__`, `__dir__` and `__all__`; `names` is as for `lazy`, of modules below `below`.

    `below` is by default the package itself. Type checkers need a stub, `__init__.pyi`, that imports the same names:

        _MODULES = {"answers": "Answer ask"}
        __getattr__, __dir__, __all__ = face(__name__, _MODULES)
    """
    listed = sorted(name for held in names.values() for name in held.split())
    return lazy(package, {f"{below or package}.{module}": held for module, held in names.items()}), lambda: listed, listed


def extensions() -> dict[str, Path]:
    """Return {name: folder} of the installed extensions, sorted by name, without importing any."""
    return _extensions(tuple(sys.path))


def registries() -> list[str]:
    """Return the name of every registry: the core's, then those that extensions bring, sorted.

    Each package inside an extension is the folder of a registry.
    """
    folders = {module.name for path in extensions().values() for module in pkgutil.iter_modules([str(path)]) if module.ispkg}
    return [*FOLDERS, *sorted(folders - {CALLED.get(name, name) for name in FOLDERS})]


def brought(part: str) -> dict[str, str]:
    """Return {name: module} of the modules that bring a part: extensions' files `part.py`, entry points `loraweave.part`.

    An extension takes precedence over an entry point of the same name. No module is imported.
    """
    files = {name: f"{EXTENSIONS}.{name}.{part}" for name, path in extensions().items() if (path / f"{part}.py").is_file()}
    return {name: point.module for name, point in _plugins(part, tuple(sys.path)).items()} | files


def bringing(part: str) -> Iterator[Any]:
    """Iterate over the modules of `brought(part)`, in its order; each module is imported when the iteration reaches it."""
    return map(importlib.import_module, brought(part).values())


def names(folder: str) -> list[str]:
    """Return the sorted names that `get(folder, name)` accepts. The folder is listed, and none of its files is imported."""
    return sorted(modules(folder))


def modules(folder: str) -> dict[str, str]:
    """Return {name: module} of a registry; of equal names the core's file wins, then an extension's, then a package's."""
    return {name: point.module for name, point in _plugins(folder, tuple(sys.path)).items()} | _files(folder)


def get(folder: str, name: str) -> Any:
    """Return the function `name` or the class `Name` from the file `name.py` of a registry folder, or from another package.

    Raises UnknownName, with the nearest names, and PluginFailed for another package's file that cannot be used.
    """
    if not isinstance(name, str):
        raise UnknownName(f"{name!r:.80} is not a name of {folder}; there are {', '.join(names(folder))}")
    packages = FOLDERS.get(folder, ())
    module = _got.get((packages, folder, name))
    if module not in sys.modules:
        # found without listing the folder, which takes a millisecond: reading an adapter asks for every format
        module = _file_of(packages, name) or _files(folder).get(name)
        if module is None:
            return _from_plugin(folder, name)
        _got[packages, folder, name] = module
    return _entry(importlib.import_module(module), name)


def traits(*names: str) -> Callable[[T], T]:
    """Return a decorator that declares traits, words of `TRAITS`, of a registry's entry; subclasses inherit them.

    The conformance suite skips tests that a trait rules out, so that no list has to name a new entry. Raises UnknownName for
    a word that is not in `TRAITS`.
    """
    known: set[str] = set().union(*TRAITS.values())
    for name in names:
        if name not in known:
            raise UnknownName(f"no trait {name!r}{nearest(name, known)}; there are {', '.join(sorted(known))}")

    def said(thing: T) -> T:
        thing.__traits__ = getattr(thing, "__traits__", frozenset()) | set(names)  # type: ignore[attr-defined]
        return thing

    return said


def traits_of(thing: Any) -> frozenset[str]:
    """Return the traits that `traits` declared of a function or class; an empty set if none."""
    return frozenset(getattr(thing, "__traits__", ()))


def _entry(module: ModuleType, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    camel = "".join(map(str.capitalize, name.split("_")))
    if hasattr(module, camel):
        return getattr(module, camel)
    raise UnknownName(f"{module.__name__} defines neither {name!r} nor {camel!r}")


def _file_of(packages: Iterable[str], name: str) -> str | None:
    """Return the module of the file `name.py` in the core's `packages`, found without a listing; None if there is none."""
    for package in packages if name.isidentifier() and not name.startswith("_") else ():
        try:
            spec = find_spec(f"{package}.{name}")
        except ModuleNotFoundError:
            continue
        if spec is not None and spec.submodule_search_locations is None:
            return f"{package}.{name}"
    return None


def _files(folder: str) -> dict[str, str]:
    """Return {name: module} of a registry's files in the core and in extensions; the core's take precedence."""
    files: dict[str, str] = {}
    for package, paths in _places(folder, FOLDERS.get(folder, ()), tuple(sys.path)).items():
        for module in pkgutil.iter_modules(paths):
            if not module.ispkg and not module.name.startswith("_"):
                files.setdefault(module.name, f"{package}.{module.name}")
    return files


@cache
def _extensions(path: tuple[str, ...]) -> dict[str, Path]:
    """Return {name: folder} of the installed extensions, sorted by name; `path` is sys.path, the key of the cache."""
    spec = find_spec(EXTENSIONS)
    places = [] if spec is None or spec.submodule_search_locations is None else spec.submodule_search_locations
    packages = [(module.name, place) for place in places for module in pkgutil.iter_modules([place]) if module.ispkg]
    return {name: Path(place, name) for name, place in sorted(packages)}


@cache
def _places(folder: str, packages: tuple[str, ...], path: tuple[str, ...]) -> dict[str, list[str]]:
    """Return {package: its folders} of a registry: the core's `packages`, then those of extensions, which are not imported.

    `path` is sys.path, a key of the cache. Raises UnknownName for an unknown registry.
    """
    places: dict[str, list[str]] = {}
    for package in packages:
        with suppress(ModuleNotFoundError):
            places[package] = list(importlib.import_module(package).__path__)
    inner = CALLED.get(folder, str(folder))
    for name, place in _extensions(path).items():
        if (place / inner / "__init__.py").is_file():
            places[f"{EXTENSIONS}.{name}.{inner}"] = [str(place / inner)]
    if not places and folder not in FOLDERS:
        known = registries()
        raise UnknownName(f"no registry {folder!r}{nearest(folder, known)}; there are {', '.join(known)}")
    return places


@cache
def _plugins(folder: str, path: tuple[str, ...]) -> dict[str, EntryPoint]:
    """Return {name: entry point} that packages register for a registry, none loaded; `path` is sys.path, the cache's key."""
    points: dict[str, EntryPoint] = {}
    for point in entry_points(group=f"loraweave.{CALLED.get(folder, folder)}"):
        points.setdefault(point.name, point)
    return points


def _from_plugin(folder: str, name: str) -> Any:
    point = _plugins(folder, tuple(sys.path)).get(name)
    what = folder.removesuffix("s")
    if point is None:
        known = modules(folder)
        raise UnknownName(f"no {what} {name!r}{nearest(name, known, folder)}; there are {', '.join(sorted(known))}")
    whose = f"{what} {name!r} of package {point.dist.name if point.dist else '?'!r} ({point.value})"
    if point.module.rpartition(".")[2] != name:
        # saved folders refer to an entry by the name of its file
        raise PluginFailed(f"{whose} is registered by another name than its file has; give both the same")
    try:
        loaded = point.load()
        return _entry(loaded, name) if isinstance(loaded, ModuleType) else loaded
    except Exception as error:
        raise PluginFailed(f"{whose} cannot be used: {type(error).__name__}: {error}") from error


def nearest(name: str, known: Iterable[str], folder: str = "") -> str:
    """Return ", did you mean 'x'?" with the name in `known` nearest to `name`, for an error's message; "" if none is near.

    For a name withdrawn from the registry `folder`, return ": it was withdrawn, since ..".
    """
    if (why := WITHDRAWN.get((folder, name))) is not None:
        return f": it was withdrawn, since {why}"
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
