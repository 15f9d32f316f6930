"""Whether the first step has reached all that is to learn."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from loraweave.errors import TrainingError
from loraweave.routers.routing.learned_router import LearnedRouter


def require_gradients(router: LearnedRouter, taught: Collection[int]) -> None:
    """Raises TrainingError, naming them, where parameters got no gradient that should have one.

    `taught` are the experts, by their places, that the rows belong to. None is due in a layer where a single expert's weight
    is 1 whatever the parameters are, nor in one whose experts learn from their own rows alone and have none.
    """
    silent = [
        name
        for name, parameter in router.named_parameters()
        if parameter.requires_grad and not name.startswith(router.silent_at_first) and not _has_gradient(parameter)
        if _promised(router, name, taught)
    ]
    if silent:
        shown = ", ".join(silent[:5]) + (f" and {len(silent) - 5} more" if len(silent) > 5 else "")
        raise TrainingError(
            f"the first step gave no gradient to {len(silent)} parameters of router {router.name!r}: {shown}. Its weights "
            "must follow from them by operations that autograd knows; freeze what is not to learn (requires_grad_(False))"
        )


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.any())


def _promised(router: LearnedRouter, name: str, taught: Collection[int]) -> bool:
    # the name that LayerTensors gives a layer's tensor
    layer = router.members.layers.get(name.rpartition(".")[2].replace("/", "."))
    if layer is None:
        return True
    if router.apart:
        return any(expert in taught for expert in layer.experts)
    return len(layer.experts) > 1 or not router.simplex
