"""How does a mixture of experts learn? By `fit` of an expert model, with transformers' Trainer, on any kind of data.

It adds `fit` and `train_experts`, on rows of texts or of any inputs of a base, with a loss of your own, too, and experts
that begin as stored adapters (`pool=`) or as the means of groups of similar ones, which `clusters` finds. It needs
accelerate, which Trainer asks for.
"""

from loraweave.extend import face

_MODULES = {
    "feeds": "feed_of",
    "grouping": "clusters",
    "identity": "loss_identity",
    "steps": "ExpertSettings",
    "trainer": "fit",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
