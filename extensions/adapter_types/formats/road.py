"""RoAd (Liao and Monz 2024, arXiv 2409.00119): pairs of a layer's outputs are rotated and scaled."""

import torch
from torch import Tensor

from loraweave import AdapterCorrupt
from loraweave.extend.formats import Dense
from loraweave.extensions.adapter_types.formats._foreign import StoredLayer, peft_type


@peft_type("road_theta road_alpha", "variant group_size")
def road(layer: StoredLayer) -> Dense:
    """Return (R - 1) W and (R - 1) bias, R acting on pairs (o, o + g/2) within groups of g outputs."""
    num_out, group = layer.base.num_outputs, layer.config.count("group_size", 64)
    if num_out % group or group % 2:
        raise AdapterCorrupt(f"{layer.where}: groups of {group} do not divide its {num_out} outputs into pairs")
    own_O, other_O = _coefficients(layer, num_out, group)

    def change(rows: Tensor) -> Tensor:
        # a quarter turn: the halves (x, y) of each group become (-y, x)
        halves = rows.reshape(-1, 2, group // 2, rows.shape[1])
        partners = torch.stack([-halves[:, 1], halves[:, 0]], dim=1).reshape(rows.shape)
        return (own_O - 1)[:, None] * rows + other_O[:, None] * partners

    bias_O = layer.base.bias_O
    return Dense(change(layer.base.weight_OI), None if bias_O is None else change(bias_O[:, None])[:, 0])


def _coefficients(layer: StoredLayer, num_out: int, group: int) -> tuple[Tensor, Tensor]:
    """Return (alpha cos theta, alpha sin theta) per output, from one pair per rotation, output or matrix entry."""
    variant = layer.choice("variant", ("road_1", "road_2", "road_4"), "road_1")
    size = {"road_1": num_out // 2, "road_2": num_out, "road_4": 2 * num_out}[variant]
    theta, alpha = layer.part("road_theta", size), layer.part("road_alpha", size)
    if variant == "road_1":
        theta, alpha = (part.reshape(-1, group // 2).repeat_interleave(2, dim=0).flatten() for part in (theta, alpha))
    if variant != "road_4":
        return alpha * theta.cos(), alpha * theta.sin()
    theta, alpha = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
    return (alpha[:, 0] * theta[:, 0].cos()).flatten(), (alpha[:, 1] * theta[:, 1].sin()).flatten()
