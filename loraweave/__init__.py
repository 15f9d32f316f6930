"""loraweave: compose stored LoRA adapters into new skills. The names below load their room on first use."""

from __future__ import annotations

import importlib
from typing import Any

from loraweave.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    AdapterUnsupported,
    AlreadyActive,
    BaseModelMismatch,
    CompositionError,
    DimensionMismatch,
    EmptyIndex,
    HubCorrupt,
    HubError,
    HubFull,
    HubLocked,
    HubReadOnly,
    InvalidName,
    InvalidTask,
    LayerMismatch,
    LoraweaveError,
    PackageMissing,
    RetrievalError,
    ScopeError,
    SearchFailed,
    TrainingError,
    UnknownExpert,
    UnknownName,
    WeightingError,
)
from loraweave.registry import names
from loraweave.types import Candidate, Factors, Fingerprint, Record, Router, Task

_LAZY = {
    "Adapter": "loraweave.hub.adapter",
    "ExpertPool": "loraweave.hub.pool",
    "Hub": "loraweave.hub.hub",
    "load_base": "loraweave.hub.base_models",
    "Retriever": "loraweave.retrieval.retriever",
    "MixtureWeights": "loraweave.routers.mixture",
    "Composer": "loraweave.composer.composer",
    "Composition": "loraweave.composer.composition",
    "compose": "loraweave.composer.compose",
    "merge": "loraweave.composer.merge",
    "train_adapters": "loraweave.composer.train_adapters",
}

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'loraweave' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


__all__ = [
    "Adapter",
    "AdapterCorrupt",
    "AdapterExists",
    "AdapterNotFound",
    "AdapterUnsupported",
    "AlreadyActive",
    "BaseModelMismatch",
    "Candidate",
    "Composer",
    "Composition",
    "CompositionError",
    "DimensionMismatch",
    "EmptyIndex",
    "ExpertPool",
    "Factors",
    "Fingerprint",
    "Hub",
    "HubCorrupt",
    "HubError",
    "HubFull",
    "HubLocked",
    "HubReadOnly",
    "InvalidName",
    "InvalidTask",
    "LayerMismatch",
    "LoraweaveError",
    "MixtureWeights",
    "PackageMissing",
    "Record",
    "RetrievalError",
    "Retriever",
    "Router",
    "ScopeError",
    "SearchFailed",
    "Task",
    "TrainingError",
    "UnknownExpert",
    "UnknownName",
    "WeightingError",
    "compose",
    "load_base",
    "merge",
    "names",
    "train_adapters",
]
