"""LD-MoLE (Zhuang et al. 2025, arXiv 2509.25684): experts with gates that learn the number of experts of each token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave import ScopeError
from loraweave.extend import Count, NonNegative, Rate
from loraweave.extend.recipes import Call, EvenRecipe, Gate, Site, TokenGate, Weighing, draw_linear
from loraweave.extend.routing import Step


def sparsegen(scores_BTE: Tensor, lambda_BT1: Tensor) -> Tensor:
    """Return p_BTE = argmin over the simplex of |p - u|^2 - lambda |p|^2 for the scores u, with a lambda below 1.

    p = max(u - tau, 0) / (1 - lambda), with the tau that makes it sum to 1: lambda = 0 is sparsemax, towards 1 the highest
    score gets all, towards -inf all get equal shares. Scores of -inf get 0. Gradients reach scores and lambda.
    """
    sorted_BTE = scores_BTE.sort(dim=-1, descending=True).values
    with torch.no_grad():
        number_E = torch.arange(1, scores_BTE.shape[-1] + 1, device=scores_BTE.device)
        # number * -inf > -inf is false, so that absent scores are outside
        inside_BTE = 1 - lambda_BT1 + number_E * sorted_BTE > sorted_BTE.cumsum(dim=-1)
        num_inside_BT1 = inside_BTE.sum(dim=-1, keepdim=True)
    total_BT1 = torch.where(inside_BTE, sorted_BTE, 0.0).sum(dim=-1, keepdim=True)
    tau_BT1 = (total_BT1 - 1 + lambda_BT1) / num_inside_BT1
    return (scores_BTE - tau_BT1).clamp_min(0) / (1 - lambda_BT1)


def least_lambda(scores_BTE: Tensor, num_shares: int) -> Tensor:
    """Return the least lambda_BT1 with at most `num_shares` weights above 0: 1 - sum over the highest u of (u - next u).

    -inf where no more scores than that are finite.
    """
    best_BTK = scores_BTE.topk(num_shares + 1, dim=-1).values
    gaps_BTK = (best_BTK[..., :-1] - best_BTK[..., -1:]).nan_to_num(nan=0.0, posinf=math.inf)
    return 1 - gaps_BTK.sum(dim=-1, keepdim=True)


def shortfall(step: Step, target: int) -> Tensor:
    """Return how far lambda is below the least with at most `target` experts, a mean over real tokens, then over layers."""
    shortfalls = [
        step.real((least_lambda(scores_BTE.detach(), target) - step.beside[layer]).clamp_min(0)).mean()
        for layer, scores_BTE in step.scores.items()
    ]
    return torch.stack(shortfalls).mean()


# how far lambda stays below 1
MARGIN = 0.01
# the last bias of lambda at the start
START = -2.5


class Lambda(nn.Module):
    """A network for lambda(x) = 0.99 + logsigmoid(MLP(x)), with `hidden` ReLU units.

    It is drawn as torch draws linear layers, with a last bias of -2.5, so that lambda begins around -1.6, as published. The
    published hidden units begin at -2.5, too, where most inputs leave them at 0 and without a gradient; here at 0.
    """

    def __init__(self, num_inputs: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(num_inputs, hidden)
        self.last = nn.Linear(hidden, 1)
        nn.init.zeros_(self.first.bias)
        nn.init.constant_(self.last.bias, START)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Return lambda_BT1, below 0.99."""
        out_BT1: Tensor = self.last(self.first(x_BTI.to(self.first.weight.dtype)).relu())
        return 1 - MARGIN + functional.logsigmoid(out_BT1)


# in Call.kept: the model's _LambdaReader
_READER = "what says lambda"


@dataclass(frozen=True, kw_only=True)
class LdMole(EvenRecipe):
    """The mixture y = y0 + alpha / rank * sum over e of w_e B_e A_e x, w = sparsegen(r x, lambda(x)) by token and site.

    w lies on the simplex, and lambda, below 1, determines how many of its entries are 0. r_EI is each site's own, and
    lambda(x) = 0.99 + logsigmoid(MLP(x)) has one MLP of `hidden` units for all sites with as many inputs. Weights and their
    number follow the input without a jump, so that gradients reach both. Router `ld_mole` is the same for given adapters.

    `sparsity` times how far lambda is below the least that leaves at most `target` experts, a mean over real tokens and
    sites, is added; scores are not moved by it. So is `balance` times the mean over sites of E * sum over e of f_e p_e, f_e
    the share of e of all weights above 0 and p_e its mean weight. Both are 0 in the released configuration, whose sizes the
    defaults are. There, dropout is also on what the gates see, and padding counts in the sparsity.
    """

    dropout: Rate = 0.1
    hidden: Count = 256
    sparsity: NonNegative = 0.0
    target: Count = 2
    balance: NonNegative = 0.0

    def gate(self, site: Site, num_experts: int) -> Gate:
        return _SparsegenGate(site.num_inputs, num_experts)

    def reader(self, sites: Sequence[Site]) -> Gate:
        return _LambdaReader(sorted({site.num_inputs for site in sites}), self.hidden)

    def losses(self, step: Step) -> Mapping[str, Tensor]:
        losses = {}
        if self.sparsity and self.target < self.num_experts:
            losses["sparsity"] = self.sparsity * shortfall(step, self.target)
        if self.balance:
            imbalances = [_unevenness(step.real(w_BTE)) for w_BTE in step.weights.values()]
            losses["balance"] = self.balance * torch.stack(imbalances).mean()
        return losses


def _unevenness(w_NE: Tensor) -> Tensor:
    """Return E * sum over e of f_e p_e, f_e the share of e of all weights above 0 and p_e its mean; 1 if all are alike."""
    chosen_NE = (w_NE > 0).to(w_NE)
    return w_NE.shape[1] * (chosen_NE.sum(dim=0) / chosen_NE.sum() * w_NE.mean(dim=0)).sum()


class _SparsegenGate(TokenGate):
    skips = False

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        """Weigh by scores and lambda. Raises ScopeError where no call of the whole model has begun."""
        if _READER not in call.kept:
            raise ScopeError(
                "the gate looks at lambda, which all sites share, and this layer runs outside of a call of the whole model: "
                "call the model itself, or generate() with it"
            )
        x_BTI = x_BTI.to(self.r_EI.dtype)
        scores_BTE, lambda_BT1 = functional.linear(x_BTI, self.r_EI), call.kept[_READER].lambdas_of(x_BTI)
        return Weighing(sparsegen(scores_BTE, lambda_BT1), scores_BTE, lambda_BT1)


class _LambdaReader(Gate):
    """A holder of the MLPs that compute lambda, one for all sites with the same number of inputs."""

    def __init__(self, widths: Sequence[int], hidden: int) -> None:
        super().__init__(1)
        # torch's own layers would draw from the caller's generator
        with torch.random.fork_rng([]):
            self.lambdas = nn.ModuleDict({str(width): Lambda(width, hidden) for width in widths})

    def reset(self, generator: torch.Generator) -> None:
        for network in self.lambdas.values():
            for weight in (network.first.weight, network.last.weight):  # type: ignore[union-attr]
                draw_linear(weight, generator)  # type: ignore[arg-type]

    def begin(self, call: Call) -> None:
        call.kept[_READER] = self

    def lambdas_of(self, x_BTI: Tensor) -> Tensor:
        """Return lambda_BT1 of the MLP for inputs of this width, on the device of x."""
        network = self.lambdas[str(x_BTI.shape[-1])]
        lambda_BT1: Tensor = network(x_BTI.to(network.last.weight.device)).to(x_BTI.device)  # type: ignore[union-attr, arg-type]
        return lambda_BT1
