"""A recipe by its name and options."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from loraweave import registry
from loraweave.errors import WeightingError
from loraweave.routers.experts._recipe import Recipe


def recipe(name: str, options: Mapping[str, Any]) -> Recipe:
    """The recipe of that name with these options; lists are taken for tuples."""
    made_of: type[Recipe] = registry.get("experts", name)
    known = [field.name for field in fields(made_of)]
    for option in options:
        if option not in known:
            close = registry.nearest(option, known)
            raise WeightingError(f"recipe {name!r} has no option {option!r}{close}; it has {', '.join(known)}")
    given: dict[str, Any] = {
        option: tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | Mapping) else value
        for option, value in options.items()
    }
    return made_of(**given)
