"""Embeddings: x is the one-hot token, so that x a^T looks up a column of a; also those that scale what they look up."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from loraweave.composer.model.kinds import _kind
from loraweave.composer.model.kinds._kind import Shape, by_row
from loraweave.types import Kind

name: Kind = "embedding"
modules = "torch.nn.Embedding"
rows, put_back = _kind.rows, _kind.put_back


def shape(module: nn.Module) -> Shape | None:
    """(features, vocabulary size) of an embedding; None for any other module."""
    if isinstance(module, nn.Embedding):
        return Shape(int(module.embedding_dim), int(module.num_embeddings), transposed=True)
    return None


def refusal(module: Any) -> str:
    """Not exact are an embedding that changes its weight while it runs, and one that does more than look up and scale."""
    if module.max_norm is not None:
        return f"whose max_norm={module.max_norm} changes its weight at every call"
    if type(module).forward is not nn.Embedding.forward and not _looks_up_and_scales(module):
        return "whose forward is its own, and is not a look-up of its weight times its embed_scale"
    return ""


def project(module: Any, x: Tensor, a_SI: Tensor) -> Tensor:
    """hidden_BTS: the columns of a at the tokens, times the embedding's scale, which takes them to fp32 or better."""
    return _scaled(module, by_row(functional.embedding(x, a_SI.T)))


def inputs(module: Any, x: Tensor, like: Tensor) -> Tensor:
    """The tokens as one-hot rows of vocabulary size, times the embedding's scale: as many values as logits have."""
    one_hot = functional.one_hot(x.long(), int(module.num_embeddings)).to(like.dtype)
    return _scaled(module, by_row(one_hot)).to(like.dtype)


def _scaled(module: Any, looked_up: Tensor) -> Tensor:
    """Times the factor of a scaled embedding (gemma's sqrt(hidden size)), rounded as the module itself rounds it."""
    scale = getattr(module, "embed_scale", None)
    if scale is None or type(module).forward is nn.Embedding.forward:
        return looked_up
    if isinstance(scale, Tensor):
        scale = scale.to(looked_up.device, module.weight.dtype)
    return looked_up.to(torch.promote_types(looked_up.dtype, torch.float32)) * scale


def _looks_up_and_scales(module: nn.Embedding) -> bool:
    """Whether the forward of a class of its own gives embed_scale * W[token] for a few tokens.

    Where the weight cannot be read (offloaded), a class with an embed_scale is believed.
    """
    weight = module.weight
    if not hasattr(module, "embed_scale") or not weight.is_floating_point() or weight.dtype.itemsize < 2:
        return False
    if weight.is_meta:
        return True
    tokens_BT = torch.arange(min(4, module.num_embeddings), device=weight.device).flip(0)[None]
    with torch.no_grad():
        try:
            y = type(module).forward(module, tokens_BT)
        # positional embeddings take other arguments, and say so in various ways
        except Exception:
            return False
        expected = _scaled(module, weight[tokens_BT])
    return _kind.is_near(y, expected, atol=1e-8)
