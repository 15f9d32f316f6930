"""A folder is a registry: `get("methods", "ties")` imports `composer/merge/methods/ties.py` and returns its `ties`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from types import ModuleType
from typing import Any

from loraweave.errors import UnknownName

FOLDERS: dict[str, str | tuple[str, ...]] = {
    "methods": "loraweave.composer.merge.methods",
    "kernels": "loraweave.composer.live.kernels",
    "objectives": "loraweave.composer.compose.objectives",
    "continual": "loraweave.composer.train.ordered",
    "routers": ("loraweave.routers.searches", "loraweave.routers.tokens"),
    "experts": "loraweave.routers.recipes",
    "losses": "loraweave.routers.losses",
    "forms": "loraweave.composer.experts.forms",
    "embedders": "loraweave.hub.embedders",
    "keys": "loraweave.retrieval.keys",
    "indexes": "loraweave.hub.indexes",
    "formats": "loraweave.hub.formats",
}


def names(folder: str) -> list[str]:
    """The sorted names that `get(folder, name)` accepts; only the folder is read, none of its files is imported."""
    return sorted(modules(folder))


def modules(folder: str) -> dict[str, str]:
    """{name: module} of a registry. Of two files of one name, the one of the package that is listed first."""
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


def get(folder: str, name: str) -> Any:
    """The function `name` or the class `Name` of the file `name.py` in a registry folder."""
    module = _loaded(folder, name)
    if module is None:
        # a folder takes a millisecond to list, and reading an adapter asks for every format
        known = modules(folder)
        if name not in known:
            raise UnknownName(
                f"no {folder.removesuffix('s')} {name!r}{nearest(name, known)}; there are {', '.join(sorted(known))}"
            )
        module = importlib.import_module(known[name])
    camel = "".join(part.capitalize() for part in name.split("_"))
    for attribute in (name, camel):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    raise UnknownName(f"{module.__name__} defines neither {name!r} nor {camel!r}")


def _packages(folder: str) -> tuple[str, ...]:
    if folder not in FOLDERS:
        raise UnknownName(f"no registry {folder!r}{nearest(folder, list(FOLDERS))}; there are {', '.join(FOLDERS)}")
    packages = FOLDERS[folder]
    return (packages,) if isinstance(packages, str) else packages


def _loaded(folder: str, name: str) -> ModuleType | None:
    """The module of an entry that has been imported."""
    if not name.isidentifier() or name.startswith("_"):
        return None
    for package in _packages(folder):
        module = sys.modules.get(f"{package}.{name}")
        if module is not None and not hasattr(module, "__path__"):
            return module
    return None


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" with the one of `known` that is most like a name, for an error; "" where none is alike."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
