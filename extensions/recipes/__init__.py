"""Which published mixture of trained experts is it? The recipes beside the core's, with their forms, gates and losses.

`lw.experts(name, model)` makes each by its name. `fit_clusters` finds the clusters of `mocle` in prompts, and `experts_for`
counts those of texts, an expert for each: both need scikit-learn, and `mocle` an embedder. `federated_average` gives clients
of `fedms` and `local_and_shared` the mean of what they have in common, and `with_options` and `with_task` give a trained
mixture other options, or one more task. `LimitedGate` is a gate for recipes of your own.
"""

from loraweave.extend import face

_MODULES = {
    "cluster_gates": "experts_for fit_clusters",
    "limited_gate": "LimitedGate",
    "other_options": "federated_average with_options with_task",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
