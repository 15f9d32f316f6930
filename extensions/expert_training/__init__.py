"""How does a mixture of experts learn? By `fit` of an expert model, with transformers' Trainer, on any kind of data.

It adds `fit` and `train_experts`, on rows of texts or of any inputs of a base, with a loss of your own, too, and experts
that begin as stored adapters (`pool=`) or as the means of groups of similar ones, which `clusters` finds. It needs
accelerate, which Trainer asks for.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.expert_training.feeds import feed_of
    from loraweave.extensions.expert_training.grouping import clusters
    from loraweave.extensions.expert_training.identity import loss_identity
    from loraweave.extensions.expert_training.steps import ExpertSettings
    from loraweave.extensions.expert_training.trainer import fit
else:
    _MODULES = {
        "feeds": "feed_of",
        "grouping": "clusters",
        "identity": "loss_identity",
        "steps": "ExpertSettings",
        "trainer": "fit",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["ExpertSettings", "clusters", "feed_of", "fit", "loss_identity"]
