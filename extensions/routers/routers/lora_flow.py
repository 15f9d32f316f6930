"""LoRA-Flow (Wang et al., ACL 2024, arXiv 2402.11455): a gate for each block of the model, which reads the block's input."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from loraweave import ExpertPool, LayerMismatch, WeightingError
from loraweave.extend import Count
from loraweave.extend.routing import LayerTensors, LearnedRouter, Members, block_of, running_block, without


class LoraFlow(LearnedRouter):
    """A router with w = softmax(g x) + c for x the input of the transformer block of a layer, with learned g_EI and c_E.

    All layers of a block have the same weights, and a layer outside blocks, such as the language head, is a block of its
    own. Experts are those that update the block; one that leaves a layer of it alone has weight 0 there and the others' are
    as they are. Both g and c start at 0: every expert weighs 1/E. There are E * I + E numbers a block.

    The bias is outside the softmax, as in the authors' code: weights need not sum to 1, and may be below 0.
    `bias="inside"` is softmax(g x + c), which accounts of the paper print.

    `width` is the number I of features of the block's input. Where it is None, it is what all layers of a block read or
    write; where two numbers are left, what its layers read. Raises WeightingError where none can be told; a block whose
    input has another width raises LayerMismatch when it runs.
    """

    simplex: bool = False

    def __init__(
        self, pool: ExpertPool | Members, *, bias: Literal["outside", "inside"] = "outside", width: Count | None = None
    ) -> None:
        super().__init__(pool)
        self.bias = bias
        self.width = width
        self._blocks: dict[str, list[str]] = {}
        for layer in self.layers:
            self._blocks.setdefault(block_of(layer) or layer, []).append(layer)
        # under the name of each block's first layer
        self.gates_ = LayerTensors({}, learned=True)
        self.biases_ = LayerTensors({}, learned=True)
        for block, layers in self._blocks.items():
            num_inputs = _width(block, layers, self.members, width)
            if num_inputs:
                self.gates_[layers[0]] = torch.zeros(len(self.experts), num_inputs)
            self.biases_[layers[0]] = torch.zeros(len(self.experts))

    @property
    def watched(self) -> tuple[str, ...]:
        """The paths of the blocks whose input the router reads."""
        return tuple(dict.fromkeys(block for layer in self.layers if (block := block_of(layer)) is not None))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE. Raises ScopeError for a layer that sees other tokens than its block."""
        if block_of(layer) is None:
            scores_BTE, w_BTE = self._of_block(x_BTI, layer)
        else:
            block_input = running_block(self.name, layer, x_BTI)
            if self not in block_input.kept:
                block_input.kept[self] = self._of_block(block_input.x_BTI, block_input.block)
            scores_BTE, w_BTE = block_input.kept[self]
        present = self.members.layers[layer].experts
        return self.note(layer, without(scores_BTE, present), without(w_BTE, present, filling=0.0))

    def _of_block(self, x_BTI: Tensor, block: str) -> tuple[Tensor, Tensor]:
        """Return (scores_BTE, w_BTE) from a block's input; -inf and 0 for experts that do not update the block."""
        first = self._blocks[block][0]
        c_E = self.biases_[first]
        scores_BTE = x_BTI.new_zeros(*x_BTI.shape[:2], len(self.experts), dtype=c_E.dtype)
        if first in self.gates_:
            g_EI = self.gates_[first]
            if g_EI.shape[1] != x_BTI.shape[2]:
                raise LayerMismatch(
                    f"router 'lora_flow' took the input of {block!r} for one of {g_EI.shape[1]} features, but it has "
                    f"{x_BTI.shape[2]}: make it with width={x_BTI.shape[2]}"
                )
            scores_BTE = x_BTI.to(g_EI.dtype) @ g_EI.T
        present = sorted({place for layer in self._blocks[block] for place in self.members.layers[layer].experts})
        if self.bias == "inside":
            scores_BTE = without(scores_BTE + c_E, present)
            return scores_BTE, scores_BTE.softmax(dim=-1)
        scores_BTE = without(scores_BTE, present)
        return scores_BTE, without(scores_BTE.softmax(dim=-1) + c_E, present, filling=0.0)


def _width(block: str, layers: Sequence[str], members: Members, width: int | None) -> int:
    """Return how many features the input of a block has; 0 for a layer outside blocks if they are unknown.

    `layers` are those of the block, `width` is the router's option. Raises WeightingError if it cannot be told.
    """
    if block in layers:
        return members.layers[block].num_inputs
    if width is not None:
        return width
    routed_layers = [members.layers[layer] for layer in layers]
    sides = [{routed.num_inputs, routed.num_outputs} - {0} for routed in routed_layers]
    common = set.intersection(*sides)
    read = {routed.num_inputs for routed in routed_layers}
    for numbers in (common, read):
        if len(numbers) == 1 and 0 not in numbers:
            return numbers.pop()
    raise WeightingError(
        f"router 'lora_flow' cannot tell how many features the input of {block!r} has: its layers read and write "
        f"{sorted(set.union(*sides))}. Make the router with width= one of them"
    )
