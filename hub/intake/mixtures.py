"""Mixtures of adapters that other libraries saved: a hub stores one as a composition with its adapters.

Extensions know their layouts: a file `router_files.py` has FILES, the patterns of what is downloaded; `is_router(folder)`;
`is_mixture(folder)`, false for what is an adapter, too; and `read(folder, pool, model)`, which returns the router.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraweave.errors import HubError
from loraweave.hub.sources.sources import name_of
from loraweave.hub.tables.fields import OWN_FIELDS
from loraweave.registry import brought

if TYPE_CHECKING:
    from loraweave.hub.compositions import CompositionShelf, StoredComposition
    from loraweave.hub.intake.adding import Addition


def layouts() -> list[Any]:
    """Return the modules that know layouts of routers."""
    return [import_module(module) for module in brought("router_files").values()]


def layout_of(folder: Path) -> Any | None:
    """Return the module that knows the router in a folder, or None."""
    return next((layout for layout in layouts() if layout.is_router(folder)), None)


def keep_mixture(hub: CompositionShelf, addition: Addition, *, replace: bool, model: Any) -> StoredComposition | None:
    """Open the mixture, for the base `model` if given, and store it under its name or the folder's; None for an adapter.

    Raises HubError for fields that a composition does not have, and the errors of opening and of `save_composition`.
    """
    if not isinstance(addition.source, str | Path) or not (folder := Path(addition.source)).is_dir():
        return None
    if (layout := layout_of(folder)) is None or not layout.is_mixture(folder):
        return None
    if fields := [name for name in (*OWN_FIELDS, "base_model") if getattr(addition, name)]:
        raise HubError(
            f"{folder} is a mixture of adapters, kept as a composition, which has no {fields[0]}: leave it out, or add the "
            "adapters in it by their own paths"
        )
    name = name_of(folder.absolute()) if addition.name is None else addition.name
    return hub.save_composition(name, layout.read(folder, None, model), replace=replace)
