"""Routers that know the experts' own outputs, by few numbers for each expert and layer."""

import torch
from torch import Tensor

from loraweave import ExpertPool
from loraweave.extend.routing import LayerTensors, LearnedRouter, Members, RoutedLayer, factors_by_expert


class OutputRouter(LearnedRouter):
    """A router that knows each expert's output E_e(x) = b_e a_e x by few numbers: with b = q r, E_e(x) = q z and z = r a x.

    The columns of q of one expert are orthonormal, so that its z is as long as E_e(x). Gains and biases of experts are
    ignored: E_e(x) is the update of low rank alone. The router keeps a copy of its experts' factors, so it is saved with as
    many bytes. A subclass has parameters for the `informed` layers; made of `Members`, for the layers in its file. Raises
    AdapterUnsupported for experts that need their base layer first (DoRA): Composer.bound_pool has them resolved.
    """

    def __init__(self, pool: ExpertPool | Members) -> None:
        super().__init__(pool)
        # by layer, a row for each row of z: of r a, of q^T, and the owner's index
        self.cores_ = LayerTensors({})
        self.bases_ = LayerTensors({})
        self.owners_ = LayerTensors({})
        if (expert_pool := Members.pool_of(pool)) is not None:
            for layer, routed in self.members.layers.items():
                self.cores_[layer], self.bases_[layer], self.owners_[layer] = output_factors(expert_pool, layer, routed)

    @property
    def informed(self) -> dict[str, RoutedLayer]:
        """The layers with outputs to score, which excludes layers whose experts have only gains or biases."""
        return {layer: self.members.layers[layer] for layer in self.cores_ if len(self.cores_[layer])}

    def latents(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return z_BTS: the outputs of the layer's experts in the coordinates of their bases."""
        c_SI = self.cores_[layer]
        if not len(c_SI):
            # a layer with trained biases alone does not say how many inputs it has
            return c_SI.new_zeros(*x_BTI.shape[:2], 0)
        return x_BTI.to(c_SI.dtype) @ c_SI.T

    def by_expert(self, values_BTS: Tensor, layer: str) -> Tensor:
        """Sum values_BTS over the rank rows of each expert; return (B, T, E)."""
        zeros_BTE = values_BTS.new_zeros(*values_BTS.shape[:2], len(self.experts))
        return zeros_BTE.index_add(2, self.owners_[layer], values_BTS)


def output_factors(pool: ExpertPool, layer: str, routed: RoutedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Return c_SI = r a, q_SO with the columns of q as rows, and owner_S, the index of each row's expert, where b = q r.

    An expert with a rank above O has O rows.
    """
    cores, bases, owners = [torch.zeros(0, routed.num_inputs)], [torch.zeros(0, routed.num_outputs)], []
    for place, a_RI, b_OR in factors_by_expert(pool, layer):
        q_OQ, r_QR = torch.linalg.qr(b_OR)
        cores.append((r_QR @ a_RI).float())
        bases.append(q_OQ.T.float())
        owners += [place] * q_OQ.shape[1]
    return torch.cat(cores), torch.cat(bases), torch.tensor(owners, dtype=torch.long)
