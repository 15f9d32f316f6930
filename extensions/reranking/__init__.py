"""Which of the adapters that a search returned helps? The model measures it on a few examples, by probes or one gradient.

`rerank` orders candidates, and `first_order` gives the slope of the loss for every expert of a pool from one backward pass.
It needs no other package, and costs forward passes over the examples.
"""

from loraweave.extend import face

_MODULES = {"ranking": "LossSlopes first_order rerank"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
