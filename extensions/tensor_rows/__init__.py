"""How do experts train on images, on any model but a language model, or by a loss of your own? On rows of its inputs.

`fit` of an expert model then takes tensors by the names of the model's inputs, with the model's own loss or `loss=`, which a
checkpoint knows again by `loss_identity`. It needs no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.tensor_rows.feeds import TensorFeed, feed_of
    from loraweave.extensions.tensor_rows.losses import loss_identity
else:
    __getattr__ = lazy(__name__, {f"{__name__}.feeds": "TensorFeed feed_of", f"{__name__}.losses": "loss_identity"})

__all__ = ["TensorFeed", "feed_of", "loss_identity"]
