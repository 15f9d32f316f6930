"""loraweave: compose stored LoRA adapters into new skills. The names below load their room on first use."""

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
    from loraweave.composer.compose.collect_statistics import collect_statistics
    from loraweave.composer.compose.compose import compose
    from loraweave.composer.compose.composition import Composition
    from loraweave.composer.compose.rerank import rerank
    from loraweave.composer.composer import Composer
    from loraweave.composer.ensembles.ensemble import ensemble
    from loraweave.composer.experts.make import experts
    from loraweave.composer.experts.together import train_experts
    from loraweave.composer.merge.arithmetic import (
        add,
        analogy,
        byom,
        clusters,
        compeft,
        ema,
        flexlora_clients,
        genknowsub,
        negate,
        scale,
        subtract,
        subtract_general,
        unlearn,
    )
    from loraweave.composer.merge.merge import merge
    from loraweave.composer.merge.statistics import Statistics
    from loraweave.composer.train.adapters import train_adapters
    from loraweave.hub.adapter import Adapter
    from loraweave.hub.base import base_key, load_base
    from loraweave.hub.conversion import extract, to_lora
    from loraweave.hub.hub import Hub
    from loraweave.hub.pool import ExpertPool
    from loraweave.retrieval.retriever import Retriever
    from loraweave.retrieval.training import train_encoder
    from loraweave.routers.tokens._saved import router
    from loraweave.routers.weights import MixtureWeights

# the same names with their module: a process imports what it uses, a type checker reads the imports above
_LAZY = {
    "Adapter": "loraweave.hub.adapter",
    "ExpertPool": "loraweave.hub.pool",
    "Hub": "loraweave.hub.hub",
    "base_key": "loraweave.hub.base",
    "load_base": "loraweave.hub.base",
    "Retriever": "loraweave.retrieval.retriever",
    "MixtureWeights": "loraweave.routers.weights",
    "Composer": "loraweave.composer.composer",
    "Composition": "loraweave.composer.compose.composition",
    "compose": "loraweave.composer.compose.compose",
    "clusters": "loraweave.composer.merge.arithmetic",
    "genknowsub": "loraweave.composer.merge.arithmetic",
    "merge": "loraweave.composer.merge.merge",
    "ensemble": "loraweave.composer.ensembles.ensemble",
    "experts": "loraweave.composer.experts.make",
    "rerank": "loraweave.composer.compose.rerank",
    "router": "loraweave.routers.tokens._saved",
    "collect_statistics": "loraweave.composer.compose.collect_statistics",
    "Statistics": "loraweave.composer.merge.statistics",
    "flexlora_clients": "loraweave.composer.merge.arithmetic",
    "train_adapters": "loraweave.composer.train.adapters",
    "train_experts": "loraweave.composer.experts.together",
    "train_encoder": "loraweave.retrieval.training",
    "extract": "loraweave.hub.conversion",
    "to_lora": "loraweave.hub.conversion",
    **dict.fromkeys(("byom", "compeft"), "loraweave.composer.merge.arithmetic"),
    **dict.fromkeys(
        ("add", "analogy", "ema", "negate", "scale", "subtract", "subtract_general", "unlearn"),
        "loraweave.composer.merge.arithmetic",
    ),
}

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
    "clusters",
    "collect_statistics",
    "compeft",
    "compose",
    "ema",
    "ensemble",
    "experts",
    "extract",
    "flexlora_clients",
    "genknowsub",
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
    "train_experts",
    "unlearn",
]
