"""A llama, adapters for it, and what it computes with them: by whole deltas, and by peft from a folder."""

import copy
from dataclasses import replace

import peft
import torch
from tiny_models import linear_layers, random_factors
from transformers import LlamaConfig, LlamaForCausalLM

from loraweave.hub.adapter import Adapter

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2]])


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=3, num_key_value_heads=3, pad_token_id=0)).eval()


def adapter(ranks, seed=0, **fields):
    """Random updates of a llama's layers; `ranks` by the ending of their names."""
    draw = torch.Generator().manual_seed(seed)
    layers = {
        name: random_factors(draw, ranks[name.rsplit(".", 1)[-1]], *shape, scale=0.05)
        for name, shape in linear_layers(llama(), tuple(ranks)).items()
    }
    return Adapter(fields.pop("name", "some adapter"), fields.pop("base_model", "org/base"), layers, **fields)


def with_layer(given, **changes):
    layer, factors = next(iter(given.layers.items()))
    return replace(given, layers={**given.layers, layer: replace(factors, **changes)})


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def dense(deltas):
    """The llama's logits with whole deltas added to its weights."""
    model = copy.deepcopy(llama())
    with torch.no_grad():
        for name, delta_OI in deltas.items():
            model.get_submodule(name).weight += delta_OI
    return logits(model)


def by_peft(folder):
    # a missing or unexpected key would be a warning, and warnings are errors
    return logits(peft.PeftModel.from_pretrained(llama(), folder).eval())


def best_error(delta_OI, rank):
    """(the smallest error of a matrix of that rank, the norm), both in the Frobenius norm."""
    sigma = torch.linalg.svdvals(delta_OI.double())
    return float(sigma[rank:].square().sum().sqrt()), float(sigma.square().sum().sqrt())
