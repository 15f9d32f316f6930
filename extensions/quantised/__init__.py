"""What does a mixture lose in quantised weights, and an adapter of quantised weights in full ones? A number for each layer.

`Composer.fused(.., max_loss=..)` then writes into layers of bitsandbytes and torchao, and keeps the update of others live;
`logits_loss` says what that does to the answers. It costs a few matrices of a layer's size in fp32 while it writes.
"""

from loraweave.extend import face

_MODULES = {"losses": "LogitsLoss differences logits_loss"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
