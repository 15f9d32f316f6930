"""What does a mixture lose in quantised weights, and an adapter of quantised weights in full ones? A number for each layer.

`Composer.fused(.., max_loss=..)` then writes into layers of bitsandbytes and torchao, and keeps the update of others live;
`logits_loss` says what that does to the answers. It costs a few matrices of a layer's size in fp32 while it writes.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.quantised.losses import LogitsLoss, differences, logits_loss
else:
    __getattr__ = lazy(__name__, {f"{__name__}.losses": "LogitsLoss differences logits_loss"})

__all__ = ["LogitsLoss", "differences", "logits_loss"]
