"""MoLE (Wu, Huang and Wei, ICLR 2024, arXiv 2404.13628): a balanced gate in each layer on the outputs of all experts."""

from collections.abc import Iterable, Mapping
from typing import Self

import torch
from torch import Tensor

from loraweave import ExpertPool, ScopeError
from loraweave.extend import NonNegative, unknown_expert
from loraweave.extend.routing import LayerTensors, Members, Step, without
from loraweave.extensions.routers.outputs import OutputRouter

# standard deviation of the learned projections at the start: weights are close to uniform, and tau gets a gradient
STD = 0.02
# below which a length counts as this, as in torch's normalize
SHORTEST = 1e-12


class Mole(OutputRouter):
    """A router with w = softmax(s / tau), s_n = sum over experts i of e_in . E_i(x) / |E_i(x)|, learned e and tau by layer.

    E_i(x) = b_i a_i x is what expert i adds, without its gain and bias. Each layer weighs for itself, each token for itself:
    the paper's matrix-wise gate at sequence length 1, since one over the whole sequence would look ahead. The paper's gates
    of a whole block or network weigh what each expert makes of all of it, x' + f_FFN(LN(x') | expert) for a block, and add
    these outputs: every block would run once for each expert, and no layer has a mixture. They are not here; the authors'
    repository (yushuiwx/MoLE) has no gate's code.

    The projection has E * O * E numbers in a layer, drawn with a standard deviation of 0.02; tau starts at 1 and stays above
    0 (its logarithm is learned).

    `balance`, 0 or more, is the coefficient of -log of the product over experts of q_i, the expert's mean weight over the
    real tokens and its layers: E log E where all weigh alike, without bound where one is not used. `masked` names experts
    that get no weight, like `masking`. Raises UnknownExpert for other names, and what `OutputRouter` raises.
    """

    def __init__(self, pool: ExpertPool | Members, *, balance: NonNegative = 0.5, masked: Iterable[str] = ()) -> None:
        super().__init__(pool)
        self.balance = balance
        self.masked = self._known(masked)
        self.gates_ = LayerTensors({}, learned=True)
        self.log_temperatures_ = LayerTensors({}, learned=True)
        self._counted: dict[str, tuple[Tensor, list[int]]] = {}
        num_experts = len(self.experts)
        for layer, routed in self.informed.items():
            self.gates_[layer] = STD * torch.randn(num_experts, routed.num_outputs, num_experts)
            self.log_temperatures_[layer] = torch.zeros(())

    def scores(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return s_BTE / tau of the layer's experts, -inf for all other and for masked ones."""
        z_BTS = self.latents(x_BTI, layer)
        if layer not in self.gates_:
            return without(self.by_expert(z_BTS, layer), self._present(layer))
        # z is as long as the output; an expert that adds nothing stays 0
        lengths_BTE = self.by_expert(z_BTS.square(), layer).clamp_min(SHORTEST**2).sqrt()
        units_BTS = z_BTS / lengths_BTE[..., self.owners_[layer]]
        scores_BTE = units_BTS @ self._project(layer) / self.log_temperatures_[layer].exp()
        return without(scores_BTE, self._present(layer))

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE; they sum to 1, or are all 0 where every expert of the layer is masked."""
        scores_BTE = self.scores(x_BTI, layer)
        w_BTE = scores_BTE.softmax(dim=-1) if self._present(layer) else torch.zeros_like(scores_BTE)
        return self.note(layer, scores_BTE, w_BTE)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        """Return {"balance": balance * -log of the product of the experts' mean weights}, or {} for a balance of 0."""
        return {"balance": -self.balance * self._mean_weights(step).log().sum()} if self.balance else {}

    def masking(self, *names: str) -> Self:
        """Return a copy that gives these experts no weight; the others' weights keep their ratios, and sum to 1.

        The outputs of masked experts still count among the gate's inputs. Raises UnknownExpert for other names.
        """
        options = {**self.options, "masked": [*self.masked, *names]}
        copy = type(self)(self.members, **options).train(self.training)
        copy.load_state_dict(self.state_dict())
        return copy

    def remove_expert(self, name: str) -> Self:
        """Raise ScopeError: the gate looks at the outputs of all its experts."""
        raise ScopeError(
            f"router 'mole' looks at the outputs of all its experts, {name!r} among them: masking({name!r}) gives it no "
            "weight and leaves the others' ratios; a smaller pool needs a router of its own, and fit()"
        )

    def _known(self, names: Iterable[str]) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(names))
        for name in names:
            if name not in self.members.places:
                raise unknown_expert(name, self.experts)
        return names

    def _present(self, layer: str) -> tuple[int, ...]:
        masked = {self.members.places[name] for name in self.masked}
        return tuple(place for place in self.members.layers[layer].experts if place not in masked)

    def _project(self, layer: str) -> Tensor:
        """Return p_SE, each of the layer's S rank rows times its expert's e_OE: once a call instead of once a token."""
        q_SO, e_EOE = self.bases_[layer], self.gates_[layer]
        rows = [q_RO @ e_OE for q_RO, e_OE in zip(torch.split(q_SO, self._num_rows(layer)), e_EOE, strict=True)]
        return torch.cat(rows)

    def _num_rows(self, layer: str) -> list[int]:
        """Return how many of the layer's S rank rows each expert has; counted on the device once, then remembered."""
        owner_S = self.owners_[layer]
        known = self._counted.get(layer)
        if known is None or known[0] is not owner_S:
            known = owner_S, torch.bincount(owner_S, minlength=len(self.experts)).tolist()
            self._counted[layer] = known
        return known[1]

    def _mean_weights(self, step: Step) -> Tensor:
        """Return q_E of the experts that some layer could weigh: the mean weight over real tokens, then those layers."""
        num_experts = len(self.experts)
        sum_E, layers_E = step.mask_BT.new_zeros(num_experts, dtype=torch.float32), [0] * num_experts
        for layer, w_BTE in step.weights.items():
            sum_E = sum_E + step.real(w_BTE).mean(dim=0)
            for place in self._present(layer):
                layers_E[place] += 1
        weighed = [place for place, count in enumerate(layers_E) if count]
        return sum_E[weighed] / sum_E.new_tensor([layers_E[place] for place in weighed])
