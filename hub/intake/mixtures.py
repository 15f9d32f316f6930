"""Mixtures of adapters that peft saved (X-LoRA, Arrow, POLY): a hub stores one as a composition with its adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraweave.errors import HubError
from loraweave.hub.compositions import CompositionShelf, StoredComposition
from loraweave.hub.formats._config import CONFIG, config_fields
from loraweave.hub.intake.adding import Addition
from loraweave.hub.intake.fields import OWN_FIELDS
from loraweave.hub.intake.sources import name_of

# the folder in which peft saves the router of create_arrow_model
ARROW = "arrow_router"


def is_mixture(source: Any) -> bool:
    """Return whether `source` is the folder of a mixture; its state is not checked. A POLY of one task is an adapter."""
    if not isinstance(source, str | Path) or not Path(source).is_dir():
        return False
    folder = Path(source)
    fields = config_fields(folder)
    several = fields.get("peft_type") == "POLY" and fields.get("n_tasks", 1) != 1
    return several or fields.get("peft_type") == "XLORA" or (folder / ARROW / CONFIG).is_file()


def keep_mixture(hub: CompositionShelf, addition: Addition, *, replace: bool, model: Any) -> StoredComposition:
    """Open the mixture, for the base `model` if given, and store it under its name or the folder's.

    Raises HubError for fields that a composition does not have, and the errors of opening and of `save_composition`.
    """
    folder = Path(str(addition.source))
    if fields := [name for name in (*OWN_FIELDS, "base_model") if getattr(addition, name)]:
        raise HubError(
            f"{folder} is a mixture of adapters, kept as a composition, which has no {fields[0]}: leave it out, or add the "
            "adapters in it by their own paths"
        )
    name = name_of(folder.absolute()) if addition.name is None else addition.name
    return hub.save_composition(name, hub.open_mixture(folder, model), replace=replace)
