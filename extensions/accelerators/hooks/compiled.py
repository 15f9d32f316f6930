"""Live mixing below torch.compile: each layer is traced as one opaque operator, which finds the active mixture when it runs.

So no part of a mixture is in a graph or its guards, and another mixture recompiles nothing. The operator's gradient is
that of the eager mixture, calculated again in the backward pass.
"""

from collections.abc import Callable
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor

from loraweave import CompositionError
from loraweave.extend.live import LiveHook, MixedLayer, Traced

_NUMBERS = count(1)
_LAYERS: WeakValueDictionary[int, MixedLayer] = WeakValueDictionary()
# the activations that a backward pass may need, and their numbers
_MIXINGS: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBER_OF: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


class Compiled(LiveHook):
    """The hook that lets torch.compile trace a layer as one operator."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self.numbers: dict[str, Tensor] = {}

    def traced(self, mixed: MixedLayer) -> tuple[Traced, Tensor]:
        """Return `mix` and the layer's number, a tensor of shape (), which `mix` can look up while the layer lives."""
        name = mixed.layer.name
        if name not in self.numbers:
            # a tensor, whose value no guard looks at: layers that share their code then share what it was compiled to
            with torch.inference_mode(False):
                self.numbers[name] = torch.tensor(next(_NUMBERS))
        _LAYERS[int(self.numbers[name])] = mixed
        return mix, self.numbers[name]


def mix(layer: Tensor, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
    """Return y, the layer's output for x, plus the update that is active when this runs; `layer` is the layer's number.

    `bias` is the layer's own. The backward pass raises CompositionError once the activation has ended.
    """
    output: Tensor
    if torch.is_grad_enabled():
        output, _ = torch.ops.loraweave.mixed_for_backward(layer, x, y, bias)
    else:
        output = torch.ops.loraweave.mixed(layer, x, y)
    return output


def _mixed_for_backward(layer: Tensor, x: Tensor, y: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the layer's output, and the number of the activation that the backward pass needs (0: none was active)."""
    with torch.no_grad():
        output, mixing = _mixed_by(layer, x, y)
    return output, torch.tensor(0 if mixing is None else _number_of(mixing))


def _number_of(mixing: Any) -> int:
    """Return the number of the activation `mixing`, which a backward pass can look up while it lives."""
    if mixing not in _NUMBER_OF:
        _MIXINGS[_NUMBER_OF.setdefault(mixing, next(_NUMBERS))] = mixing
    return _NUMBER_OF[mixing]


def _mixed_by(layer: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    # an operator may neither change nor return its inputs
    y = y.clone(memory_format=torch.contiguous_format)
    # no such layer: the code was traced inside an activation, and runs when none is open in any thread
    target = _LAYERS.get(int(layer))
    mixing = None if target is None else target.mixing()
    if target is None or mixing is None:
        return y, None
    return mixing.apply(target.layer, x, y).contiguous(), mixing


def _mixed_backward(
    grad: Tensor, layer: Tensor, mixing: Tensor, x: Tensor, y: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, y and bias (empty for a layer without one) for `grad`, the output's.

    `layer` and `mixing` are the numbers of the layer and the activation. Raises CompositionError if that has ended.
    """
    no_bias = grad.new_empty(0) if bias is None else torch.zeros_like(bias)
    if not int(mixing):
        return _zeros(x), _copy(grad), no_bias
    live_mixing = _MIXINGS.get(int(mixing))
    if live_mixing is None or live_mixing.closed:
        raise CompositionError(
            "the backward pass of a compiled model needs the activation that its forward pass ran in, and that has ended: "
            "call backward() inside the block"
        )
    target = _LAYERS[int(layer)].layer
    with torch.enable_grad():
        # token ids have no gradient
        x, y = x.detach().requires_grad_(x.is_floating_point()), y.detach().requires_grad_()
        own_bias = target.parameter("bias")
        inputs = {"x": x, "y": y} if own_bias is None else {"x": x, "y": y, "bias": own_bias}
        wanted = {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}
        output = live_mixing.apply(target, x, y)
        values = torch.autograd.grad(output, list(wanted.values()), grad, allow_unused=True, materialize_grads=True)
    grads = {name: _copy(value) for name, value in zip(wanted, values, strict=True)}
    return grads.get("x", _zeros(x)), grads["y"], grads.get("bias", no_bias)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, memory_format=torch.contiguous_format)


def _copy(grad: Tensor) -> Tensor:
    return grad.clone(memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    layer, x, y, bias = inputs
    ctx.save_for_backward(layer, output[1], x, y, bias)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    layer, mixing, x, y, bias = ctx.saved_tensors
    grad_x, grad_y, grad_bias = torch.ops.loraweave.mixed_backward(grad, layer, mixing, x, y, bias)
    return None, grad_x if x.is_floating_point() else None, grad_y, None if bias is None else grad_bias


def _define(name: str, schema: str, run: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    # the output depends on more than the inputs: a CUDA graph would replay the mixture that was active at its recording
    tags = (torch.Tag.cudagraph_unsafe,)
    torch.library.define(f"loraweave::{name}", schema, lib=_LIBRARY, tags=tags)
    torch.library.impl(f"loraweave::{name}", "CompositeExplicitAutograd", run, lib=_LIBRARY)
    torch.library.register_fake(f"loraweave::{name}", shapes, lib=_LIBRARY)


_LIBRARY = torch.library.Library("loraweave", "DEF")  # type: ignore[no-untyped-call]
_define(
    "mixed",
    "(Tensor layer, Tensor x, Tensor y) -> Tensor",
    lambda layer, x, y: _mixed_by(layer, x, y)[0],
    lambda layer, x, y: _zeros(y),
)
_define(
    "mixed_for_backward",
    "(Tensor layer, Tensor x, Tensor y, Tensor? bias) -> (Tensor, Tensor)",
    _mixed_for_backward,
    lambda layer, x, y, bias: (_zeros(y), torch.empty_like(layer)),
)
_define(
    "mixed_backward",
    "(Tensor grad, Tensor layer, Tensor mixing, Tensor x, Tensor y, Tensor? bias) -> (Tensor, Tensor, Tensor)",
    _mixed_backward,
    lambda grad, layer, mixing, x, y, bias: (_zeros(x), _zeros(y), grad.new_empty(0) if bias is None else _zeros(bias)),
)
torch.library.register_autograd("loraweave::mixed_for_backward", _gradients, setup_context=_save, lib=_LIBRARY)
