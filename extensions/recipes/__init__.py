"""Which published mixture of trained experts is it? The recipes, their forms and losses, beside those that the core has.

`lw.experts(name, model)` makes each by its name. `fit_clusters` finds the clusters of `mocle` in prompts, and
`federated_average` gives clients of `fedms` and `local_and_shared` the mean of what they have in common. Nothing else has
to be installed, but `mocle` needs an embedder and scikit-learn.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.recipes.clients import federated_average
    from loraweave.extensions.recipes.cluster_gates import fit_clusters
else:
    __getattr__ = lazy(__name__, {f"{__name__}.clients": "federated_average", f"{__name__}.cluster_gates": "fit_clusters"})

__all__ = ["federated_average", "fit_clusters"]
