"""What tests of recipes share: a site of a tiny model whose experts have learned something."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

import loraweave as lw


class SeenSite(NamedTuple):
    """What one site saw and made of its tokens: x_TI, the base's y0_TO and y_TO, with each expert's factors and the gate."""

    x_TI: torch.Tensor
    y0_TO: torch.Tensor
    y_TO: torch.Tensor
    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    gate: torch.nn.Module


@pytest.fixture
def seen_at(make_model):
    """seen_at(recipe, layer, training=False, **options): a SeenSite in fp64; the gate's scores are far apart."""

    def see(name, layer, *, training=False, **options):
        model = make_model("llama", dtype=torch.float64)
        with lw.experts(name, model, target_modules=(layer,), **options) as made:
            torch.manual_seed(0)
            factors, gate = made.layers[layer.replace(".", "/")], made.gates[layer.replace(".", "/")]
            torch.nn.init.normal_(factors.b_SO)
            torch.nn.init.normal_(gate.r_EI)
            seen = {}
            module = model.get_submodule(layer)
            handle = module.register_forward_hook(lambda _, args, y: seen.update(x=args[0][0], y=y[0]))
            made.train(training)(input_ids=torch.tensor([[3, 9, 27, 20, 60, 58, 11]]))
            handle.remove()
            num_experts = factors.shape.num_experts
            a_ERI = factors.a_SI.unflatten(0, (1 if factors.shape.shared_a else num_experts, -1))
            return SeenSite(
                seen["x"],
                seen["x"] @ module.weight.T,
                seen["y"],
                a_ERI.expand(num_experts, -1, -1).detach(),
                factors.b_SO.unflatten(0, (num_experts, -1)).detach(),
                gate,
            )

    return see


@pytest.fixture
def adds_up(make_model, trained):
    """adds_up(recipe, layer, inputs, weights, scale, **options): checks y = W x + scale * sum over e of w_e B_e A_e x.

    `weights(made, row, x_TI, x_I)` gives w_E of a token of a row.
    """

    def check(name, layer, inputs, weights, scale, **options):
        model, seen = make_model("llama", dtype=torch.float64), {}
        with lw.experts(name, model, target_modules=(layer,), **options) as made:
            experts = trained(made).layers[layer.replace(".", "/")].starts()
            module = model.get_submodule(layer)
            handle = module.register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
            made(**inputs)
            handle.remove()
            for row, (x_TI, y_TO) in enumerate(zip(seen["x"], seen["y"], strict=True)):
                for x_I, y_O in zip(x_TI, y_TO, strict=True):
                    expected_O = module.weight @ x_I
                    for w, (a_RI, b_RO) in zip(weights(made, row, x_TI, x_I), experts, strict=True):
                        expected_O = expected_O + scale * w * (b_RO.T @ (a_RI @ x_I))
                    torch.testing.assert_close(y_O, expected_O)

    return check


@pytest.fixture
def terms_of(make_model):
    """terms_of(recipe, batch, **options): (the losses of a training pass in fp64, what its gates noted)."""

    def pass_of(name, batch, *, task=None, **options):
        with lw.experts(name, make_model("llama", dtype=torch.float64), **options) as made:
            torch.manual_seed(0)
            for gate in made.gates.values():
                if hasattr(gate, "r_EI"):
                    torch.nn.init.normal_(gate.r_EI)
            made.train()(**batch, task=task)
            return made.terms, made.notes

    return pass_of
