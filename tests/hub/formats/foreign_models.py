"""Tiny models and PEFT adapters of every type with random values, and what our reading of them computes."""

import warnings

import peft
import torch
from torch import nn

from loraweave.lowrank import algebra


class Tiny(nn.Module):
    """Three linear layers of different shapes, the middle one without a bias."""

    def __init__(self, sizes=(12, 16, 24, 8)):
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.inner = nn.ModuleList([nn.Linear(sizes[1], sizes[2], bias=False)])
        self.last = nn.Linear(sizes[2], sizes[3])

    def forward(self, x):
        return self.last(torch.tanh(self.inner[0](torch.tanh(self.first(x)))))


def tiny(*sizes):
    torch.manual_seed(3)
    return Tiny(sizes or (12, 16, 24, 8)).eval()


def odd():
    """Sizes that no block size divides."""
    return tiny(7, 13, 11, 5)


def train(model):
    """Random values in everything that PEFT would train, so that no part of an update is zero."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # some types leave parameters as whatever was in the memory before
            start = torch.where(parameter.data.abs() < 10, parameter.data, 0.0)
            parameter.data = start + 0.3 * torch.randn_like(parameter)
    return model.eval()


def save(config, folder, base=None):
    """The trained PEFT model of a config, saved to the folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = train(peft.get_peft_model(base or tiny(), config))
        model.save_pretrained(folder)
    return model


def merged(base, adapter):
    """The base model with the adapter's dense updates added to its weights, by the definition of factors."""
    modules = dict(base.named_modules())
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            layer = modules[name]
            weight_OI = layer.weight.double()
            if layer.bias is not None:
                factors = algebra.bind(factors, layer.weight, layer.bias)
            dense_OI = factors.b_OR.double() @ factors.a_RI.double()
            if factors.gain_O is not None:
                dense_OI = dense_OI + factors.gain_O.double()[:, None] * weight_OI
            if factors.bias_O is not None:
                old_O = torch.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
                layer.bias = nn.Parameter((old_O.double() + factors.bias_O.double()).float())
            layer.weight.copy_(weight_OI + dense_OI)
    return base


def gap(model, adapter, base=None):
    """The largest difference of outputs between PEFT's model and ours, relative to the largest change by the adapter."""
    base = base or tiny()
    torch.manual_seed(6)
    x = torch.randn(9, base.first.in_features)
    with torch.no_grad():
        wanted, before = model(x), base(x)
        found = merged(base, adapter)(x)
    assert (wanted - before).abs().max() > 1e-3
    return float((found - wanted).abs().max() / (wanted - before).abs().max())
