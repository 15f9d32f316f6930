"""What each expert's layers see on texts of its own: the mean of their inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from loraweave.errors import ScopeError
from loraweave.hub.progress import tracked


def input_means(
    engine: Any, texts: Mapping[str, Sequence[str]], layers: Mapping[str, Sequence[int]], *, progress: bool
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(expert, {layer: mean_I}) over all tokens of the expert's texts, with that expert at weight 1, in float64.

    `layers` says which experts, by their places, update each. Text by text, so that no padding is among the tokens. Raises
    ScopeError for a layer that is not called with one vector a token.
    """
    modules = dict(engine.model.named_modules())
    places = engine.pool.places
    for name in tracked(texts, "reading inputs", total=len(texts), shown=progress):
        own = {layer: modules[layer] for layer, experts in layers.items() if places[name] in experts}
        sums = {layer: _Sum(layer) for layer in own}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(engine.activate({name: 1.0}))
            for layer, module in own.items():
                handle = module.register_forward_pre_hook(sums[layer])
                stack.callback(handle.remove)
            for text in texts[name]:
                ids_BT = torch.tensor([engine.tokenizer(text)["input_ids"]], device=engine.model.device)
                engine.model(input_ids=ids_BT)
        yield name, {layer: found.mean for layer, found in sums.items()}


class _Sum:
    """A hook that adds up the inputs of one layer."""

    def __init__(self, layer: str) -> None:
        self._layer = layer
        self._total: Tensor | None = None
        self._count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not x.is_floating_point() or x.ndim not in (2, 3):
            raise ScopeError(
                f"layer {self._layer!r} ({type(module).__name__}) is called with {x.dtype} of shape {tuple(x.shape)}, and "
                "not with one vector for each token, of which there would be a mean: leave out the adapters that update it"
            )
        total_I = x.detach().double().reshape(-1, x.shape[-1]).sum(dim=0)
        self._total = total_I if self._total is None else self._total + total_I
        self._count += x.numel() // x.shape[-1]

    @property
    def mean(self) -> Tensor:
        if self._total is None:
            raise ScopeError(f"layer {self._layer!r} never ran on the texts, so that its inputs have no mean")
        return self._total / self._count
