"""WEMoE (Tang et al., ICML 2024, arXiv 2402.00433): a gate on each MLP's input decides how the experts' MLPs are merged."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from loraweave import ExpertPool, LayerMismatch, WeightingError
from loraweave.extend import Count
from loraweave.extend.routing import LearnedRouter, Members, running_block, without
from loraweave.extensions.routers.by_sequence import BySequence, Decision

START = 0.3
STD = 0.01


class Wemoe(LearnedRouter, BySequence):
    """A router with w = W2 relu(W1 h + c1) + c2 for h the input of a layer's MLP; in layers outside MLPs w = `start`.

    The layers of an MLP share its weights, which are neither clamped nor made to sum to 1. As in the released code W1 and W2
    begin with a standard deviation of 0.01, c1 at 0 and c2 at `start`, so that the model begins close to task arithmetic.
    `depth` 1 is W2 h + c2.

    With `decision` "sequence" token t has the mean of w over its row's real tokens 1..t: at the last token that is the
    published weight, a mean over the sequence, and before it the causal form. With "token" each has its own.

    `gated` are the names of modules that count as an MLP, and `hidden_size` is the width of what they read, by default the
    size that the pool's layers have most often. Published is a training by the entropy of predictions, without labels:
    `fit(engine, rows, loss="entropy")`. There are hidden_size^2 numbers and more in each gate of depth 2.

    Raises WeightingError where no layer of the pool lies in such a module, LayerMismatch where one reads another width.
    """

    simplex: bool = False
    lr: ClassVar[float] = 1e-3

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        start: float = START,
        depth: Literal[1, 2] = 2,
        gated: Sequence[str] = ("mlp", "feed_forward", "ffn", "DenseReluDense"),
        hidden_size: Count | None = None,
        decision: Decision = "sequence",
    ) -> None:
        super().__init__(pool)
        self.start, self.depth, self.gated = start, depth, tuple(gated)
        self.hidden_size = self.members.most_frequent_size if hidden_size is None else hidden_size
        self.follow(decision)
        self._mlps = {layer: path for layer in self.layers if (path := _path_of(layer, self.gated)) is not None}
        if not self._mlps:
            raise WeightingError(
                f"router 'wemoe' has a gate for each MLP, and no layer of the pool lies in a module named "
                f"{' or '.join(map(repr, self.gated))}: name those of this model with gated=, as in {self.layers[0]!r}"
            )
        # torch reads a dot in a name as a submodule
        self.gates_ = nn.ModuleDict({path.replace(".", "/"): self._draw_gate() for path in self.watched})

    @property
    def watched(self) -> tuple[str, ...]:
        """The paths of the MLPs whose input the router reads."""
        return tuple(dict.fromkeys(self._mlps.values()))

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return each token's own w_BTE before any mean, -inf for experts that do not update the layer."""
        if layer in self._mlps:
            block_input = running_block(self.name, layer, x_BTI, self._mlps[layer])
            if self not in block_input.kept:
                block_input.kept[self] = self._of_mlp(block_input.x_BTI, block_input.block)
            w_BTE = block_input.kept[self]
        else:
            w_BTE = x_BTI.new_full((*x_BTI.shape[:2], len(self.experts)), self.start, dtype=torch.float32)
        return without(w_BTE, self.members.layers[layer].experts)

    def summed(self, scores_BTE: Tensor) -> Tensor:
        return scores_BTE.masked_fill(scores_BTE == -torch.inf, 0.0)

    def decided(self, mean_BTE: Tensor, scores_BTE: Tensor, layer: str) -> Tensor:
        return self.note(layer, scores_BTE, without(mean_BTE, self.members.layers[layer].experts, filling=0.0))

    def _of_mlp(self, h_BTI: Tensor, path: str) -> Tensor:
        if h_BTI.shape[2] != self.hidden_size:
            raise LayerMismatch(
                f"router 'wemoe' took the input of {path!r} for one of {self.hidden_size} features, but it has "
                f"{h_BTI.shape[2]}: make it with hidden_size={h_BTI.shape[2]}"
            )
        gate = self.gates_[path.replace(".", "/")]
        w_BTE: Tensor = gate(h_BTI.to(next(gate.parameters()).dtype))
        return w_BTE

    def _draw_gate(self) -> nn.Module:
        size, num_experts = self.hidden_size, len(self.experts)
        inner = [nn.Linear(size, size), nn.ReLU()] if self.depth == 2 else []
        gate = nn.Sequential(*inner, nn.Linear(size, num_experts))
        for name, parameter in gate.named_parameters():
            if name.endswith("weight"):
                nn.init.normal_(parameter, std=STD)
            else:
                nn.init.zeros_(parameter)
        nn.init.constant_(gate[-1].bias, self.start)  # type: ignore[arg-type]
        return gate


def _path_of(layer: str, gated: tuple[str, ...]) -> str | None:
    """Return the path of the innermost module around a layer whose name is in `gated`, or None."""
    parts = layer.split(".")[:-1]
    while parts and parts[-1] not in gated:
        parts.pop()
    return ".".join(parts) or None
