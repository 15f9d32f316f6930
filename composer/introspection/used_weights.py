"""The weights that a forward used, layer by layer, with their load."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from loraweave.composer.introspection.load import Load, load, spread
from loraweave.errors import ScopeError


@dataclass(frozen=True, eq=False)
class UsedLayer:
    """w_BTE of one layer, where B or T of size 1 is shared by the `num_rows` rows and `num_tokens` tokens of its input.

    `kernel` is the file of `composer/kernels/` that mixed it; empty where nothing was added, or the layer is not linear.
    """

    w_BTE: Tensor
    num_rows: int
    num_tokens: int
    kernel: str = ""

    @property
    def spread_BTE(self) -> Tensor:
        """A weight for every row and token."""
        return spread(self.w_BTE, self.num_rows, self.num_tokens)

    def mask(self, attention_mask: Tensor) -> Tensor:
        """The mask for this layer's own rows and tokens: the last ones, where the mask counts a cache too.

        A layer that takes all tokens as rows of a matrix gets them so. Raises ScopeError where the mask is of another batch.
        """
        if attention_mask.numel() == self.num_rows * self.num_tokens:
            return attention_mask.reshape(self.num_rows, self.num_tokens)
        rows, tokens = attention_mask.shape
        if self.num_rows % rows != 0 or tokens < self.num_tokens:
            raise ScopeError(
                f"an attention mask of {rows} rows and {tokens} tokens is none for a forward of {self.num_rows} rows and "
                f"{self.num_tokens} tokens; give the mask of that call"
            )
        return attention_mask[:, tokens - self.num_tokens :].repeat_interleave(self.num_rows // rows, dim=0)


@dataclass(frozen=True, eq=False)
class UsedWeights(Mapping[str, Tensor]):
    """{layer: w_BTE} of the layers that ran, in that order; the last axis are `experts`, those that took part.

    An expert that leaves a layer alone has weight 0 there. `layers` also has the rows and tokens that shared axes stand for.
    """

    experts: tuple[str, ...]
    layers: Mapping[str, UsedLayer]

    def __getitem__(self, layer: str) -> Tensor:
        return self.layers[layer].w_BTE

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def load(self, attention_mask: Tensor | None = None) -> dict[str, Load]:
        """Each expert's share of every layer, and the entropy; with the mask of the call, without its padding.

        Raises ScopeError for the mask of another batch.
        """
        return {
            name: load(used.spread_BTE, None if attention_mask is None else used.mask(attention_mask))
            for name, used in self.layers.items()
        }
