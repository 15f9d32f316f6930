"""How does a search learn a hub's own texts? By a fine-tuned sentence encoder.

`train_encoder`, with `loraweave hub train-encoder`, fine-tunes the sentence encoder. It needs no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.retrieval_keys.training import train_encoder
else:
    __getattr__ = lazy(__name__, {f"{__name__}.training": "train_encoder"})

__all__ = ["train_encoder"]
