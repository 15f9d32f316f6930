"""From scores to weights: a softmax over the few best experts, each token for itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.common.checks import is_whole
from loraweave.common.display import tracked
from loraweave.errors import ScopeError, WeightingError
from loraweave.hub.pool import ExpertPool


def top_k_softmax(scores_BTE: Tensor, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """w_BTE: softmax(score / temperature) over the `top_k` highest scores of each token, 0 for the others; sums to 1.

    A score of -inf takes no part. None is all experts.
    """
    scores_BTE = scores_BTE / temperature if temperature != 1.0 else scores_BTE
    if top_k is None or top_k >= scores_BTE.shape[-1]:
        return scores_BTE.softmax(dim=-1)
    best = scores_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(scores_BTE).scatter_(-1, best.indices, best.values.softmax(dim=-1))


def without(scores_BTE: Tensor, present: Sequence[int], filling: float = -math.inf) -> Tensor:
    """The scores with -inf, or another `filling`, for the experts whose places are not in `present`."""
    if len(present) == scores_BTE.shape[-1]:
        return scores_BTE
    return scores_BTE.masked_fill(_absent(tuple(present), scores_BTE.shape[-1], scores_BTE.device), filling)


# sent to a device once
@lru_cache(maxsize=1024)
def _absent(present: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([place not in present for place in range(num_experts)], device=device)


def straight_through(scores_BTE: Tensor) -> Tensor:
    """w_BTE: exactly 1 for each token's highest score and 0 for the others, with the gradient of softmax(scores)."""
    return best_of(scores_BTE, scores_BTE.softmax(dim=-1))


def best_of(scores_BTE: Tensor, p_BTE: Tensor) -> Tensor:
    """w_BTE: exactly 1 for each token's highest score and 0 for the others, with the gradient of p_BTE."""
    chosen_BTE = functional.one_hot(scores_BTE.argmax(dim=-1), scores_BTE.shape[-1]).to(p_BTE.dtype)
    if not (torch.is_grad_enabled() and p_BTE.requires_grad):
        return chosen_BTE
    # the difference is 0, but for its gradient
    return chosen_BTE + (p_BTE - p_BTE.detach())


def require_top_k(router: str, top_k: int | None, num_experts: int, *, option: str = "top_k") -> None:
    """Raises WeightingError for a top_k, or another option, that is no number of the pool's experts."""
    if top_k is not None and not (is_whole(top_k, 1) and top_k <= num_experts):
        raise WeightingError(
            f"{option} of router {router!r} is {top_k!r}, but the pool has {num_experts} experts; it is a whole number "
            "from 1 to that, or None for the default"
        )


def require_temperature(router: str, temperature: float) -> None:
    """Raises WeightingError for a temperature that is not finite and above 0."""
    # NaN and infinity too
    is_number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    if not (is_number and 0 < temperature < math.inf):
        raise WeightingError(
            f"temperature of router {router!r} is {temperature!r}; it must be above 0: small values choose one expert, "
            "large ones weigh all alike"
        )


def sparsegen(scores_BTE: Tensor, lambda_BT1: Tensor) -> Tensor:
    """p_BTE = argmin over the simplex of |p - u|^2 - lambda |p|^2 for the scores u, with a lambda below 1.

    p = max(u - tau, 0) / (1 - lambda), with the tau that makes it sum to 1: lambda = 0 is sparsemax, towards 1 the highest
    score gets all, towards -inf all get alike. Scores of -inf get 0. Gradients reach scores and lambda.
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
    """The least lambda_BT1 with which at most so many shares are above 0: 1 - sum over the highest u of (u - next u).

    -inf where no more scores than that are finite.
    """
    best_BTK = scores_BTE.topk(num_shares + 1, dim=-1).values
    gaps_BTK = (best_BTK[..., :-1] - best_BTK[..., -1:]).nan_to_num(nan=0.0, posinf=math.inf)
    return 1 - gaps_BTK.sum(dim=-1, keepdim=True)


def parts(pool: ExpertPool, layer: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(place, a_RI, b_OR) of each expert that has factors in the layer, in float64.

    Raises AdapterUnsupported for experts that need their base layer first (DoRA): Composer.bound_pool has them resolved.
    """
    factors = pool.stacked(layer)
    for place in range(len(pool)):
        mine_S = factors.owner_S == place
        if bool(mine_S.any()):
            yield place, factors.a_SI[mine_S].double(), factors.b_OS[:, mine_S].double()


def core(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """c_RI with |c x| = |b a x| for every x: b = q r with orthonormal q, and c = r a."""
    r_RR: Tensor = torch.linalg.qr(b_OR).R
    return r_RR @ a_RI


def top_direction(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """The top right singular vector v_I of b a, the sign being that of its largest entry; zero where b a is."""
    _, values_R, vectors_RI = torch.linalg.svd(core(a_RI, b_OR), full_matrices=False)
    v_I: Tensor = vectors_RI[0]
    sign = v_I[v_I.abs().argmax()].sign()
    return v_I.mul(sign).mul(values_R[0] > 0)


def power_iteration(a_RI: Tensor, b_OR: Tensor, start_I: Tensor, steps: int) -> Tensor:
    """v_I after `steps` steps v <- a^T (b^T b) (a v), each made a unit vector, in fp32 like PEFT's Arrow.

    Where the two largest singular values are close, this is not the top right singular vector yet.
    """
    a_RI, b_OR = a_RI.float(), b_OR.float()
    gram_RR = b_OR.T @ b_OR
    v_I: Tensor = start_I / (start_I.norm() + 1e-8)
    for _ in range(steps):
        v_I = a_RI.T @ (gram_RR @ (a_RI @ v_I))
        v_I = v_I / (v_I.norm() + 1e-8)
    return v_I


class RunningSums:
    """For the tokens in a cache, beside it (`BesideCache[RunningSums]`): which are real, real_BT, and each layer's sums_BTE.

    Token t's sum is over the real tokens up to t, so that tokens can be taken back. A layer that a call did not reach has
    fewer tokens than the others.
    """

    def __init__(self, real_BT: Tensor) -> None:
        self.real_BT = real_BT
        self.sums: dict[str, Tensor] = {}

    def last(self) -> dict[str, Tensor]:
        """{layer: sum_B1E over all tokens}, of the layers that have seen them all."""
        num_tokens = self.get_seq_length()
        return {layer: s_BTE[:, -1:] for layer, s_BTE in self.sums.items() if num_tokens and s_BTE.shape[1] == num_tokens}

    def append(self, real_BT: Tensor) -> None:
        self.real_BT = torch.cat([self.real_BT, real_BT.to(self.real_BT.device)], dim=1)

    def put(self, layer: str, sums_BTE: Tensor) -> None:
        """The sums of the last T tokens."""
        num_before, known_BTE = self.get_seq_length() - sums_BTE.shape[1], self.sums.get(layer)
        new_BTE = sums_BTE.detach()
        self.sums[layer] = new_BTE if known_BTE is None else torch.cat([known_BTE[:, :num_before], new_BTE], dim=1)

    def get_seq_length(self) -> int:
        return self.real_BT.shape[1]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def crop(self, tokens_to_remove: int) -> None:
        num_left = self.get_seq_length() - abs(tokens_to_remove)
        self._change(lambda tensor: tensor[:, :num_left])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        self._change(lambda tensor: tensor[:, :0])

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        self.real_BT = change(self.real_BT)
        self.sums = {layer: change(s_BTE) for layer, s_BTE in self.sums.items()}


def input_means(
    engine: Any, texts: Mapping[str, Sequence[str]], layers: Mapping[str, Sequence[int]], *, progress: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(expert, {layer: mean_I}) over all tokens of the expert's texts, with that expert at weight 1, in float64.

    `layers` says which experts, by their places, update each. Text by text, so that no padding is among the tokens. Raises
    ScopeError for a layer that is not called with one vector a token.
    """
    modules = dict(engine.model.named_modules())
    places = engine.pool.places
    for name in tracked(texts, "reading inputs", total=len(texts), shown=progress):
        own = {layer: modules[layer] for layer, experts in layers.items() if places[name] in experts}
        sums = {layer: _Sum(layer) for layer in own}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(engine.activate({name: 1.0}))
            for layer, module in own.items():
                handle = module.register_forward_pre_hook(sums[layer])
                stack.callback(handle.remove)
            for text in texts[name]:
                ids_BT = torch.tensor([engine.tokenizer(text)["input_ids"]], device=engine.model.device)
                engine.model(input_ids=ids_BT)
        yield name, {layer: found.mean for layer, found in sums.items()}


class _Sum:
    """A hook that adds up the inputs of one layer."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._total: Tensor | None = None
        self._count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not x.is_floating_point() or x.ndim not in (2, 3):
            raise ScopeError(
                f"layer {self._layer!r} ({type(module).__name__}) is called with {x.dtype} of shape {tuple(x.shape)}, and "
                "not with one vector for each token, of which there would be a mean: leave out the adapters that update it"
            )
        total_I = x.detach().double().reshape(-1, x.shape[-1]).sum(dim=0)
        self._total = total_I if self._total is None else self._total + total_I
        self._count += x.numel() // x.shape[-1]

    @property
    def mean(self) -> Tensor:
        if self._total is None:
            raise ScopeError(f"layer {self._layer!r} never ran on the texts, so that its inputs have no mean")
        return self._total / self._count
