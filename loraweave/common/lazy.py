"""Public names that load their module on first use, so that importing a package costs next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the `__getattr__` of a package that imports a name's module when the name is first asked for (PEP 562).

    `names` maps dotted modules to their public names, separated by blanks. An `__init__.py` shows type checkers the same:

        if TYPE_CHECKING:
            from my_package.answers import Answer, ask
        else:
            __getattr__ = lazy(__name__, {"my_package.answers": "Answer ask"})
    """
    places = {name: module for module, held in names.items() for name in held.split()}

    def load(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        # with a name to take from it, a module that is a package loads a submodule of that name too
        return getattr(__import__(places[name], fromlist=[name]), name)

    return load
