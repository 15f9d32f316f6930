"""How does a model learn one task after another, and keep what it learned? Adapters trained in order, and a memory.

`train_in_order` trains tasks one after the other; `own_parts` takes their sums apart again. `remember` makes an adapter of
each document, which a hub finds for a question. They need no other package, and train as long as `train_adapters` does.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.continual.course import own_parts
    from loraweave.extensions.continual.documents import remember
    from loraweave.extensions.continual.in_order import train_in_order
else:
    _MODULES = {"course": "own_parts", "documents": "remember", "in_order": "train_in_order"}
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["own_parts", "remember", "train_in_order"]
