"""The form of every router that looks at the input of a layer: whose experts, which options, kept as a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from loraweave.errors import BaseModelMismatch, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.members import Members


class TokenRouter(nn.Module):
    """w_BTE for each layer of a pool, from that layer's input x_BTI. Its experts are the pool's, in the pool's order.

    A subclass takes the pool and its own options as keywords, keeps each option as an attribute of its name, and all its
    tensors as parameters and buffers (`LayerTensors` where there is one for each layer). It can be made of `Members` alone,
    without tensors of experts, to be filled from a file.

    Weights of a layer count only for the experts that update it (`self.members.layers[layer].experts`).
    """

    # whether fit() is needed before the weights mean anything
    learned: ClassVar[bool] = False
    # whether the weights of every token sum to 1
    simplex: ClassVar[bool] = True

    def __init__(self, pool: ExpertPool | Members) -> None:
        super().__init__()
        self.members = Members.of(pool)

    @property
    def name(self) -> str:
        """The router's name in the registry."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def experts(self) -> tuple[str, ...]:
        return self.members.names

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that some expert updates."""
        return tuple(self.members.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The options that it was made with, by name."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """w_BTE in fp32 or better; row b depends on row b of x alone."""
        raise NotImplementedError

    def require_pool(self, pool: ExpertPool) -> None:
        """Raises WeightingError for other experts, contents or order than its own, BaseModelMismatch for another base."""
        own = self.members
        if pool.names != own.names:
            raise WeightingError(
                f"router {self.name!r} is for experts {own.names}, but the pool has {pool.names}, in this order; make the "
                "router for this pool, or swap() to pool.subset(router.experts)"
            )
        for name, digest in zip(own.names, own.hashes, strict=True):
            if (found := pool.adapters[name].hash) != digest:
                raise WeightingError(
                    f"router {self.name!r} was made for an expert {name!r} with hash {digest}, but the pool's has {found}; "
                    "give it the adapter it was made for, or make the router for this pool"
                )
        if why := own.base.differs(Members.of(pool).base):
            raise BaseModelMismatch(f"router {self.name!r} was made for another base model than the pool's: {why}")

    def add_expert(self, name: str, adapter: Adapter) -> Self:
        """One more expert, at the end, where that is possible without training the others again; else ScopeError."""
        raise ScopeError(
            f"router {self.name!r} weighs all its experts together, and cannot take {name!r} beside them: make one for the "
            "larger pool, and fit() it where it is a learned one"
        )

    def remove_expert(self, name: str) -> Self:
        """Without one expert, the rest as before, where that has a meaning; else ScopeError."""
        raise ScopeError(
            f"router {self.name!r} weighs all its experts together, and has no meaning without {name!r}: make one for the "
            "smaller pool, and fit() it where it is a learned one"
        )


def option_names(router: type[TokenRouter]) -> list[str]:
    """The names of the options that a router takes."""
    parameters = inspect.signature(router).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def by_layer(pool: ExpertPool | Members, make: Callable[[ExpertPool, str], Tensor]) -> Mapping[str, Tensor]:
    """What `make` gives for each layer of a pool; nothing where there is no pool yet, only its members."""
    if isinstance(pool, Members):
        return {}
    return {layer: make(pool, layer) for layer in Members.of(pool).layers}
