"""Which of the adapters that a search returned helps? The model measures it on a few examples, by probes or one gradient.

`rerank` orders candidates, and `first_order` gives the slope of the loss for every expert of a pool from one backward pass.
It needs no other package, and costs forward passes over the examples.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.reranking.ranking import LossSlopes, first_order, rerank
else:
    __getattr__ = lazy(__name__, {f"{__name__}.ranking": "LossSlopes first_order rerank"})

__all__ = ["LossSlopes", "first_order", "rerank"]
