"""How does a search learn a hub's own texts? By a fine-tuned sentence encoder.

`train_encoder`, with `loraweave hub train-encoder`, fine-tunes the sentence encoder. It needs no other package.
"""

from loraweave.extend import face

_MODULES = {"training": "train_encoder"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
