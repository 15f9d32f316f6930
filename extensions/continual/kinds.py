"""Kinds of jobs that train adapters for later sums: to first order around a start, or beside a frozen adapter."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loraweave import Adapter, Factors, LayerMismatch, TrainingError
from loraweave.extend.training import JobKind, LoraJob, LowRank, given_factors, require_plain

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Linearized(JobKind):
    """Jobs that train to first order around their start (L-LoRA, arXiv 2310.04742); new jobs share one frozen a.

    `train_adapters(..., kind=Linearized())`; for a task with a start, `tangent(adapter, start)` is its learned update.
    """

    linearized: ClassVar[bool] = True

    def make(self, name: str, pairs: Pairs, scale: float) -> LoraJob:
        """Return a job that begins with these factors."""
        return LinearizedJob(name, pairs, scale)


@dataclass(frozen=True)
class Beside(JobKind):
    """Jobs that learn beside a frozen `adapter`, from the part of a layer's inputs that its a does not read (`BesideJob`).

    `train_adapters(..., kind=Beside(adapter))`, without a start.
    """

    adapter: Adapter

    def require(self, model: Any, start: Collection[str]) -> None:
        """Raise TrainingError for a start, and unless `adapter` is an Adapter that could itself be trained further."""
        if start:
            raise TrainingError("beside is for new adapters that are trained apart, so start must be left out")
        if not isinstance(self.adapter, Adapter):
            raise TrainingError(f"nothing can be trained beside {self.adapter!r:.60}: pass an Adapter")
        require_plain(model, {"nothing can be trained beside": self.adapter})

    def make(self, name: str, pairs: Pairs, scale: float) -> LoraJob:
        """Return a job that begins with these factors."""
        return BesideJob(name, pairs, scale, self.adapter.layers)

    def recipe(self) -> dict[str, Any]:
        """Return the hash and name of the frozen adapter, as {"beside": ..}."""
        return {"beside": {"hash": self.adapter.hash, "name": self.adapter.name}}

    def identity(self) -> list[str]:
        """Return the hash of the frozen adapter, in a list."""
        return [self.adapter.hash]


class LinearizedJob(LoraJob):
    """A job in which each layer's update is the tangent at its beginning (a0, b0): s (b a0 + b0 (a - a0)) x.

    The base stays as nonlinear as it is; only the adapter is linearised, layer by layer, so that updates learned from a
    common beginning add up exactly in each layer. Where b0 = 0 the update is s b a0, and a is not trained.
    """

    def __init__(self, name: str, factors: Pairs, scale: float) -> None:
        super().__init__(name, factors, scale)
        self.origin = {layer: (a.detach().clone(), b.detach().clone()) for layer, (a, b) in self.factors.items()}
        for layer, (a_RI, _) in self.factors.items():
            # nothing of a reaches the output where b0 is 0
            a_RI.requires_grad_(bool(self.origin[layer][1].any()))

    def low_rank(self, layer: str) -> LowRank:
        """Return the update as one pair of factors: b a0, and if b0 is not 0 also b0 (a - a0), which doubles the rank."""
        a_RI, b_OR = self.factors[layer]
        a0_RI, b0_OR = self.origin[layer]
        if not a_RI.requires_grad:
            return LowRank(a0_RI, b_OR, self.scale)
        return LowRank(torch.cat([a0_RI, a_RI - a0_RI]), torch.cat([b_OR, b0_OR], dim=1), self.scale)


class BesideJob(LoraJob):
    """A job beside a frozen adapter, on the part of a layer's inputs that it ignores: y += b0 a0 x + s b a (I - q q^T) x.

    q_IQ is an orthonormal basis of the rows of a0, so that the two updates have orthogonal row spaces, and sums of such jobs
    repeat nothing of a0's: the hard form of Orthogonal Subspace Decomposition (Su et al. 2026, arXiv 2604.26768). We read
    only parts of its text; that the projection is within the loss, and on the inputs' side, is our choice.
    """

    def __init__(self, name: str, factors: Pairs, scale: float, beside: Mapping[str, Factors]) -> None:
        super().__init__(name, factors, scale)
        device = next(iter(self.factors.values()))[0].device
        self._beside = given_factors(beside, scale=scale, device=device)
        shared = self._beside.keys() & self.factors.keys()
        self._basis = {layer: torch.linalg.qr(self._beside[layer][0].T).Q for layer in shared}
        if full := [layer for layer, q_IQ in self._basis.items() if q_IQ.shape[1] == len(q_IQ)]:
            raise TrainingError(
                f"job {name!r} has nowhere to learn in layer {full[0]!r}: the adapter beside it reads all "
                f"{len(self._basis[full[0]])} directions of its inputs; give one of a lower rank"
            )

    @property
    def layers(self) -> Collection[str]:
        return {**self._beside, **self.factors}.keys()

    def low_rank(self, layer: str) -> LowRank:
        """Return the frozen update and the job's own as one pair of factors."""
        pairs = [self._beside[layer]] if layer in self._beside else []
        if layer in self.factors:
            pairs.append((self._projected(layer), self.factors[layer][1]))
        a_RI, b_OR = (torch.cat(parts, dim=side) for side, parts in enumerate(zip(*pairs, strict=True)))
        return LowRank(a_RI, b_OR, self.scale)

    def result(self) -> dict[str, Factors]:
        """Return the job's update, {layer: factors}, without the frozen adapter's."""
        return {
            layer: Factors(self._projected(layer).detach().cpu(), (b_OR.detach().cpu() * self.scale).contiguous())
            for layer, (_, b_OR) in self.factors.items()
        }

    def _projected(self, layer: str) -> Tensor:
        a_RI, q_IQ = self.factors[layer][0], self._basis.get(layer)
        return a_RI.clone() if q_IQ is None else a_RI - (a_RI @ q_IQ) @ q_IQ.T


def tangent(adapter: Adapter, start: Adapter) -> Adapter:
    """Return phi - phi0 of L-LoRA as an update: (b - b0) a0 + b0 (a - a0), exactly, of at most twice the start's rank.

    `adapter` comes from `train_adapters(..., kind=Linearized(), start={...: start})`. In a pool of `start` and the tangents
    of several such adapters, the mixture of start at 1 and of tangents at weights l_e is, in each layer, the linearised
    model at phi0 + sum of l_e (phi_e - phi0). An adapter trained without a start is its own tangent.

    Raises LayerMismatch for an adapter that was not trained that way.
    """
    if list(adapter.layers) != list(start.layers):
        raise LayerMismatch(f"adapter {adapter.name!r} has other layers than {start.name!r}, so it did not start from it")
    return replace(adapter, layers={layer: _tangent(layer, adapter, start) for layer in adapter.layers})


def _tangent(layer: str, adapter: Adapter, start: Adapter) -> Factors:
    learned, its = adapter.layers[layer], start.layers[layer]
    rank = its.rank
    moved = bool(its.b_OR.any())
    if learned.rank != rank * (1 + moved) or not torch.equal(learned.a_RI[:rank], its.a_RI.float()):
        raise LayerMismatch(
            f"adapter {adapter.name!r} is not a linearised training of {start.name!r}: in layer {layer!r} its first "
            f"{rank} rows of a are not those it would have begun from; pass kind=Linearized() to train_adapters"
        )
    if not moved:
        return learned
    return replace(learned, b_OR=torch.cat([learned.b_OR[:, :rank] - its.b_OR, learned.b_OR[:, rank:]], dim=1))
