"""What a training of experts begins with, by which its checkpoint is known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from loraweave.composer.experts.saving import expert_bytes
from loraweave.hub.fingerprint import fingerprint

if TYPE_CHECKING:
    from loraweave.composer.experts.expert_model import ExpertModel


def determining(model: ExpertModel, learning: list[str]) -> list[Any]:
    """What is trained, as JSON."""
    options = {name: repr(value) for name, value in model.recipe.options.items()}
    if model.recipe.revision > 1:
        options["revision"] = repr(model.recipe.revision)
    return [options, {name: repr(shape) for name, shape in model.shapes.items()}, learning]


def began(model: ExpertModel) -> str:
    """What says on which base, and with which parameters, the training begins, or began before it was interrupted."""
    now = _digest(model)
    interrupted, began = model.interrupted
    return began if interrupted == now else now


@contextmanager
def remembered(model: ExpertModel, began: str) -> Iterator[None]:
    """Lets the same call on the same model, which an exception interrupts, know what it began with."""
    try:
        yield
    except BaseException:
        model.interrupted = (_digest(model), began)
        raise


def _digest(model: ExpertModel) -> str:
    base = json.dumps(fingerprint(model.base_model).to_json(), sort_keys=True)
    return hashlib.sha256(base.encode() + expert_bytes(model)).hexdigest()
