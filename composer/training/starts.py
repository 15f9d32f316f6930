"""Adapters that trainings begin from, compared with the model before the first step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from loraweave.composer.fitting import Fitting
from loraweave.errors import AdapterUnsupported, TrainingError, UnknownName
from loraweave.hub.adapter import Adapter

TRAINED = {"a_RI", "b_OR"}


def require_startable(model: Any, tasks: Collection[str], start: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """{task name: adapter}, all of which fit the model and are factors of linear layers alone.

    Raises TrainingError for what are no adapters, UnknownName for a name without a task, BaseModelMismatch or LayerMismatch
    for an adapter of another model, AdapterUnsupported for heads, gains, biases, magnitudes, embeddings and convolutions.
    """
    if not isinstance(start, Mapping):
        raise TrainingError(f"start is {start!r:.60}; pass {{task: the adapter that it begins as}}")
    if strange := [name for name, adapter in start.items() if not isinstance(adapter, Adapter)]:
        raise TrainingError(f"task {strange[0]!r} cannot start from {start[strange[0]]!r:.60}: pass an Adapter")
    if unknown := [name for name in start if name not in tasks]:
        raise UnknownName(f"start has an adapter for {unknown[0]!r}, which is no task; there are {', '.join(tasks)}")
    fitting = Fitting(model)
    for name, adapter in start.items():
        fitting.adapter(adapter.name, adapter)
        for layer, factors in adapter.layers.items():
            if beyond := sorted(set(factors.tensors()) - TRAINED):
                raise AdapterUnsupported(
                    f"task {name!r} cannot start from adapter {adapter.name!r}: layer {layer!r} has {' and '.join(beyond)}, "
                    "and only a_RI and b_OR are trained"
                )
            if factors.kind != "linear":
                raise AdapterUnsupported(
                    f"task {name!r} cannot start from adapter {adapter.name!r}: layer {layer!r} is of kind "
                    f"{factors.kind!r}, and only linear layers are trained"
                )
    return dict(start)
