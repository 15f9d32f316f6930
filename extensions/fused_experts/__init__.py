"""How do adapters of fused experts act live, row by row? The experts run one after the other, with their updates.

Nothing has to be called: a Composer lets a module that has the weights of all experts in one parameter run one by one while
a mixture updates some of them. `watched` shows every product of an expert. It costs the model's own kernel for experts.
PEFT's folders with `target_parameters` are read and written.
"""

from loraweave.extend import face

_MODULES = {"running": "watched"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
