"""The algebra of low-rank updates: pure functions on factors that never form the dense delta unless asked to.

A layer's update is D = b a (+ a gain and a bias). Sums concatenate ranks, inner products and norms need only R x R
matrices, or dense ones where those are smaller: never more memory than the factors have. Reductions run in float64.
`compress` is in a file of its own, `truncation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loraweave.errors import AdapterSuspicious, AdapterUnsupported, LayerMismatch
from loraweave.lowrank.truncation import compress as compress
from loraweave.types import Factors

MAX_FP32 = torch.finfo(torch.float32).max


def delta(factors: Factors) -> Tensor:
    """Return the dense update b a as (O, I), fp32. Raises AdapterUnsupported where the update is no matrix of its own."""
    _require_bound(factors)
    if factors.gain_O is not None:
        raise AdapterUnsupported("an update with a gain (DoRA, (IA)3) has no dense delta apart from the base weight")
    return factors.b_OR.float() @ factors.a_RI.float()


def bind(factors: Factors, weight_OI: Tensor, bias_O: Tensor | None) -> Factors:
    """Resolve what depends on the base layer, and return the same update without it.

    DoRA (Liu et al. 2024, eq. 5) with m = magnitude: y = m/|W + b a| * (W + b a) x, hence gain = m/|W + b a| - 1 and b is
    scaled by 1 + gain. A trained bias becomes its difference to the base's.
    """
    if factors.bound:
        return factors
    b_OR, gain_O, extra_O = factors.b_OR, factors.gain_O, factors.bias_O
    if factors.magnitude_O is not None:
        dense_OI = weight_OI.double() + factors.b_OR.double() @ factors.a_RI.double()
        norm_O = dense_OI.norm(dim=1)
        if not bool(norm_O.all()):
            row = int((norm_O == 0).nonzero()[0])
            raise AdapterUnsupported(f"DoRA divides by the norm of W + b a, which is 0 in row {row} of this base's weight")
        ratio_O = factors.magnitude_O.double() / norm_O
        gain_O = (ratio_O - 1).float()
        b_OR = (factors.b_OR.double() * ratio_O[:, None]).float()
    if factors.base_bias_O is not None:
        base_O = torch.zeros_like(factors.base_bias_O) if bias_O is None else bias_O.float()
        difference_O = factors.base_bias_O - base_O
        extra_O = difference_O if extra_O is None else extra_O + difference_O
    return replace(factors, b_OR=b_OR, gain_O=gain_O, bias_O=extra_O, magnitude_O=None, base_bias_O=None)


def unbind(factors: Factors, weight_OI: Tensor) -> Factors:
    """Return the update with DoRA's magnitude instead of its gain, to be bound to the same base again.

    With r = 1 + gain, b is divided by r, and m = r |W + b a|. Raises AdapterUnsupported where r is 0 in a row of b that is
    not, which no magnitude expresses.
    """
    gain_O = torch.zeros(factors.b_OR.shape[0]) if factors.gain_O is None else factors.gain_O
    ratio_O = 1 + gain_O.double()
    gone_O = ratio_O == 0
    if bool(factors.b_OR[gone_O].any()):
        row = int((gone_O & factors.b_OR.any(dim=1)).nonzero()[0])
        raise AdapterUnsupported(f"the gain is -1 in row {row}, whose update is not zero: DoRA has no magnitude for that")
    b_OR = (factors.b_OR.double() / torch.where(gone_O, 1.0, ratio_O)[:, None]).float()
    norm_O = (weight_OI.double() + b_OR.double() @ factors.a_RI.double()).norm(dim=1)
    return replace(factors, b_OR=b_OR, gain_O=None, magnitude_O=(ratio_O * norm_O).float())


def scale(factors: Factors, weight: float) -> Factors:
    """Return weight * update, `factors` for 1. The weight goes onto b alone: on both factors it would count twice."""
    if weight == 1.0:
        return factors
    _require_bound(factors)
    return replace(
        factors,
        b_OR=factors.b_OR * weight,
        gain_O=None if factors.gain_O is None else factors.gain_O * weight,
        bias_O=None if factors.bias_O is None else factors.bias_O * weight,
    )


def negate(factors: Factors) -> Factors:
    """Return -update: exactly one factor changes its sign, since flipping both is the identity."""
    return scale(factors, -1.0)


def add(terms: Sequence[Factors]) -> Factors:
    """Return the exact sum of updates; ranks add up (concatenation). The sum of one update is itself."""
    first = terms[0]
    if len(terms) == 1:
        return first
    require_alike(terms)
    return replace(
        first,
        a_RI=torch.cat([term.a_RI for term in terms], dim=0),
        b_OR=torch.cat([term.b_OR for term in terms], dim=1),
        gain_O=_sum_present([term.gain_O for term in terms]),
        bias_O=_sum_present([term.bias_O for term in terms]),
    )


def require_alike(terms: Sequence[Factors]) -> None:
    """Raise AdapterUnsupported unless all are bound, LayerMismatch unless all have one shape and kind."""
    for term in terms:
        _require_bound(term)
        if _signature(term) != _signature(terms[0]):
            raise LayerMismatch(
                f"cannot add updates of a layer with (O, I, kind) {_signature(term)} and {_signature(terms[0])}"
            )


def inner(left: Factors, right: Factors) -> float:
    """Return <D_left, D_right> = tr(D_left^T D_right), from a a^T and b^T b (both R x R), or from D if that is smaller."""
    if left.rank * right.rank > left.b_OR.shape[0] * left.a_RI.shape[1]:
        delta_OI = left.b_OR.double() @ left.a_RI.double()
        other_OI = delta_OI if left is right else right.b_OR.double() @ right.a_RI.double()
        return float((delta_OI * other_OI).sum())
    b_RR = left.b_OR.double().T @ right.b_OR.double()
    a_RR = left.a_RI.double() @ right.a_RI.double().T
    return float((b_RR * a_RR).sum())


def norm(factors: Factors) -> float:
    """Return the Frobenius norm of b a."""
    # rounding can leave a square that is zero slightly below it
    return float(max(inner(factors, factors), 0.0) ** 0.5)


def orthonormal(a_RI: Tensor, b_OR: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (q_OR, core_RR, p_IR) with b a = q core p^T, the columns of q and of p orthonormal; float64."""
    p_IR, right_RR = torch.linalg.qr(a_RI.double().T)
    q_OR, left_RR = torch.linalg.qr(b_OR.double())
    return q_OR, left_RR @ right_RR.T, p_IR


def within_sides(factors: Factors) -> Factors:
    """Return the update at a rank of at most min(O, I): above, one factor is the identity, the other b a, in float64."""
    num_out, num_in = factors.b_OR.shape[0], factors.a_RI.shape[1]
    if factors.rank <= min(num_out, num_in):
        return factors
    delta_OI = factors.b_OR.double() @ factors.a_RI.double()
    if num_out <= num_in:
        return replace(factors, a_RI=delta_OI, b_OR=torch.eye(num_out, dtype=torch.float64))
    return replace(factors, a_RI=torch.eye(num_in, dtype=torch.float64), b_OR=delta_OI)


def require_in_range(factors: Factors, where: str) -> None:
    """Raise AdapterSuspicious if a term of b a, or a sum of its terms on the way, can be beyond what fp32 holds."""
    # by Cauchy and Schwarz, the product of the Frobenius norms bounds the reach, and takes a fifth of the time
    if float(torch.linalg.vector_norm(factors.b_OR)) * float(torch.linalg.vector_norm(factors.a_RI)) <= MAX_FP32:
        return
    b_R = torch.linalg.vector_norm(factors.b_OR.detach().float(), torch.inf, dim=0).double()
    a_R = torch.linalg.vector_norm(factors.a_RI.detach().float(), torch.inf, dim=1).double()
    reach = float(b_R @ a_R)
    if reach > MAX_FP32:
        raise AdapterSuspicious(
            f"{where}: the product of its factors reaches {reach:.3g}, beyond what fp32 holds ({MAX_FP32:.3g}), so no "
            "composition with it would be a number; look at how it was trained, saved and scaled (lora_alpha)"
        )


def within_range(tensors: Iterable[Tensor]) -> bool:
    """Return whether all values, and all products and sums of products of two tensors, are surely finite in fp32.

    By Cauchy and Schwarz the norm of all together bounds them, which takes one pass; tensors that fill one memory, as those
    read from a file do, are one vector. False says only that each has to be looked at; so do tensors of whole numbers.
    """
    by_memory: dict[tuple[int, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if not tensor.is_floating_point():
            return False
        by_memory.setdefault((tensor.untyped_storage().data_ptr(), tensor.dtype), []).append(tensor.detach())
    total = 0.0
    for parts in by_memory.values():
        memory = parts[0].untyped_storage()
        if len(parts) > 1 and memory.nbytes() <= sum(part.nbytes for part in parts):
            parts = [parts[0].new_empty(0).set_(memory)]  # type: ignore[call-overload]
        total += sum(float(torch.linalg.vector_norm(part)) ** 2 for part in parts)
    # it bounds |a| |b| of any two tensors, the same numbers counted in both or not
    return total <= MAX_FP32


def all_finite(tensor: Tensor) -> bool:
    """Return whether no value is NaN or infinite."""
    # either would be in the sum too, and a sum takes a tenth of the time
    return math.isfinite(float(tensor.detach().sum())) or bool(torch.isfinite(tensor).all())


def on_host(tensor: Tensor) -> Tensor:
    """Return the tensor for storage: detached, fp32, in this machine's memory; itself if it is all that already."""
    # three calls that do nothing take longer than this question, and an adapter has hundreds of tensors
    if tensor.dtype is torch.float32 and tensor.is_cpu and not tensor.requires_grad:
        return tensor
    return tensor.detach().cpu().float()


def is_zero(factors: Factors) -> bool:
    """Return whether the update leaves every output alone; unbound parts count as an effect."""
    if not factors.bound:
        return False
    rest = [part for part in (factors.gain_O, factors.bias_O) if part is not None]
    return norm(factors) == 0.0 and not any(bool(part.any()) for part in rest)


def _signature(factors: Factors) -> tuple[int, int, str, tuple[int, ...]]:
    return factors.b_OR.shape[0], factors.a_RI.shape[1], factors.kind, factors.kernel


def _sum_present(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.stack(present).sum(dim=0) if present else None


def _require_bound(factors: Factors) -> None:
    if not factors.bound:
        feature = "DoRA's magnitude" if factors.magnitude_O is not None else "a trained base bias"
        raise AdapterUnsupported(f"{feature} needs the base layer: bind the adapter to its model first (Composer does)")
