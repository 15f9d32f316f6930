"""Fixtures of tests that learn weights: a model of GPT-2, its adapters, and their mixture written into its weights."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call

from loraweave.composer.model.batches import batch, encode, token_losses


@pytest.fixture
def model(make_model):
    return make_model("gpt2", dtype=torch.float64)


@pytest.fixture
def adapters(model, make_adapters):
    return make_adapters(model, "gpt2")


class Losses(torch.nn.Module):
    """The loss of every token of some rows' targets, as a module, so that it can be called with other weights."""

    def __init__(self, model, rows):
        super().__init__()
        self.model, self.rows = model, rows

    def forward(self):
        return token_losses(self.model, self.rows)


@pytest.fixture
def written_out(make_model, adapters, tokenizer):
    """written_out(prompts, targets)(w_LE, layers): losses of W + sum over e of w_le B_e A_e, for autograd."""
    model = make_model("gpt2", dtype=torch.float64)

    def of_rows(prompts, targets):
        losses = Losses(model, batch(model, tokenizer, encode(model, tokenizer, prompts, targets)))

        def loss_BK(w_LE, layers):
            changed = {}
            for w_E, layer in zip(w_LE, layers, strict=True):
                weight_IO = model.get_submodule(layer).weight.detach()
                for w, adapter in zip(w_E, adapters, strict=True):
                    if layer in adapter.layers:
                        factors = adapter.layers[layer]
                        weight_IO = weight_IO + w * (factors.b_OR.double() @ factors.a_RI.double()).T
                changed[f"model.{layer}.weight"] = weight_IO
            return functional_call(losses, changed)

        return loss_BK

    return of_rows
