"""How can a search compare adapters otherwise, and learn a hub's own texts? By more keys, and a fine-tuned encoder.

It adds keys that compare an adapter's sample inputs in other ways, its scores on known tasks, or its weights, and
`train_encoder` with `loraweave hub train-encoder`, which fine-tunes the sentence encoder. It needs no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.retrieval_keys.training import train_encoder
else:
    __getattr__ = lazy(__name__, {f"{__name__}.training": "train_encoder"})

__all__ = ["train_encoder"]
