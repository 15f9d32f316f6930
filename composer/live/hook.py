"""The base class of hooks into live mixtures; its defaults leave everything to the core.

    a mixture by row   on `devices`: prepare -> kernel for each layer .. release       else kernels of the registry
    torch.compile      traced: a function that the graph of a layer has                  else mixed outside the graph
    a pipeline         calls, install: a mixture for each call of a part                 else one mixture for all calls
    fused experts      runs_experts, take_experts: their module runs with the updates    else they are only written to
    a server           bytes_beside, on `devices`: its memory beside the factors         else nothing

A hook is an entry of the registry `hooks`; a Composer makes one of each for itself and its pool.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.composer.live.kernels._parts import Kernel
from loraweave.composer.live.residents import Lease
from loraweave.composer.live.standing_in import Handle
from loraweave.composer.model.layers import TargetLayer
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights, Router


class Prepared(Protocol):
    """The state that a hook prepares for one mixture's activations; `remembered` has, by layer, the kernels made from it."""

    @property
    def remembered(self) -> dict[str, Any]: ...

    def reaches(self, layer: str) -> bool:
        """Return True if the mixture updates the layer."""
        ...


class MixedLayer(Protocol):
    """A layer that runs with its update on top; the same layer may get another such object in each activation."""

    layer: TargetLayer

    def mixing(self) -> Any:
        """Return the activation that applies to the running call, or None.

        It has `closed`, and `apply(layer, x, y)`, which returns y plus the update and may write it into y's memory.
        """
        ...


Resolve = Callable[[Any], MixtureWeights | Router]
Activate = Callable[[MixtureWeights | Router], AbstractContextManager[Any]]

# what torch.compile traces for a layer: (number, x, y, the layer's own bias) -> y with the update that is then active
Traced = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class LiveModel(Protocol):
    """The live layers of a Composer, as a hook sees them when the model's first activation has just begun."""

    model: nn.Module

    def current(self) -> Any:
        """Return the activation that applies to the running call, or None; it has a `plan`."""
        ...

    def enters(self, part: nn.Module) -> Iterator[Handle]:
        """Let calls of a part of the model begin and end like the model's own, until the handles are removed."""
        ...

    def guards(self, name: str, module: nn.Module, owner: nn.Module, expected: Callable[[], bool]) -> Iterator[Handle]:
        """Make both modules copyable; yield hooks raising CompositionError if `owner` skips `module` while `expected()`."""
        ...


class LiveHook:
    """A hook into the live mixtures of one Composer and pool, made with them; any thread may call it.

    `max_bytes` is the memory that it may keep for later mixtures.
    """

    # device types; `prepare` is called for batches on them, `bytes_beside` for models on them
    devices: ClassVar[tuple[str, ...]] = ()

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes

    @classmethod
    def bytes_beside(cls, adapter: Adapter, device: torch.device, dtype: torch.dtype) -> int:
        """Return the bytes that the hook keeps of an adapter, beside its factors, for layers of this device and dtype."""
        return 0

    def prepare(self, mixture: MixtureWeights, lease: Lease, layers: Mapping[str, TargetLayer]) -> Prepared | None:
        """Return the state that replaces the registry's kernels for the mixture's activations until `release`, or None.

        With None the registry's kernels run. The mixture has weights by row, fp32, which all layers share; `lease` has its
        experts' factors, and `layers` are the target layers by path.
        """
        return None

    def release(self, prepared: Any) -> None:
        """Release prepared state once the last activation of its mixture has ended."""

    def kernel(
        self, prepared: Any, layer: TargetLayer, device: torch.device, dtype: torch.dtype, *, one: bool
    ) -> Kernel | None:
        """Return the kernel that adds a prepared mixture to a layer it reaches, or None for the registry's kernel.

        The kernel runs for `one` token a row, else for more, in calls where no gradient goes through the layer's input.
        """
        return None

    def calls(
        self, model: nn.Module, mixture: Any, resolve: Resolve, activate: Activate
    ) -> tuple[MixtureWeights | Router, Any] | None:
        """Return an activation's weights, and the function that finds each call's mixture, None if all calls share one.

        `model` is a pipeline (`Parts`); returns None for one whose calls the hook does not know. `resolve` turns a mixture
        into weights, `activate` opens an activation of them.
        """
        return None

    def install(self, live: LiveModel) -> Iterable[Handle]:
        """Make the changes that the activations of a pipeline need; yield a handle for each change once it is made."""
        return ()

    @classmethod
    def runs_experts(cls, module: nn.Module) -> bool:
        """Return True if the hook can run this module, which has the weights of all its experts in one parameter."""
        return False

    def take_experts(self, live: LiveModel, module: nn.Module, layers: Sequence[TargetLayer]) -> Iterable[Handle]:
        """Let a module of fused experts add these layers' updates; yield a handle for each change once it is made."""
        return ()

    def forget(self, expert: str) -> None:
        """Drop everything kept of an expert, so that another expert may get its name."""

    def traced(self, mixed: MixedLayer) -> tuple[Traced, Tensor] | None:
        """Return (a function for torch.compile to trace for a layer, a scalar tensor that tells it the layer), or None.

        None mixes outside the graph. Layers with the same code share its compiled form if they share the function.
        """
        return None


def traced_by(hooks: Iterable[LiveHook], mixed: MixedLayer) -> tuple[Traced | None, Tensor]:
    """Return the first `traced` result of the hooks for this layer, (function, number); (None, empty tensor) without one."""
    for hook in hooks:
        if (traced := hook.traced(mixed)) is not None:
            return traced
    return None, torch.empty(0)


@cache
def mix_outside() -> Callable[[MixedLayer, Tensor, Tensor], Tensor]:
    """Return eager mixing as a function that runs outside torch.compile's graph, so that no gradient is lost."""
    eager: Callable[[MixedLayer, Tensor, Tensor], Tensor] = torch.compiler.disable(  # type: ignore[no-untyped-call]
        _eager,
        reason="a mixture by a router, or of weights that learn, has gradients that a graph would lose, and stays outside; "
        "compile without fullgraph=True, or run under torch.no_grad()",
    )
    return eager


def _eager(mixed: MixedLayer, x: Tensor, y: Tensor) -> Tensor:
    activation = mixed.mixing()
    output: Tensor = y if activation is None else activation.apply(mixed.layer, x, y)
    return output


def hook_kinds() -> tuple[type[LiveHook], ...]:
    """Return the classes of the hooks in the registry."""
    return tuple(map(partial(registry.get, "hooks"), registry.names("hooks")))
