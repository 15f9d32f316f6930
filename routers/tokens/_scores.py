"""Computations of routers: weights from scores, token by token, and experts' directions and cores from their factors."""

import ctypes
import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from loraweave.common import compute
from loraweave.hub.pool import ExpertPool
from loraweave.lowrank.algebra import orthonormal

# the softmax over each token's highest scores in one compiled call instead of four PyTorch calls
SOURCE = Path(__file__).with_name("top_k.c")
# comparisons a token: for this many, the library takes half of torch.topk's time for one token, and up to 1.4 times it for
# a thousand
MOST_COMPARED = 256


def top_k_softmax(scores_BTE: Tensor, top_k: int | None = None, temperature: float = 1.0) -> Tensor:
    """Return w_BTE: softmax(score / temperature) over each token's `top_k` highest scores (None: all), else 0; sums to 1.

    A score of -inf gets weight 0.
    """
    scores_BTE = scores_BTE / temperature if temperature != 1.0 else scores_BTE
    if top_k is None or top_k >= scores_BTE.shape[-1]:
        return scores_BTE.softmax(dim=-1)
    w_BTE = top_k_native(scores_BTE, top_k)
    if w_BTE is not None:
        return w_BTE
    best = scores_BTE.topk(top_k, dim=-1)
    return torch.zeros_like(scores_BTE).scatter_(-1, best.indices, best.values.softmax(dim=-1))


def top_k_native(scores_BTE: Tensor, top_k: int) -> Tensor | None:
    """Return w_BTE, softmax over each token's `top_k` highest scores, else 0, by compiled code; None if that cannot run.

    The decision depends on neither B nor T, so that a token's weights have the same bits in every batch.
    """
    if (
        scores_BTE.dtype is not torch.float32
        or scores_BTE.device.type != "cpu"
        or top_k * scores_BTE.shape[-1] > MOST_COMPARED
    ):
        return None
    if scores_BTE.requires_grad and torch.is_grad_enabled():
        return None
    if type(scores_BTE) is not Tensor or _is_traced() or (library := _library()) is None:
        return None
    scores_BTE = scores_BTE.contiguous()
    w_BTE = torch.empty_like(scores_BTE)
    num_experts = scores_BTE.shape[-1]
    num_tokens = scores_BTE.numel() // num_experts
    library.top_k_softmax(scores_BTE.data_ptr(), num_tokens, num_experts, top_k, w_BTE.data_ptr())
    return w_BTE


def _is_traced() -> bool:
    """Return True if torch traces or transforms operations, which it cannot do with calls of the compiled library."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._are_functorch_transforms_active() or compute.is_watched() > 0


_ARGUMENTS = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
_library = cache(partial(compute.library, SOURCE, {"top_k_softmax": (None, _ARGUMENTS)}, brief=True))


def top_p_of_softmax(scores_BTE: Tensor, top_p: float) -> Tensor:
    """Return w_BTE: softmax over all experts, kept for the fewest that sum to at least `top_p` (above 0, up to 1), else 0.

    The number of experts varies by token and is at least one (Huang et al. 2024, arXiv 2403.07652).
    """
    p_BTE = scores_BTE.softmax(dim=-1)
    if top_p >= 1:
        return p_BTE
    falling_BTE, order_BTE = p_BTE.detach().sort(dim=-1, descending=True, stable=True)
    # an expert is kept if the likelier experts do not reach top_p without it
    kept_BTE = functional.pad(falling_BTE.cumsum(dim=-1)[..., :-1], (1, 0)) < top_p
    return p_BTE * torch.zeros_like(kept_BTE).scatter(-1, order_BTE, kept_BTE)


def without(scores_BTE: Tensor, present: Sequence[int], filling: float = -math.inf) -> Tensor:
    """Return the scores with -inf, or another `filling`, for the experts whose indices are not in `present`."""
    if len(present) == scores_BTE.shape[-1]:
        return scores_BTE
    return scores_BTE.masked_fill(_absent(tuple(present), scores_BTE.shape[-1], scores_BTE.device), filling)


# sent to a device once
@lru_cache(maxsize=1024)
def _absent(present: tuple[int, ...], num_experts: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([place not in present for place in range(num_experts)], device=device)


def best_of(scores_BTE: Tensor, p_BTE: Tensor) -> Tensor:
    """Return w_BTE: exactly 1 for each token's highest score and 0 for the others, with the gradient of p_BTE."""
    chosen_BTE = functional.one_hot(scores_BTE.argmax(dim=-1), scores_BTE.shape[-1]).to(p_BTE.dtype)
    if not (torch.is_grad_enabled() and p_BTE.requires_grad):
        return chosen_BTE
    # the difference is 0, but for its gradient
    return chosen_BTE + (p_BTE - p_BTE.detach())


def factors_by_expert(pool: ExpertPool, layer: str) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (index, a_RI, b_OR) of each expert that has factors in the layer, in float64.

    Raises AdapterUnsupported for experts that need their base layer first (DoRA): use Composer.bound_pool, where they have
    it.
    """
    factors = pool.stacked(layer)
    for place in range(len(pool)):
        mine_S = factors.owner_S == place
        if bool(mine_S.any()):
            yield place, factors.a_SI[mine_S].double(), factors.b_OS[:, mine_S].double()


def top_direction(a_RI: Tensor, b_OR: Tensor) -> Tensor:
    """Return the top right singular vector v_I of b a, with its largest entry positive; zeros if b a is zero."""
    _, core_RR, p_IR = orthonormal(a_RI, b_OR)
    _, values_R, vectors_RR = torch.linalg.svd(core_RR, full_matrices=False)
    vectors_RI = (vectors_RR[values_R > 2.0**-18 * values_R.max()] @ p_IR.T).to(a_RI.dtype)
    v_I: Tensor = vectors_RI[0] if len(vectors_RI) else a_RI.new_zeros(a_RI.shape[1])
    return v_I * v_I[v_I.abs().argmax()].sign()


def power_iteration(a_RI: Tensor, b_OR: Tensor, start_I: Tensor, steps: int) -> Tensor:
    """Return v_I after `steps` steps v <- a^T (b^T b) (a v), each made a unit vector, in fp32 like PEFT's Arrow.

    Where the two largest singular values are close, this is not the top right singular vector yet.
    """
    a_RI, b_OR = a_RI.float(), b_OR.float()
    gram_RR = b_OR.T @ b_OR
    v_I: Tensor = start_I / (start_I.norm() + 1e-8)
    for _ in range(steps):
        v_I = a_RI.T @ (gram_RR @ (a_RI @ v_I))
        v_I = v_I / (v_I.norm() + 1e-8)
    return v_I
