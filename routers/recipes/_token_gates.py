"""A gate for the whole model that looks at the embeddings of a row's prompt."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.errors import ScopeError, WeightingError
from loraweave.routers.recipes._gate import UNKNOWN, Call, Gate, Weighing
from loraweave.routers.recipes._row_gates import ModelGate, prompt_mean
from loraweave.routers.tokens._scores import top_k_softmax


class EmbeddingGate(ModelGate):
    """w = softmax over the `top_k` highest of r mean(x), x the input embeddings of the prompt's tokens, with r_EH.

    `normal` draws r_EH from the normal distribution instead of uniformly, and `padding` counts the prompt's padding in its
    mean.
    """

    def __init__(
        self, num_features: int, num_experts: int, *, top_k: int, normal: bool = False, padding: bool = False
    ) -> None:
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.normal = normal
        self.padding = padding
        self.r_EH = nn.Parameter(torch.empty(num_experts, num_features))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """r_EH uniform between -1/sqrt(H) and 1/sqrt(H), as torch draws a linear layer; or normal."""
        bound = self.r_EH.shape[1] ** -0.5
        if self.normal:
            self.r_EH.normal_(generator=generator)
        else:
            self.r_EH.uniform_(-bound, bound, generator=generator)

    def of_prompts(self, call: Call) -> Weighing:
        """Raises ScopeError for a call whose tokens are not known."""
        if call.embed is None:
            raise ScopeError(
                "the gate decides by the embeddings of a row's prompt, and this call has no tokens: call the model with "
                "input_ids or inputs_embeds"
            )
        mean_BH = prompt_mean(call.embed(), call, padding=self.padding)
        scores_B1E = (mean_BH.to(self.r_EH.dtype) @ self.r_EH.T)[:, None]
        return Weighing(top_k_softmax(scores_B1E, self.top_k), scores_B1E)


def top_k_of_softmax(scores_BTE: Tensor, top_k: int) -> Tensor:
    """w_BTE: softmax over all experts, kept for the `top_k` highest of each token and 0 for the others.

    It sums to less than 1, so that a single expert's weight, too, has a gradient to its scores (Switch Transformers, Fedus
    et al. 2021, arXiv 2101.03961).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    best = p_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(p_BTE).scatter(-1, best.indices, best.values)


def top_p_of_softmax(scores_BTE: Tensor, top_p: float) -> Tensor:
    """w_BTE: softmax over all experts, kept for the fewest that sum to at least `top_p` (above 0, up to 1), else 0.

    Each token has as many experts as that takes, at least one (Huang et al. 2024, arXiv 2403.07652).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    if top_p >= 1:
        return p_BTE
    falling_BTE, order_BTE = p_BTE.detach().sort(dim=-1, descending=True, stable=True)
    # what stands before an expert does not suffice without it
    kept_BTE = functional.pad(falling_BTE.cumsum(dim=-1)[..., :-1], (1, 0)) < top_p
    return p_BTE * torch.zeros_like(kept_BTE).scatter(-1, order_BTE, kept_BTE)


def noisy(scores_BTE: Tensor, spread_BTE: Tensor) -> Tensor:
    """The scores plus normal noise with the standard deviation softplus(spread) (Shazeer et al. 2017, arXiv 1701.06538)."""
    return scores_BTE + torch.randn_like(scores_BTE) * functional.softplus(spread_BTE)


def without_some(scores_BTE: Tensor, share: float, least: int = 1) -> Tensor:
    """The scores with -inf for experts drawn for each token alone, each with probability `share`; `least` always stay."""
    drawn_BTE = torch.rand_like(scores_BTE)
    stays_BTE = (drawn_BTE >= share).scatter(-1, drawn_BTE.topk(least, dim=-1).indices, True)
    return scores_BTE.masked_fill(~stays_BTE, -math.inf)


def within_capacity(
    w_BTE: Tensor, capacity_B: Tensor, real_BT: Tensor | None = None, *, prioritised: bool = False
) -> Tensor:
    """The weights, but 0 for every token of a row after the first `capacity_B` real ones that an expert got.

    With `prioritised` an expert keeps those that it weighs most, wherever they are (Batch Prioritized Routing, Riquelme et
    al. 2021, arXiv 2106.05974, within a row), the earlier of equal ones. Weights that stay are as they were. A token depends
    on others in its row, so this is for training alone.
    """
    chosen_BTE = w_BTE.detach() != 0
    if real_BT is not None:
        chosen_BTE = chosen_BTE & real_BT[..., None]
    if prioritised:
        falling_BTE = (w_BTE.detach() * chosen_BTE).argsort(dim=1, descending=True, stable=True)
        place_BTE = falling_BTE.argsort(dim=1) + 1
    else:
        place_BTE = chosen_BTE.cumsum(dim=1)
    return w_BTE * (place_BTE <= capacity_B[:, None, None])


def even_share(real_BT: Tensor, num_experts: int, top_k: int, factor: float) -> Tensor:
    """capacity_B: `factor` times the tokens that each expert of a row has where all have alike many, rounded up."""
    # in this order a factor of 1 is exact
    return (real_BT.sum(dim=1) * (factor * top_k) / num_experts).ceil()


class SpatialGate(Gate):
    """f = [mean over positions of U3 GELU(LN(U1 x)), U2 GELU(LN(mean over positions of x))], and (m, s, p) = V f.

    Of the mixed experts, those with the `top_k` highest m + s * noise count: softmax over these, or softmax over all if not
    `renormalised`. Noise is in training alone. The generic expert, where there is one, has 1; the one of the row's task p,
    and those of other tasks 0. They are in that order. All U, LN and V are the task's own; x_BTC are the channels at each
    position.
    """

    def __init__(
        self,
        num_channels: int,
        num_mixed: int,
        num_tasks: int,
        *,
        generic: bool,
        top_k: int,
        renormalised: bool,
    ) -> None:
        super().__init__(num_mixed + generic + num_tasks, most=top_k + generic + 1)
        self.num_mixed, self.num_tasks = num_mixed, num_tasks
        self.generic, self.top_k, self.renormalised = generic, top_k, renormalised
        # of fewer than 4 values, LayerNorm leaves next to nothing
        width = max(4, num_channels // 4)
        self.u1, self.norm1 = _Linear(num_tasks, num_channels, width), _Norm(num_tasks, width)
        self.u3 = _Linear(num_tasks, width, width)
        self.norm2, self.u2 = _Norm(num_tasks, num_channels), _Linear(num_tasks, num_channels, width)
        self.v = _Linear(num_tasks, 2 * width, 2 * num_mixed + 1)

    def reset(self, generator: torch.Generator) -> None:
        """Each U, V and their biases uniform between -1/sqrt(I) and 1/sqrt(I), as torch draws a linear layer."""
        for part in self.children():
            if isinstance(part, _Linear):
                part.reset(generator)

    def forward(self, x_BTC: Tensor, call: Call) -> Weighing:
        """Raises ScopeError for a layer that sees parts of images, for texts, and for a call whose tasks are not known."""
        task_B = self._tasks(x_BTC, call)
        x_BTC = x_BTC.to(self.v.weight_KOI.dtype)
        each_B1H = self.u3(functional.gelu(self.norm1(self.u1(x_BTC, task_B), task_B)), task_B).mean(dim=1, keepdim=True)
        mean_B1H = self.u2(functional.gelu(self.norm2(x_BTC.mean(dim=1, keepdim=True), task_B)), task_B)
        made_B1V = self.v(torch.cat([each_B1H, mean_B1H], dim=-1), task_B)
        scores_B1E, spread_B1E, p_B11 = made_B1V.split([self.num_mixed, self.num_mixed, 1], dim=-1)
        if self.training:
            scores_B1E = scores_B1E + spread_B1E * torch.randn_like(spread_B1E)
        choose = top_k_softmax if self.renormalised else top_k_of_softmax
        ones_B1G = torch.ones_like(p_B11).expand(-1, -1, int(self.generic))
        own_B1K = functional.one_hot(task_B, self.num_tasks).to(p_B11)[:, None] * p_B11
        return Weighing(torch.cat([choose(scores_B1E, self.top_k), ones_B1G, own_B1K], dim=-1), scores_B1E)

    def _tasks(self, x_BTC: Tensor, call: Call) -> Tensor:
        if call.ids_BT is not None or call.follows:
            raise ScopeError(
                "the gate looks at all positions of an image at once: for texts, take a recipe with another gate"
            )
        if call.task_B is None:
            raise ScopeError(
                "the gate looks at the task of each row, and this call has none: give task=..., one for each row"
            )
        if len(call.task_B) != len(x_BTC):
            raise ScopeError(
                f"the gate looks at whole images, {len(call.task_B)} in this call, but its layer sees {len(x_BTC)} parts of "
                "them: leave layers that see windows out of target_modules"
            )
        return call.task_B


class _Linear(nn.Module):
    """x W^T + bias with the W and bias of each row's task."""

    def __init__(self, num_tasks: int, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight_KOI = nn.Parameter(torch.empty(num_tasks, num_outputs, num_inputs))
        self.bias_KO = nn.Parameter(torch.empty(num_tasks, num_outputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        bound = 1 / math.sqrt(self.weight_KOI.shape[2])
        self.weight_KOI.uniform_(-bound, bound, generator=generator)
        self.bias_KO.uniform_(-bound, bound, generator=generator)

    def forward(self, x_BTI: Tensor, task_B: Tensor) -> Tensor:
        return x_BTI @ self.weight_KOI[task_B].mT + self.bias_KO[task_B][:, None]


class _Norm(nn.Module):
    """LayerNorm with the factor and bias of each row's task."""

    def __init__(self, num_tasks: int, num_features: int) -> None:
        super().__init__()
        self.weight_KI = nn.Parameter(torch.ones(num_tasks, num_features))
        self.bias_KI = nn.Parameter(torch.zeros(num_tasks, num_features))

    def forward(self, x_BTI: Tensor, task_B: Tensor) -> Tensor:
        normed_BTI = functional.layer_norm(x_BTI, x_BTI.shape[-1:])
        return normed_BTI * self.weight_KI[task_B][:, None] + self.bias_KI[task_B][:, None]


class TaskSwitch(Gate):
    """w_e = scale_e for the experts of the row's task, and 0 for the others.

    `used` has, for each task and at last for rows without one, which experts count. With `learned` the scales learn.
    """

    static = True
    used_KE: Tensor
    scale_E: Tensor

    def __init__(self, used: Sequence[Sequence[bool]], scales: Sequence[float], *, learned: bool = False) -> None:
        super().__init__(len(scales), most=max(sum(row) for row in used))
        self.register_buffer("used_KE", torch.tensor(used), persistent=False)
        if learned:
            self.scale_E = nn.Parameter(torch.tensor(scales))
        else:
            self.register_buffer("scale_E", torch.tensor(scales), persistent=False)

    def forward(self, x_BTI: Tensor | None, call: Call) -> Weighing:
        # UNKNOWN is -1, the last one
        used_BE = self.used_KE[UNKNOWN:] if call.task_B is None else self.used_KE[call.task_B]
        return Weighing((used_BE * self.scale_E)[:, None])


class TokenGate(Gate):
    """w = softmax(r x / temperature) over the `top_k` highest scores of each token, with r_EI; in fp32 or better.

    `top_k` None is all experts; or each token has the fewest whose probabilities sum to `top_p`. Softmax, then the best k,
    then made to sum to 1 is the same; with `sums_to_one` False the softmax of all is kept as it is. In training alone,
    `noise` adds normal noise with the standard deviation softplus(n x), n_EI learned, before the softmax; `expert_dropout`
    is the probability with which a token does without an expert; and `capacity` lets each expert have, of a row, that many
    times its even share of tokens, the first ones or with `prioritised` those of the highest weights, and gives all others
    exactly 0 of it.

    The weighing's scores are what the softmax was taken of.
    """

    # the softmax or the choice that made a weight 0 passes no gradient on
    skips = True

    def __init__(
        self,
        num_inputs: int,
        num_experts: int,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        sums_to_one: bool = True,
        temperature: float = 1.0,
        noise: bool = False,
        expert_dropout: float = 0.0,
        capacity: float | None = None,
        prioritised: bool = False,
    ) -> None:
        if top_k is not None and top_p is not None:
            raise WeightingError(f"top_k is {top_k!r} and top_p {top_p!r}: choose by one of them, and leave the other None")
        super().__init__(num_experts, most=top_k)
        self.top_k = top_k
        self.top_p = top_p
        self.sums_to_one = sums_to_one
        self.temperature = temperature
        self.expert_dropout = expert_dropout
        self.capacity = capacity
        self.prioritised = prioritised
        self.r_EI = nn.Parameter(torch.empty(num_experts, num_inputs))
        self.n_EI = nn.Parameter(torch.empty(num_experts, num_inputs)) if noise else None

    def reset(self, generator: torch.Generator) -> None:
        """r_EI as torch draws a linear layer: uniform between -1/sqrt(I) and 1/sqrt(I); n_EI as 0."""
        bound = self.r_EI.shape[1] ** -0.5
        with torch.no_grad():
            self.r_EI.uniform_(-bound, bound, generator=generator)
            if self.n_EI is not None:
                self.n_EI.zero_()

    def forward(self, x_BTI: Tensor, call: Call) -> Weighing:
        x_BTI = x_BTI.to(self.r_EI.dtype)
        scores_BTE = functional.linear(x_BTI, self.r_EI)
        if self.temperature != 1.0:
            scores_BTE = scores_BTE / self.temperature
        if self.training and self.n_EI is not None:
            scores_BTE = noisy(scores_BTE, x_BTI @ self.n_EI.T)
        if self.training and self.expert_dropout:
            scores_BTE = without_some(scores_BTE, self.expert_dropout, self.top_k or 1)
        w_BTE = self._chosen(scores_BTE)
        if self.training and self.capacity is not None:
            real_BT = call.real_of(x_BTI)
            real_BT = x_BTI.new_ones(x_BTI.shape[:2], dtype=torch.bool) if real_BT is None else real_BT
            capacity_B = even_share(real_BT, self.num_experts, self.top_k or self.num_experts, self.capacity)
            w_BTE = within_capacity(w_BTE, capacity_B, real_BT, prioritised=self.prioritised)
        return Weighing(w_BTE, scores_BTE)

    def _chosen(self, scores_BTE: Tensor) -> Tensor:
        if self.top_p is not None:
            w_BTE = top_p_of_softmax(scores_BTE, self.top_p)
            return w_BTE / w_BTE.sum(dim=-1, keepdim=True) if self.sums_to_one else w_BTE
        if self.sums_to_one or self.top_k is None:
            return top_k_softmax(scores_BTE, self.top_k)
        return top_k_of_softmax(scores_BTE, self.top_k)
