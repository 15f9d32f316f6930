"""How does a model learn one task after another, and keep what it learned? Adapters trained in order, and a memory.

`train_in_order` trains tasks one after the other; `own_parts` takes their sums apart again. `remember` makes an adapter of
each document, which a hub finds for a question. `Linearized` and `Beside` are kinds of jobs for `train_adapters`: they make
adapters that superpose (`tangent`), or that keep clear of another. They need no other package; training takes as long as
`train_adapters` does.
"""

from loraweave.extend import face

_MODULES = {"course": "own_parts train_in_order", "documents": "remember", "kinds": "Beside Linearized tangent"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
