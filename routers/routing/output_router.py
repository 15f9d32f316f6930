"""The form of learned routers that look at what the experts would add to a token, which is never formed."""

from __future__ import annotations

import torch
from torch import Tensor

from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.layer_tensors import LayerTensors
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.routers.routing.members import Members, RoutedLayer
from loraweave.routers.routing.spectrum import parts


class OutputRouter(LearnedRouter):
    """Knows E_e(x) = b_e a_e x of each layer as S numbers a token: with b = q r, these are z = r a x, and E_e(x) = q z.

    The columns of q of one expert are orthonormal, so that its z is as long as E_e(x). Gains and biases of experts take no
    part: E_e(x) is the update of low rank alone. The router keeps a copy of its experts' factors, and is as large as they
    are when it is saved. A subclass has parameters for the `informed` layers; made of `Members`, for those in its file.

    Raises AdapterUnsupported for experts that need their base layer first (DoRA): Composer.bound_pool has them resolved.
    """

    def __init__(self, pool: ExpertPool | Members) -> None:
        super().__init__(pool)
        # rows of experts: r a, the columns of q, and whose each row is
        self.cores_ = LayerTensors({})
        self.bases_ = LayerTensors({})
        self.owners_ = LayerTensors({})
        if isinstance(pool, ExpertPool):
            for layer, routed in self.members.layers.items():
                self.cores_[layer], self.bases_[layer], self.owners_[layer] = _rows(pool, layer, routed)

    @property
    def informed(self) -> dict[str, RoutedLayer]:
        """The layers with outputs to look at: all but those whose experts have gains or biases alone."""
        return {layer: self.members.layers[layer] for layer in self.cores_ if len(self.cores_[layer])}

    def latents(self, x_BTI: Tensor, layer: str) -> Tensor:
        """z_BTS: the outputs of the layer's experts in the coordinates of their bases."""
        c_SI = self.cores_[layer]
        if not len(c_SI):
            # a layer with trained biases alone does not say how many inputs it has
            return c_SI.new_zeros(*x_BTI.shape[:2], 0)
        return x_BTI.to(c_SI.dtype) @ c_SI.T

    def by_expert(self, values_BTS: Tensor, layer: str) -> Tensor:
        """The sums over each expert's rows, (B, T, E)."""
        zeros_BTE = values_BTS.new_zeros(*values_BTS.shape[:2], len(self.experts))
        return zeros_BTE.index_add(2, self.owners_[layer], values_BTS)


def _rows(pool: ExpertPool, layer: str, routed: RoutedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """c_SI, q_SO and owner_S of one layer; an expert of more rank than outputs has as many rows as outputs."""
    cores, bases, owners = [torch.zeros(0, routed.num_inputs)], [torch.zeros(0, routed.num_outputs)], []
    for place, a_RI, b_OR in parts(pool, layer):
        q_OQ, r_QR = torch.linalg.qr(b_OR)
        cores.append((r_QR @ a_RI).float())
        bases.append(q_OQ.T.float())
        owners += [place] * q_OQ.shape[1]
    return torch.cat(cores), torch.cat(bases), torch.tensor(owners, dtype=torch.long)
