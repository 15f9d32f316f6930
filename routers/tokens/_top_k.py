"""The softmax over each token's highest scores in one compiled call instead of four PyTorch calls."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loraweave.common import native

SOURCE = Path(__file__).with_name("top_k.c")
# comparisons a token: for this many, the library takes half of torch.topk's time for one token, and up to 1.4 times it for
# a thousand
MOST_COMPARED = 256


def top_k_native(scores_BTE: Tensor, top_k: int) -> Tensor | None:
    """Return w_BTE as `top_k_softmax` does, whatever the number of tokens; None where the library or gradients forbid it.

    What decides depends on neither B nor T, so that a token's weights have the same bits in every batch.
    """
    if (
        scores_BTE.dtype is not torch.float32
        or scores_BTE.device.type != "cpu"
        or top_k * scores_BTE.shape[-1] > MOST_COMPARED
    ):
        return None
    if scores_BTE.requires_grad and torch.is_grad_enabled():
        return None
    if type(scores_BTE) is not Tensor or _is_traced() or (library := _library()) is None:
        return None
    scores_BTE = scores_BTE.contiguous()
    w_BTE = torch.empty_like(scores_BTE)
    num_experts = scores_BTE.shape[-1]
    num_tokens = scores_BTE.numel() // num_experts
    library.top_k_softmax(scores_BTE.data_ptr(), num_tokens, num_experts, top_k, w_BTE.data_ptr())
    return w_BTE


def _is_traced() -> bool:
    """Return whether torch records or transforms its operations, which it cannot do to a call of the library."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    return torch._C._are_functorch_transforms_active() or native.is_watched() > 0


@cache
def _library() -> Any:
    library = native.library(SOURCE, brief=True)
    if library is not None:
        whole = ctypes.c_int64
        library.top_k_softmax.argtypes = [ctypes.c_void_p, whole, whole, whole, ctypes.c_void_p]
        library.top_k_softmax.restype = None
    return library
