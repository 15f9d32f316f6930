"""The same trained experts in other libraries' layers, on models that share their base's weights with ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.experts.expert_model import ExpertModel


class Loop(nn.Module):
    """The published formula one expert after the other: the tokens that chose it are taken out, and their updates added."""

    def __init__(self, base: nn.Linear, a_ERI: Tensor, b_ERO: Tensor, r_EI: Tensor, scale: float, top_k: int) -> None:
        super().__init__()
        self.base, self.scale, self.top_k = base, scale, top_k
        self.a = nn.ParameterList([nn.Parameter(a_RI) for a_RI in a_ERI])
        self.b = nn.ParameterList([nn.Parameter(b_RO) for b_RO in b_ERO])
        self.r_EI = nn.Parameter(r_EI)

    def forward(self, x_BTI: Tensor) -> Tensor:
        y_NO = self.base(x_BTI).flatten(0, 1)
        x_NI = x_BTI.flatten(0, 1)
        p_NE = functional.linear(x_NI, self.r_EI).softmax(dim=1)
        best_NK, chosen_NK = p_NE.topk(self.top_k, dim=1)
        w_NK = best_NK / best_NK.sum(dim=1, keepdim=True)
        for expert, (a_RI, b_RO) in enumerate(zip(self.a, self.b, strict=True)):
            token_Z, choice_Z = torch.where(chosen_NK == expert)
            update_ZO = (x_NI[token_Z] @ a_RI.T) @ b_RO * self.scale
            y_NO = y_NO.index_add(0, token_Z, update_ZO * w_NK[token_Z, choice_Z, None])
        return y_NO.view(*x_BTI.shape[:2], -1)


Layer = Callable[[nn.Linear, Tensor, Tensor, Tensor, float, int], nn.Module]


def in_layers(made: ExpertModel, layer: Layer) -> nn.Module:
    """A model with copies of the experts and gates of ours, at equal ranks, in layers of another kind."""
    model = sharing(made.base_model)
    for name, factors, gate in experts_of(made):
        parent, _, child = name.rpartition(".")
        num_experts = factors.shape.num_experts
        a_ERI, b_ERO = (part.detach().unflatten(0, (num_experts, -1)).clone() for part in (factors.a_SI, factors.b_SO))
        base = model.get_submodule(name)
        made_of = layer(base, a_ERI, b_ERO, gate.r_EI.detach().clone(), factors.scale, gate.top_k)
        setattr(model.get_submodule(parent), child, made_of)
    return model


def experts_of(made: ExpertModel) -> Iterator[tuple[str, Any, Any]]:
    """Path, factors and gate of each site."""
    for name in made.sites:
        key = name.replace(".", "/")
        yield name, made.layers[key], made.gates[key]


def sharing(model: nn.Module) -> nn.Module:
    """A copy of the model with the very same parameters."""
    memo = {id(value): value for value in (*model.parameters(), *model.buffers())}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


def lora_in_peft(model: nn.Module, rank: int, endings: tuple[str, ...], seed: int) -> nn.Module:
    """One LoRA of that rank in peft, trainable, with values other than those at its beginning."""
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(endings), task_type="CAUSAL_LM")
    found = peft.get_peft_model(sharing(model), config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in found.parameters():
        if parameter.requires_grad:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    return found


def mergoo_layer() -> Layer | None:
    """mergoo's `LoRAMoeLayer`; None where the package is not installed (`pip install --no-deps mergoo`).

    Its gate has the model's hidden size as inputs, which a layer with others could not use: here it has the layer's own.
    """
    try:
        from mergoo.compose_layers import LoRAMoeLayer
    except ImportError:
        return None

    def layer(base: nn.Linear, a_ERI: Tensor, b_ERO: Tensor, r_EI: Tensor, scale: float, top_k: int) -> nn.Module:
        num_experts, rank = a_ERI.shape[:2]
        settings = {"r": rank, "lora_alpha": scale * rank, "lora_dropout": 0.0, "init_lora_weights": True}
        config = SimpleNamespace(
            num_experts_per_tok=top_k,
            num_experts=num_experts,
            hidden_size=base.in_features,
            adapter_configs=[{**settings, "use_rslora": False, "use_dora": False}] * num_experts,
        )
        made: nn.Module = LoRAMoeLayer(config, base.in_features, base.out_features, bias=base.bias is not None)
        made.base_layer, made.gate.weight = base, nn.Parameter(r_EI)
        for expert in range(num_experts):
            made.lora_A[str(expert)].weight = nn.Parameter(a_ERI[expert])
            made.lora_B[str(expert)].weight = nn.Parameter(b_ERO[expert].T.contiguous())
        return made

    return layer


def moe_peft_layer() -> Layer | None:
    """MoE-PEFT's `MolaSparseMoe`; None where it, or `datasets`, is not installed (`pip install --no-deps moe_peft`).

    Its own dropout, which it wants above 0, is switched off.
    """
    try:
        from moe_peft.adapters.mola.config import MolaConfig
        from moe_peft.adapters.mola.model import MolaSparseMoe
        from moe_peft.common import Linear, LoraConfig
    except ImportError:
        return None

    class Both(nn.Module):
        """The base layer, and the experts that it is given with."""

        def __init__(self, linear: Any, experts: Any) -> None:
            super().__init__()
            # which are no modules there, so that torch would not find their parameters
            self.experts = experts
            self.base, self.gate, self.factors = linear.base_layer_, experts.gate_, nn.ModuleList(linear.loras_.values())
            self.linear = [linear]

        def forward(self, x_BTI: Tensor) -> Tensor:
            made: Tensor = self.experts.forward(self.base(x_BTI), x_BTI, lora_linear=self.linear[0])
            return made

    def layer(base: nn.Linear, a_ERI: Tensor, b_ERO: Tensor, r_EI: Tensor, scale: float, top_k: int) -> nn.Module:
        num_experts, rank = a_ERI.shape[:2]
        shared = {
            "lora_r_": rank,
            "lora_alpha_": scale * rank,
            "lora_dropout_": 0.5,
            "use_dora_": False,
            "use_rslora_": False,
        }
        linear = Linear(base, "cpu")
        for expert in range(num_experts):
            name = f"moe.own.experts.{expert}"
            config = LoraConfig(adapter_name=name, lora_init_="original", target_modules_={}, **shared)
            linear.init_lora_weight(config, (a_ERI[expert], b_ERO[expert].T.contiguous()))
            linear.loras_[name].dropout_.p = 0.0
        gate = MolaConfig(adapter_name="own", num_experts_=num_experts, top_k_=top_k, router_init_range_=5.0)
        return Both(linear, MolaSparseMoe(base.in_features, torch.device("cpu"), gate, gate=r_EI))

    return layer
