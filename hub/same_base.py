"""The rule for an adapter and the model that takes it: weights decide, else ids, else names and shapes with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loraweave.errors import BaseModelMismatch, BaseModelUnverified
from loraweave.types import BaseKey

NUM_SHOWN = 3


def require_same_base(who: str, its: BaseKey, own: BaseKey, *, whatever_id: bool = False) -> None:
    """Raise BaseModelMismatch if weights, shapes or commits show that `who` was made for another base than `own`.

    Commits count if the ids are the same; with `whatever_id` also if they are not.
    """
    if why := (replace(its, id=own.id) if whatever_id else its).contradicts(own):
        raise BaseModelMismatch(
            f"{who} was made for another base model ({its.id!r}) than this one ({own.id!r}): {why}; load the model that it "
            "was made for (load_base(...), --base), or leave it out"
        )


def warn_unverified(names: Sequence[str], its: BaseKey, own: BaseKey, *, stacklevel: int = 2) -> None:
    """Warn that these adapters, of one base, fit the model by their layers' names and shapes and by nothing else."""
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    theirs = f"made for {its.id!r}" if its.id else "made for a base model that they do not name"
    warnings.warn(
        f"{', '.join(map(repr, names[:NUM_SHOWN]))}{more}: {theirs}, while this model "
        f"{f'is {own.id!r}' if own.id else 'has no name'}. Only the names and shapes of the layers could be compared, and "
        "they fit; weights could not, since not both sides have sampled some. If it is the same model, hub.bind(name, "
        "model) stores its fingerprint with the adapter; else load the other one (load_base(...), --base)",
        BaseModelUnverified,
        stacklevel=stacklevel + 1,
    )


def says_nothing(model_id: str) -> bool:
    """Return whether an id identifies no model: it is empty, or a folder on this machine."""
    return not model_id or Path(model_id).is_absolute() or Path(model_id).is_dir()
