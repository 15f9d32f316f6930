"""What else can become of several adapters? More merge methods, arithmetic of adapters, and merges by mergekit's files.

It adds the methods that papers of the last years propose and those on the factors themselves, functions such as `negate`,
`unlearn`, `twin_merging` and `compeft`, and `loraweave merge FILE.yaml` for files of mergekit's. It needs no other package.
"""

from loraweave.extend import face

_MODULES = {"arithmetic": "add analogy compeft ema genknowsub negate scale subtract subtract_general twin_merging unlearn"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
