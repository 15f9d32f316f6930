"""Mixtures in the running model (`hooks`, `kernels`, `writers`): what replaces, records or writes the layers."""

from loraweave.registry import face

_MODULES = {
    "common.compute": "library",
    "common.process": "lock_of",
    "composer.fused.fused": "Fused",
    "composer.fused.overwritten": "LayerLoss WeightWriter",
    "composer.live.fitting": "Fitting",
    "composer.live.hook": "Activate LiveHook LiveModel MixedLayer Resolve Traced",
    "composer.live.kernels._parts": (
        "AddsInPlace Cost Kernel Lend Part RowKernel RowSets TokenWorkload Workload costs group_by_mixture only_kernel "
        "own_precision place_of row_kernels weigh_b"
    ),
    "composer.live.kernels.dense": "sort_by_expert",
    "composer.live.pages": "PlacedFactors find_places",
    "composer.live.recording": "Trace UsedLayer UsedWeights",
    "composer.live.residents": "Lease",
    "composer.live.standing_in": "Handle StandIn claimed give_back",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
