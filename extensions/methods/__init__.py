"""What else can become of several adapters? More merge methods, arithmetic of adapters, and merges by mergekit's files.

It adds the methods that papers of the last years propose and those on the factors themselves, functions such as `negate`,
`unlearn`, `twin_merging` and `compeft`, and `loraweave merge FILE.yaml` for files of mergekit's. It needs no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.methods.arithmetic import (
        add,
        analogy,
        compeft,
        ema,
        genknowsub,
        negate,
        scale,
        subtract,
        subtract_general,
        twin_merging,
        unlearn,
    )
else:
    _NAMES = "add analogy compeft ema genknowsub negate scale subtract subtract_general twin_merging unlearn"
    __getattr__ = lazy(__name__, {f"{__name__}.arithmetic": _NAMES})

__all__ = [
    "add",
    "analogy",
    "compeft",
    "ema",
    "genknowsub",
    "negate",
    "scale",
    "subtract",
    "subtract_general",
    "twin_merging",
    "unlearn",
]
