"""How do mixtures run faster, or with the same bits in any batch? By kernels for rows, tokens, GPUs and compiled models.

Nothing has to be called: a layer takes the cheapest kernel, batches by row on a GPU an arena of experts, and `torch.compile`
keeps mixtures in its graphs. `batch_invariant` fixes the shapes of a model's products. It costs a second copy of the
experts that a GPU's batches use, and much time within `batch_invariant`.
"""

from loraweave.extend import face

_MODULES = {"fixed_shapes": "batch_invariant"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
