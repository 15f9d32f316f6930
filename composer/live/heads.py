"""Trained heads as updates: a head that replaces a weight W by W' adds (W' - W) x, in factors of rank min(O, I).

So a head mixes as every other update does: with weight 1 alone it is the head, each row of a batch may have its own, and
several add up their differences to the base's. Its memory is one more matrix of W's shape, fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.composer.model.kinds import embedding, linear
from loraweave.errors import AdapterUnsupported, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors


@torch.no_grad()
def head_layers(name: str, adapter: Adapter, modules: Mapping[str, nn.Module]) -> dict[str, Factors]:
    """The adapter's heads as factors by module path; `modules` is the base's named_modules(), with the base's own weights.

    Raises LayerMismatch for a parameter that the model lacks or that has another shape, AdapterUnsupported for a head of
    another kind of module than linear and embedding, and for a module that has both a head and an update.
    """
    heads: dict[str, dict[str, Tensor]] = {}
    for parameter, tensor in adapter.heads.items():
        module, _, attribute = parameter.rpartition(".")
        heads.setdefault(module, {})[attribute] = tensor
    return {module: _as_factors(name, module, own, modules, adapter) for module, own in heads.items()}


def _as_factors(
    expert: str, path: str, own: Mapping[str, Tensor], modules: Mapping[str, nn.Module], adapter: Adapter
) -> Factors:
    asked = f"expert {expert!r} has a trained head for {path!r}"
    module: Any = modules.get(path)
    if module is None:
        raise LayerMismatch(
            f"{asked}, which the model does not have: load the model that it was trained on, or leave the head out with "
            "dataclasses.replace(adapter, heads={})"
        )
    kind = next((each for each in (linear, embedding) if each.shape(module) is not None), None)
    if kind is None or not own.keys() <= {"weight", "bias"}:
        what = f"{type(module).__name__} with {', '.join(sorted(own))}"
        raise AdapterUnsupported(
            f"{asked}, a {what}: only weights and biases of linear layers and embeddings are mixed. Load the adapter alone "
            "with peft after save_pretrained(), or leave the head out with dataclasses.replace(adapter, heads={})"
        )
    if path in adapter.layers:
        raise AdapterUnsupported(f"{asked}, and an update of the same module: leave one of them out")
    for attribute, tensor in own.items():
        found = getattr(module, attribute, None)
        if found is None or found.shape != tensor.shape:
            wanted = "none" if found is None else tuple(found.shape)
            raise LayerMismatch(f"{asked} whose {attribute} has shape {tuple(tensor.shape)}, and the model's {wanted}")
    shape = kind.shape(module)
    assert shape is not None
    bias_O = own.get("bias")
    if "weight" not in own:
        a_RI, b_OR = torch.zeros(0, shape.num_inputs), torch.zeros(shape.num_outputs, 0)
        return Factors(a_RI, b_OR, base_bias_O=bias_O, kind=kind.name)
    delta = own["weight"].float().cpu() - module.weight.detach().float().cpu()
    delta_OI = delta.T.contiguous() if shape.transposed else delta
    if shape.num_outputs <= shape.num_inputs:
        return Factors(delta_OI, torch.eye(shape.num_outputs), base_bias_O=bias_O, kind=kind.name)
    return Factors(torch.eye(shape.num_inputs), delta_OI, base_bias_O=bias_O, kind=kind.name)
