"""The gate whose choice is kept even by a bias that training moves, without a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.extend import Gate, Step


class BiasedGate(Gate):
    """A gate that chooses, for each token, the `top_k` highest scores + bias_E, and whose bias_E training moves from 0 on.

    After each step bias_e grows by `rate` where fewer real tokens than the mean chose e, and falls by it where more did:
    busy experts are chosen less, and no loss says so (Wang et al. 2024, arXiv 2408.15664). A rate of 0 leaves the bias 0.
    """

    # a choice passes no gradient on
    skips = True

    def __init__(self, num_experts: int, *, top_k: int, rate: float) -> None:
        super().__init__(num_experts, most=top_k)
        self.rate = rate
        self.bias_E = nn.Parameter(torch.zeros(num_experts), requires_grad=False)

    @property
    def moved(self) -> list[nn.Parameter]:
        return [self.bias_E] if self.rate else []

    def move(self, chosen_E: Tensor) -> None:
        """Move the bias after a step of `fit`, whose real tokens chose each expert `chosen_E` times."""
        chosen_E = chosen_E.to(self.bias_E)
        self.bias_E.add_(self.rate * (chosen_E.mean() - chosen_E).sign())

    def chosen(self, biased_BTE: Tensor) -> Tensor:
        """Return 1 for the chosen experts, each token's highest, and 0 for the others."""
        return torch.zeros_like(biased_BTE).scatter(-1, biased_BTE.detach().topk(self.most, dim=-1).indices, 1.0)


class Moves:
    """A count of the choices of a step's real tokens, by which the gates of a model move their biases."""

    def __init__(self, model: Any) -> None:
        gates = {name: model.gate_of(site) for name, site in model.sites.items()}
        self._gates = {name: gate for name, gate in gates.items() if isinstance(gate, BiasedGate) and gate.moved}
        self._chosen: dict[BiasedGate, Tensor] = {}

    def see(self, step: Step, labels_BK: Tensor | None) -> None:
        """Count the choices of one pass of the running step."""
        for place, w_BTE in step.weights.items() if self._gates else ():
            # of a layer that runs several times, each run
            if (gate := self._gates.get(place.partition(" (run ")[0])) is not None:
                chosen_E = (step.real(w_BTE.detach()) != 0).sum(dim=0)
                self._chosen[gate] = self._chosen.get(gate, 0) + chosen_E

    @torch.no_grad()
    def end_step(self, summed: Callable[[Tensor], Tensor]) -> str:
        """Move the gates by the counts of the step that is over."""
        for gate, chosen_E in self._chosen.items():
            gate.move(summed(chosen_E))
        self._chosen.clear()
        return ""
