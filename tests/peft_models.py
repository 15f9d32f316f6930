"""Folders that PEFT saves of tiny models with random values, and what our reading of them computes."""

import json
import warnings

import peft
import torch
from rounding import num_terms, rounding
from safetensors.torch import save_file
from torch import nn

from loraweave.lowrank import algebra

PREFIX = "base_model.model."
# the names of the layers of `Tiny`, and what most types take to begin with random values
TARGETS = ["first", "inner.0", "last"]
FREE = {"target_modules": TARGETS, "init_weights": False}
LORA = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "a/base", "target_modules": ["q_proj"]}


class Tiny(nn.Module):
    """Three linear layers of different shapes, the middle one without a bias."""

    def __init__(self, sizes):
        super().__init__()
        self.first = nn.Linear(sizes[0], sizes[1])
        self.inner = nn.ModuleList([nn.Linear(sizes[1], sizes[2], bias=False)])
        self.last = nn.Linear(sizes[2], sizes[3])

    def forward(self, x):
        return self.last(torch.tanh(self.inner[0](torch.tanh(self.first(x)))))


class Tree(nn.Module):
    """Layers under the given paths."""

    def __init__(self, layers):
        super().__init__()
        for path, layer in layers.items():
            here = self
            *steps, last = path.split(".")
            for step in steps:
                if step not in here._modules:
                    here.add_module(step, nn.Module())
                here = here._modules[step]
            here.add_module(last, layer)


def tiny(*sizes):
    torch.manual_seed(3)
    return Tiny(sizes or (12, 16, 24, 8)).eval()


def odd():
    """Sizes that no block size divides."""
    return tiny(7, 13, 11, 5)


def train(model, scale=0.3):
    """Random values in everything that PEFT would train, so that no part of an update is zero."""
    torch.manual_seed(4)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # some types leave parameters as whatever was in the memory before
            start = torch.where(parameter.data.abs() < 10, parameter.data, 0.0)
            parameter.data = start + scale * torch.randn_like(parameter)
    return model.eval()


def save(config, folder, base=None, *, scale=0.3, **options):
    """The trained PEFT model of a config, saved to the folder."""
    with warnings.catch_warnings():
        # tiny models exist on no model hub, where PEFT looks for their vocabulary's size
        warnings.simplefilter("ignore")
        torch.manual_seed(5)
        model = train(peft.get_peft_model(base or tiny(), config), scale)
        model.save_pretrained(folder, **options)
    return model


def lora(layer="model.layers.0.self_attn.q_proj", *, a=None, b=None):
    """{name in a file of PEFT: tensor} of an update of rank 2, 5 inputs and 3 outputs."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, generator=generator) if a is None else a
    b = torch.randn(3, 2, generator=generator) if b is None else b
    return {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}


def put(folder, tensors, **config):
    """Writes a PEFT folder of a LoRA by hand, without the tensors that are None; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**LORA, **config}))
    held = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(held, folder / "adapter_model.safetensors")
    return folder


def edit(folder, **fields):
    """Changes fields of the folder's config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


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
    """Return the largest difference between the outputs of PEFT's model and ours beyond rounding, by the largest change."""
    base = base or tiny()
    torch.manual_seed(6)
    x = torch.randn(9, base.first.in_features)
    with torch.no_grad():
        wanted, before = model(x), base(x)
        found = merged(base, adapter)(x)
    assert (wanted - before).abs().max() > 1e-3
    beyond = (found - wanted).abs().max() - 2 * rounding(num_terms(base), wanted.abs().max())
    return float(beyond.clamp_min(0) / (wanted - before).abs().max())
