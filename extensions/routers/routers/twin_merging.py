"""Twin-Merging (Lu et al., NeurIPS 2024, arXiv 2406.15479), with a logistic regression as its router in place of an MLP."""

from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from loraweave import ExpertPool, Hub, WeightingError
from loraweave.extend import DEFAULT_TEMPLATE, Positive, unknown_expert
from loraweave.extend.routing import Logistic, Members


class TwinMerging(Logistic):
    """A router with w = 1 for the expert `shared`, and p = softmax(W u + b) of a text's vector u for all other experts.

    It is for a pool of `twin_merging(pool, shared)` of the extension `methods`, so that a layer's update is S + sum over t
    of p_t cut(D_t - S), S being the shared update and D_t those of the experts. Without a cut this is sum of p_t D_t,
    whatever S.

    W and b are fitted as by router `logistic`, whose other options these are; the published router is a trained perceptron
    of three layers on the shared model's last hidden state.

    Raises UnknownExpert if the pool has no `shared`, WeightingError if it has nothing else or experts lack examples.
    """

    # the shared part has no row
    by_expert: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        pool: ExpertPool | Members,
        *,
        shared: str = "shared",
        examples: Mapping[str, Iterable[str]] | Hub | None = None,
        embedder: str = "sentence",
        inverse_penalty: Positive = 10.0,
        template: str | None = DEFAULT_TEMPLATE,
    ) -> None:
        if shared not in pool.names:
            raise unknown_expert(shared, pool.names)
        if len(pool.names) == 1:
            raise WeightingError(
                f"the pool has the shared part {shared!r} alone: twin_merging() makes one with exclusive parts"
            )
        self.shared = shared
        super().__init__(
            pool,
            examples=examples,
            embedder=embedder,
            form="probabilities",
            inverse_penalty=inverse_penalty,
            template=template,
        )

    @property
    def chosen(self) -> tuple[str, ...]:
        return tuple(name for name in self.experts if name != self.shared)

    def weights_of(self, vectors_ND: Tensor) -> Tensor:
        p_NT = super().weights_of(vectors_ND)
        place = self.members.places[self.shared]
        one_N1 = torch.ones_like(p_NT[:, :1])
        return torch.cat([p_NT[:, :place], one_N1, p_NT[:, place:]], dim=1)
