"""The identity of a training of experts, by which a checkpoint knows what it belongs to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loraweave.extend import ExpertModel, fingerprint, tensor_bytes


def training_identity(model: ExpertModel, learning: list[str]) -> list[Any]:
    """Return the recipe's options, the shapes of its experts and the names that learn, as JSON."""
    options = {name: repr(value) for name, value in model.recipe.options.items()}
    if model.recipe.revision > 1:
        options["revision"] = repr(model.recipe.revision)
    return [options, {name: repr(shape) for name, shape in model.shapes.items()}, learning]


def start_digest(model: ExpertModel) -> str:
    """Return the digest of the base and parameters that the training begins with, or began with before an interruption."""
    now = _digest(model)
    interrupted, began = model.interrupted
    return began if interrupted == now else now


@contextmanager
def remember_start(model: ExpertModel, began: str) -> Iterator[None]:
    """Let the same call on the same model, if an exception interrupts this one, know what the training began with."""
    try:
        yield
    except BaseException:
        model.interrupted = (_digest(model), began)
        raise


def _digest(model: ExpertModel) -> str:
    base = json.dumps(fingerprint(model.base_model).to_json(), sort_keys=True)
    return hashlib.sha256(base.encode() + tensor_bytes(model.expert_state())).hexdigest()
