"""Gates for each token with other ways to choose experts: limits in training, or a bias that keeps their use even."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import WeightingError
from loraweave.extend.recipes import Call, Gate, TokenGate, Weighing
from loraweave.extend.routing import Step, top_p_of_softmax
from loraweave.extend.scoring import IGNORED

# the share of overflow above which a warning is logged, and the steps over which it is averaged
MUCH, WINDOW = 0.2, 20


class Overflow:
    """A watcher that measures, step by step, the share of the tokens' choices that were dropped because an expert was full.

    Only tokens before a target count, which are a row's last ones and so lose most. Where labels are not those of tokens,
    all tokens count.
    """

    def __init__(self, model: Any, report: Any) -> None:
        self._recipe, self._report = model.recipe, report
        gates = [gate for gate in model.gates.values() if isinstance(gate, LimitedGate) and gate.capacity is not None]
        self._most = gates[0].most if gates else 0
        # experts that had no capacity left, and all that were chosen
        self._counts = torch.zeros(2, dtype=torch.float64)
        self._warned = False
        self._whose = "tokens before a target"

    def see(self, step: Step, labels_BK: Tensor | None) -> None:
        """Count the weights that one forward pass of the step lost to capacity; `labels_BK` are the targets, if known."""
        if not self._most:
            return
        w_BTE = step.weights
        if labels_BK is None:
            self._whose = "tokens"
            counted = [site_BTE.flatten(0, 1) for site_BTE in w_BTE.values()]
        else:
            before_BK = functional.pad((labels_BK != IGNORED)[:, 1:], (0, 1))
            num_rows, num_last = before_BK.shape
            seen = [site_BTE for site_BTE in w_BTE.values() if len(site_BTE) == num_rows and site_BTE.shape[1] >= num_last]
            counted = [site_BTE[:, -num_last:][before_BK] for site_BTE in seen]
        if counted:
            chosen = self._most * sum(len(w_NE) for w_NE in counted)
            kept = torch.stack([(w_NE != 0).sum() for w_NE in counted]).sum()
            self._counts += torch.tensor([chosen - int(kept), chosen], dtype=torch.float64)

    def end_step(self, summed: Callable[[Tensor], Tensor]) -> str:
        """Return the step's share of dropped choices as text for the progress bar; `summed` adds a tensor up over processes.

        Warns once if the mean share of the last 20 steps is above 20 %.
        """
        if not self._most:
            return ""
        dropped, chosen = summed(self._counts).tolist()
        self._counts = torch.zeros_like(self._counts)
        shares = self._report.overflow
        shares.append(dropped / max(chosen, 1.0))
        recent = sum(shares[-WINDOW:]) / WINDOW
        if len(shares) >= WINDOW and recent > MUCH and not self._warned:
            self._warned = True
            by_weight = "prioritised=True, " if self._recipe.options.get("prioritised") is False else ""
            warnings.warn(
                f"recipe {self._recipe.name!r}: over the last {WINDOW} steps {recent:.0%} of the experts that "
                f"{self._whose} chose had no capacity left. Evaluation has no such limit, so that experts then see tokens "
                f"they have not learned from: take {by_weight}a larger capacity, None for no limit, or a larger balance",
                stacklevel=5,
            )
        return f"  overflow {shares[-1]:.0%}"


class LimitedGate(TokenGate):
    """A `TokenGate` that can choose by `top_p`, and whose experts have limits in training.

    `top_p` takes the fewest experts whose probabilities sum to at least that. If `sums_to_one` is False, weights are the
    chosen experts' probabilities in the softmax over all, not divided by their sum.

    In training, `expert_dropout` is the probability that a token cannot use an expert; at least `top_k` always stay. With
    `capacity` each expert takes at most that many times its even share of a row's tokens: the first that chose it, or with
    `prioritised` those with the largest weights for it. All other tokens get a weight of exactly 0.
    """

    watcher = Overflow

    def __init__(
        self,
        num_inputs: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        sums_to_one: bool = True,
        capacity: float | None = None,
        prioritised: bool = False,
        expert_dropout: float = 0.0,
    ) -> None:
        if top_k is not None and top_p is not None:
            raise WeightingError(f"top_k is {top_k!r} and top_p {top_p!r}: choose by one of them, and leave the other None")
        super().__init__(num_inputs, num_experts, top_k=top_k)
        self.top_p = top_p
        self.sums_to_one = sums_to_one
        self.capacity = capacity
        self.prioritised = prioritised
        self.expert_dropout = expert_dropout

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        weighing = super().forward(x_BTI, call)
        if not self.training or self.capacity is None:
            return weighing
        real_BT = call.real_of(x_BTI)
        real_BT = x_BTI.new_ones(x_BTI.shape[:2], dtype=torch.bool) if real_BT is None else real_BT
        capacity_B = even_share(real_BT, self.num_experts, self.top_k or self.num_experts, self.capacity)
        limit = heaviest_within_capacity if self.prioritised else within_capacity
        return weighing._replace(w_BTE=limit(weighing.w_BTE, capacity_B, real_BT))

    def scores(self, x_BTI: Tensor) -> Tensor:
        scores_BTE = super().scores(x_BTI)
        if self.training and self.expert_dropout:
            scores_BTE = without_some(scores_BTE, self.expert_dropout, self.top_k or 1)
        return scores_BTE

    def choose(self, scores_BTE: Tensor) -> Tensor:
        if self.top_p is not None:
            w_BTE = top_p_of_softmax(scores_BTE, self.top_p)
            return w_BTE / w_BTE.sum(dim=-1, keepdim=True) if self.sums_to_one else w_BTE
        if self.sums_to_one or self.top_k is None:
            return super().choose(scores_BTE)
        return top_k_of_softmax(scores_BTE, self.top_k)


def top_k_of_softmax(scores_BTE: Tensor, top_k: int) -> Tensor:
    """Return w_BTE: softmax over all experts, kept for the `top_k` highest of each token and 0 for the others.

    It sums to less than 1, so that a single expert's weight, too, has a gradient to its scores (Switch Transformers, Fedus
    et al. 2021, arXiv 2101.03961).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    best = p_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(p_BTE).scatter(-1, best.indices, best.values)


def without_some(scores_BTE: Tensor, share: float, least: int = 1) -> Tensor:
    """Return the scores with a share of them, drawn at random, replaced by -inf; at least `least` of each token's stay."""
    drawn_BTE = torch.rand_like(scores_BTE)
    stays_BTE = (drawn_BTE >= share).scatter(-1, drawn_BTE.topk(least, dim=-1).indices, True)
    return scores_BTE.masked_fill(~stays_BTE, -math.inf)


def heaviest_within_capacity(w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Return w_BTE with each expert's weights set to 0 except for the row's `capacity_B` real tokens with the largest ones.

    Of equal ones the earlier tokens stay (Batch Prioritized Routing, Riquelme et al. 2021, arXiv 2106.05974, within a row).
    A token depends on others in its row, so this is for training alone.
    """
    falling_BTE = (w_BTE.detach() * _chosen(w_BTE, real_BT)).argsort(dim=1, descending=True, stable=True)
    return w_BTE * (falling_BTE.argsort(dim=1) + 1 <= capacity_B[:, None, None])


def within_capacity(w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None) -> Tensor:
    """Return w_BTE with 0 for every token of a row after the first `capacity_B` real ones that chose the expert.

    The other weights are unchanged. A token depends on others in its row, so this is for training alone.
    """
    return w_BTE * (_chosen(w_BTE, real_BT).cumsum(dim=1) <= capacity_B[:, None, None])


def _chosen(w_BTE: Tensor, real_BT: Tensor | None) -> Tensor:
    """Return a boolean (B, T, E): True where a real token has a weight for the expert that is not 0."""
    chosen_BTE = w_BTE.detach() != 0
    return chosen_BTE if real_BT is None else chosen_BTE & real_BT[..., None]


def even_share(real_BT: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """Return capacity_B, the tokens that an expert may take of each row: `factor` times top_k T / E, rounded up."""
    # in this order a factor of 1 is exact
    return (real_BT.sum(dim=1) * (factor * top_k) / num_experts).ceil()


class Moves:
    """A watcher that counts how many real tokens of a step chose each expert, and then moves the gates' biases by that."""

    def __init__(self, model: Any, report: Any) -> None:
        gates = {name: model.gate_of(site) for name, site in model.sites.items()}
        self._gates = {name: gate for name, gate in gates.items() if isinstance(gate, BiasedGate) and gate.moved}
        self._chosen: dict[BiasedGate, Tensor] = {}

    def see(self, step: Step, labels_BK: Tensor | None) -> None:
        """Count the choices of one forward pass of the running step; the labels are not used."""
        for place, w_BTE in step.weights.items() if self._gates else ():
            # a layer that runs several times has weights for each run
            if (gate := self._gates.get(place.partition(" (run ")[0])) is not None:
                chosen_E = (step.real(w_BTE.detach()) != 0).sum(dim=0)
                self._chosen[gate] = self._chosen.get(gate, 0) + chosen_E

    @torch.no_grad()
    def end_step(self, summed: Callable[[Tensor], Tensor]) -> str:
        """Move the gates' biases by the counts of the step that is over; `summed` adds a tensor up over processes."""
        for gate, chosen_E in self._chosen.items():
            gate.move(summed(chosen_E))
        self._chosen.clear()
        return ""


class BiasedGate(Gate):
    """A gate that chooses, for each token, the `top_k` highest scores + bias_E, and whose bias_E training moves from 0 on.

    After each step bias_e grows by `rate` where fewer real tokens than the mean chose e, and falls by it where more did:
    busy experts are chosen less, without a loss term (Wang et al. 2024, arXiv 2408.15664). A rate of 0 leaves the bias 0.
    """

    # a choice passes no gradient on
    skips = True
    watcher = Moves

    def __init__(self, num_experts: int, *, top_k: int, rate: float) -> None:
        super().__init__(num_experts, most=top_k)
        self.rate = rate
        self.bias_E = nn.Parameter(torch.zeros(num_experts), requires_grad=False)

    @property
    def moved(self) -> list[nn.Parameter]:
        return [self.bias_E] if self.rate else []

    def move(self, chosen_E: Tensor) -> None:
        """Move bias_E after a step of `fit`; `chosen_E` counts how often the step's real tokens chose each expert."""
        chosen_E = chosen_E.to(self.bias_E)
        self.bias_E.add_(self.rate * (chosen_E.mean() - chosen_E).sign())

    def chosen(self, biased_BTE: Tensor) -> Tensor:
        """Return (B, T, E): 1 at each token's `top_k` highest biased scores, 0 for the others, without a gradient."""
        return torch.zeros_like(biased_BTE).scatter(-1, biased_BTE.detach().topk(self.most, dim=-1).indices, 1.0)
