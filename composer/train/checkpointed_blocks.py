"""Gradient checkpointing of a model in evaluation mode, which transformers' own leaves out there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from loraweave.errors import TrainingError

# around a block's forward, and around its second run
Contexts = tuple[AbstractContextManager[object], AbstractContextManager[object]]


@contextmanager
def checkpointed_blocks(
    model: nn.Module, wanted: bool, *, context_fn: Callable[[], Contexts] = noop_context_fn
) -> Iterator[None]:
    """Within the context, make each block keep only its inputs and run again in the backward pass.

    The model is as it was afterwards. `context_fn` is that of `torch.utils.checkpoint`, called whenever a block runs. Raises
    TrainingError for a model without such blocks.
    """
    # its import brings torch's compiler with it
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)] if wanted else []
    if wanted and not blocks:
        raise TrainingError(f"{type(model).__name__} has no blocks to run again: leave gradient_checkpointing out")
    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=context_fn)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                vars(block).pop("forward", None)
            else:
                block.forward = forward
