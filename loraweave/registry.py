"""A folder is a registry: `get("methods", "ties")` imports `composer/methods/ties.py` and returns its `ties` or `Ties`."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Iterable
from typing import Any

from loraweave.errors import UnknownName

FOLDERS = {
    "methods": "loraweave.composer.methods",
    "kernels": "loraweave.composer.kernels",
    "objectives": "loraweave.composer.objectives",
    "continual": "loraweave.composer.continual",
    "routers": "loraweave.routers",
    "experts": "loraweave.routers.experts",
    "losses": "loraweave.routers.losses",
    "forms": "loraweave.composer.experts.forms",
    "embedders": "loraweave.retrieval.embedders",
    "keys": "loraweave.retrieval.keys",
    "indexes": "loraweave.retrieval.indexes",
    "formats": "loraweave.hub.formats",
}

# modules of a registry folder that support the others and are no entries themselves
SUPPORT = {"routers": {"by_row", "mixture", "objective"}}


def names(folder: str) -> list[str]:
    """The sorted names that `get(folder, name)` accepts; only the folder is read, none of its files is imported."""
    if folder not in FOLDERS:
        raise UnknownName(f"no registry {folder!r}{nearest(folder, list(FOLDERS))}; there are {', '.join(FOLDERS)}")
    try:
        package = importlib.import_module(FOLDERS[folder])
    except ModuleNotFoundError:
        return []
    modules = pkgutil.iter_modules(package.__path__)
    hidden = SUPPORT.get(folder, set())
    return sorted(m.name for m in modules if not m.ispkg and not m.name.startswith("_") and m.name not in hidden)


def get(folder: str, name: str) -> Any:
    """The function `name` or the class `Name` of the file `name.py` in a registry folder."""
    # a folder takes a millisecond to list, and reading an adapter asks for every format
    if not _is_loaded(folder, name) and name not in (known := names(folder)):
        raise UnknownName(f"no {folder.removesuffix('s')} {name!r}{nearest(name, known)}; there are {', '.join(known)}")
    module = importlib.import_module(f"{FOLDERS[folder]}.{name}")
    camel = "".join(part.capitalize() for part in name.split("_"))
    for attribute in (name, camel):
        if hasattr(module, attribute):
            return getattr(module, attribute)
    raise UnknownName(f"{module.__name__} defines neither {name!r} nor {camel!r}")


def _is_loaded(folder: str, name: str) -> bool:
    """Whether the file of an entry has been imported; False for what is no entry."""
    if folder not in FOLDERS or not name.isidentifier() or name.startswith("_") or name in SUPPORT.get(folder, set()):
        return False
    module = sys.modules.get(f"{FOLDERS[folder]}.{name}")
    return module is not None and not hasattr(module, "__path__")


def nearest(name: str, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" with the one of `known` that is most like a name, for an error; "" where none is alike."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""
