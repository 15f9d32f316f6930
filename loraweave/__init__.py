"""loraweave: compose stored LoRA adapters into new skills. The names below load their room on first use."""

from __future__ import annotations

import importlib
from typing import Any

from loraweave.errors import (
    AdapterCorrupt,
    AdapterExists,
    AdapterNotFound,
    AdapterQuarantined,
    AdapterSuspicious,
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
    InvalidLicense,
    InvalidName,
    InvalidTask,
    LayerMismatch,
    LoraweaveError,
    PackageMissing,
    RetrievalError,
    ScopeError,
    SearchFailed,
    SourceUnavailable,
    TrainingError,
    UnknownExpert,
    UnknownName,
    WeightingError,
)
from loraweave.registry import names
from loraweave.types import Anomaly, BaseKey, Candidate, Factors, Fingerprint, Record, Router, Task

_LAZY = {
    "Adapter": "loraweave.hub.adapter",
    "ExpertPool": "loraweave.hub.pool",
    "Hub": "loraweave.hub.hub",
    "base_key": "loraweave.hub.base_key",
    "load_base": "loraweave.hub.base_models",
    "Retriever": "loraweave.retrieval.retriever",
    "MixtureWeights": "loraweave.routers.mixture",
    "Composer": "loraweave.composer.composer",
    "Composition": "loraweave.composer.composition",
    "compose": "loraweave.composer.compose",
    "merge": "loraweave.composer.merge",
    "ensemble": "loraweave.composer.ensembles.ensemble",
    "rerank": "loraweave.composer.rerank",
    "router": "loraweave.routers.routing.make",
    "collect_statistics": "loraweave.composer.collect_statistics",
    "Statistics": "loraweave.composer.statistics",
    "flexlora_clients": "loraweave.composer.federated",
    "train_adapters": "loraweave.composer.training.train_adapters",
    "train_encoder": "loraweave.retrieval.training",
    "extract": "loraweave.hub.extract",
    "to_lora": "loraweave.hub.to_lora",
    **dict.fromkeys(("byom", "compeft"), "loraweave.composer.compression"),
    **dict.fromkeys(
        ("add", "analogy", "ema", "negate", "scale", "subtract", "subtract_general", "unlearn"),
        "loraweave.composer.arithmetic",
    ),
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
    "AdapterQuarantined",
    "AdapterSuspicious",
    "AdapterUnsupported",
    "AlreadyActive",
    "Anomaly",
    "BaseKey",
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
    "InvalidLicense",
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
    "SourceUnavailable",
    "Statistics",
    "Task",
    "TrainingError",
    "UnknownExpert",
    "UnknownName",
    "WeightingError",
    "add",
    "analogy",
    "base_key",
    "byom",
    "collect_statistics",
    "compeft",
    "compose",
    "ema",
    "ensemble",
    "extract",
    "flexlora_clients",
    "load_base",
    "merge",
    "names",
    "negate",
    "rerank",
    "router",
    "scale",
    "subtract",
    "subtract_general",
    "to_lora",
    "train_adapters",
    "train_encoder",
    "unlearn",
]
