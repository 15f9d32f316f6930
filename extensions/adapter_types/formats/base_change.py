"""LoRA whose training began by subtracting A0 B0 from the base's weights: PiSSA, OLoRA and MiLoRA, saved unconverted."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraweave import AdapterCorrupt, AdapterUnsupported, Factors
from loraweave.extend import fingerprint, get
from loraweave.extend.formats import AdapterConfig, Bound, Contents, cut_update, entry, parse_lora
from loraweave.extend.models import base_layer
from loraweave.extensions.adapter_types.formats._foreign import PeftReader, plain_factors, require_plain_activation
from loraweave.extensions.adapter_types.formats._placing import GIVE_MODEL

INITS = ("pissa", "olora", "milora")


class BaseChange(PeftReader):
    """Delta = s B A - s B0 A0 relative to the original weights, exactly of rank 2 r.

    The subtracted part is the sum of the largest singular terms of W for PiSSA (Meng et al. 2024, arXiv 2404.02948), of the
    smallest for MiLoRA (Wang et al. 2024, arXiv 2406.09044), and s times the first columns of Q and rows of R of its QR for
    OLoRA (Buyukakyuz 2024, arXiv 2406.01775). All three are functions of W alone, whatever signs a library gives them.
    """

    peft_type = "LORA"

    @classmethod
    def claims(cls, folder: Path, fields: Mapping[str, Any]) -> bool:
        """Return True if the config is a LoRA's with an `init_lora_weights` in INITS."""
        return _init_of(fields) in INITS

    @classmethod
    def _read(cls, source: Path, bound: Bound, model: nn.Module | None, allow_pickle: bool) -> Contents:
        """Return the adapter as plain LoRA. Raises AdapterUnsupported without `model`, for DoRA and for biases."""
        fields = AdapterConfig.of(source).fields
        init = _init_of(fields)
        if init not in INITS:
            raise AdapterUnsupported(f"{source}: init_lora_weights is not one of {', '.join(INITS)}")
        if model is None:
            raise AdapterUnsupported(
                f"{source}: init_lora_weights={init!r} changed the base model's weights in training, so the update of the "
                f"original ones depends on them; {GIVE_MODEL}"
            )
        contents: Contents = get("formats", "peft").read(
            source, assumed={"init_lora_weights": True}, allow_pickle=allow_pickle
        )
        settings = parse_lora({**fields, "init_lora_weights": True}, source)
        require_plain_activation(settings, f"init_lora_weights={init!r}")
        scales = settings.scales({name: factors.rank for name, factors in contents.layers.items()})
        modules = dict(model.named_modules())
        layers: dict[str, Factors] = {}
        notes: dict[str, Any] = {}
        for name, factors in contents.layers.items():
            where = f"{source}: layer {name!r}"
            layer = base_layer(modules, name, str(source))
            if factors.kind != "linear" or layer.kind != "linear" or not factors.bound or factors.bias_O is not None:
                raise AdapterUnsupported(f"{where}: {init!r} is supported for plain linear updates only")
            shape = (layer.num_outputs, layer.num_inputs)
            if (factors.b_OR.shape[0], factors.a_RI.shape[1]) != shape or factors.rank > min(shape):
                raise AdapterCorrupt(f"{where}: an update of rank {factors.rank} and the base's (O, I) = {shape} do not fit")
            start_a_RI, start_b_OR = _start(layer.weight_OI, factors.rank, init, scales[name])
            a_RI = torch.cat([factors.a_RI.double(), start_a_RI])
            b_OR = torch.cat([factors.b_OR.double(), -start_b_OR], dim=1)
            layers[name], notes[name] = cut_update(plain_factors(a_RI, b_OR), bound, where)
        card = {**contents.card, "converted_from": init, "conversion": notes}
        return replace(contents, layers=layers, fingerprint=fingerprint(model), card=card)


def _init_of(fields: Mapping[str, Any]) -> str:
    return (entry(fields, "init_lora_weights", str) or "").lower() if fields.get("peft_type") == "LORA" else ""


def _start(weight_OI: Tensor, rank: int, init: str, scale: float) -> tuple[Tensor, Tensor]:
    if init == "olora":
        q_OR, r_RI = torch.linalg.qr(weight_OI)
        return r_RI[:rank], q_OR[:, :rank] * scale
    u_OR, sigma_R, vh_RI = torch.linalg.svd(weight_OI, full_matrices=False)
    first = 0 if init == "pissa" else sigma_R.shape[0] - rank
    terms = slice(first, first + rank)
    root_R = sigma_R[terms].sqrt()
    return root_R[:, None] * vh_RI[terms], u_OR[:, terms] * root_R
