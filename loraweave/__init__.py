"""loraweave: compose stored LoRA adapters into new skills. A name below imports its module on first use.

Type checkers read the same names in `__init__.pyi`, which `scripts/stub.py` writes.
"""

import logging

from loraweave.registry import face

_MODULES = {
    "errors": (
        "AdapterCorrupt AdapterExists AdapterNotFound AdapterQuarantined AdapterSuspicious AdapterUnsupported "
        "AlreadyActive BaseModelMismatch CompositionError DimensionMismatch EmptyIndex FormulaError HubCorrupt HubError "
        "HubFull HubLocked HubReadOnly InvalidLicense InvalidName InvalidTask LayerMismatch LoraweaveError "
        "PackageMissing RetrievalError ScopeError SearchFailed SourceUnavailable TrainingError UnknownExpert "
        "UnknownName WeightingError"
    ),
    "registry": "names",
    "types": "Anomaly BaseKey Candidate Factors Fingerprint Record Task",
    "hub.adapter": "Adapter",
    "hub.pool": "ExpertPool",
    "hub.hub": "Hub",
    "hub.base": "base_key load_base",
    "retrieval.retriever": "Retriever",
    "routers.weights": "MixtureWeights Router",
    "composer.composer": "Composer",
    "composer.compose.composition": "Composition",
    "composer.compose.compose": "compose",
    "composer.compose.refine": "byom",
    "composer.formula.formula": "Formula parse",
    "composer.merge.merge": "merge",
    "composer.ensembles.ensemble": "ensemble",
    "composer.experts.make": "experts",
    "composer.compose.program": "order",
    "routers.tokens._saved": "router",
    "composer.train.adapters": "train_adapters",
    "composer.experts.together": "train_experts",
    "hub.conversion": "extract to_lora",
}
_LAZY = {name: f"loraweave.{module}" for module, names in _MODULES.items() for name in names.split()}

__version__ = "0.1.0"
# silent unless the program that imports it asks for its log
logging.getLogger(__name__).addHandler(logging.NullHandler())
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
