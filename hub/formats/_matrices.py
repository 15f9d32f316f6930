"""The two factors of one update from the tensors of two layers in a row: linear, embedding or convolution."""

from __future__ import annotations

from torch import Tensor

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.types import Factors


def matrices(a: Tensor, b: Tensor, embedding: bool, where: str) -> Factors:
    """The factors before any scale. Raises AdapterCorrupt for shapes that do not fit, AdapterUnsupported for groups."""
    shapes = f"A of shape {tuple(a.shape)} and B of shape {tuple(b.shape)}"
    kernel = tuple(a.shape[2:])
    if (embedding and kernel) or not 2 <= a.dim() <= 5 or a.dim() != b.dim():
        raise AdapterCorrupt(f"{where} has {shapes}, which are not the factors of a linear layer, embedding or convolution")
    if any(size != 1 for size in b.shape[2:]):
        raise AdapterCorrupt(f"{where} has {shapes}; the second convolution of an update has kernel size 1")
    if kernel and b.shape[1] != a.shape[0] and a.shape[0] % b.shape[1] == 0:
        raise AdapterUnsupported(f"{where} has {shapes}: a convolution in groups, which is not supported")
    if b.shape[1] != a.shape[0]:
        raise AdapterCorrupt(f"{where} has {shapes}; A's first size and B's second are the rank and must agree")
    return Factors(
        a_RI=a.flatten(1).contiguous(),
        b_OR=b.flatten(1).contiguous(),
        kind="embedding" if embedding else "conv" if kernel else "linear",
        kernel=kernel,
    )
