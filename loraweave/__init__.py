"""loraweave: compose stored LoRA adapters into new skills. A name below imports its module on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

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
    FormulaError,
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

if TYPE_CHECKING:
    from loraweave.composer.compose.compose import compose
    from loraweave.composer.compose.composition import Composition
    from loraweave.composer.compose.program import order
    from loraweave.composer.composer import Composer
    from loraweave.composer.ensembles.ensemble import ensemble
    from loraweave.composer.experts.make import experts
    from loraweave.composer.experts.together import train_experts
    from loraweave.composer.formula.formula import Formula, parse
    from loraweave.composer.merge.arithmetic import byom, clusters, compeft, twin_merging
    from loraweave.composer.merge.merge import merge
    from loraweave.composer.train.adapters import train_adapters
    from loraweave.hub.adapter import Adapter
    from loraweave.hub.base import base_key, load_base
    from loraweave.hub.conversion import extract, to_lora
    from loraweave.hub.hub import Hub
    from loraweave.hub.pool import ExpertPool
    from loraweave.retrieval.retriever import Retriever
    from loraweave.routers.tokens._saved import router
    from loraweave.routers.weights import MixtureWeights

# the same names by module: a process imports what it uses, a type checker reads the imports above
_MODULES = {
    "hub.adapter": "Adapter",
    "hub.pool": "ExpertPool",
    "hub.hub": "Hub",
    "hub.base": "base_key load_base",
    "retrieval.retriever": "Retriever",
    "routers.weights": "MixtureWeights",
    "composer.composer": "Composer",
    "composer.compose.composition": "Composition",
    "composer.compose.compose": "compose",
    "composer.formula.formula": "Formula parse",
    "composer.merge.arithmetic": "byom clusters compeft twin_merging",
    "composer.merge.merge": "merge",
    "composer.ensembles.ensemble": "ensemble",
    "composer.experts.make": "experts",
    "composer.compose.program": "order",
    "routers.tokens._saved": "router",
    "composer.train.adapters": "train_adapters",
    "composer.experts.together": "train_experts",
    "hub.conversion": "extract to_lora",
}
_LAZY = {name: f"loraweave.{module}" for module, held in _MODULES.items() for name in held.split()}

__version__ = "0.1.0"

if not TYPE_CHECKING:
    # a type checker that saw it would know every name, misspelt ones too
    def __getattr__(name):
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
    "Formula",
    "FormulaError",
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
    "Task",
    "TrainingError",
    "UnknownExpert",
    "UnknownName",
    "WeightingError",
    "base_key",
    "byom",
    "clusters",
    "compeft",
    "compose",
    "ensemble",
    "experts",
    "extract",
    "load_base",
    "merge",
    "names",
    "order",
    "parse",
    "router",
    "to_lora",
    "train_adapters",
    "train_experts",
    "twin_merging",
]
