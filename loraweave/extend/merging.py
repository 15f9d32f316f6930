"""Merge methods (`methods`): updates as terms, pruning, elections of signs, weights and reports of merges."""

from loraweave.registry import face

_MODULES = {
    "composer.merge.method_call": (
        "DenseUpdate Experts MethodCall Term TruncatedUpdate Weights surveys terms terms_of_one_rank weighted_bias"
    ),
    "composer.merge.methods._entries": "Entries Prune Rule decide divisor merge_elected merged sum_pruned",
    "composer.merge.methods._pruning": (
        "LEVELS Cut draws_for keep_largest largest prune_random prune_smallest quantise stream"
    ),
    "composer.merge.methods._span": "combination empty_update gram mean_weights shares",
    "hub.adapter": "cosine",
    "hub.merge_report": "MergeReport by_number interference",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
