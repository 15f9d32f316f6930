"""The form of every router that looks at the input of a layer: whose experts, which options, kept as a folder."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from loraweave.errors import BaseModelMismatch, ScopeError, TrainingError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.intake.upload import upload
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.members import Members
from loraweave.routers.routing.router_card import router_card
from loraweave.routers.routing.rows import with_rows, without_rows
from loraweave.routers.routing.writing import write_router


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
    simplex: bool = True
    # tensors with rows of experts: None where row e is of expert e, else the name of the tensor that says whose each row is;
    # None for a router that weighs all experts together, so that none can join or leave it
    per_expert: ClassVar[Mapping[str, str | None] | None] = None
    # options that are at most the number of experts
    counts: ClassVar[tuple[str, ...]] = ()

    # how it was trained, as JSON
    report: Mapping[str, Any] | None = None
    # the adapters that lay in its folder
    pool: ExpertPool | None = None

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

    def require_engine(self, engine: Any) -> None:
        """Raises what `require_pool` raises for a Composer that has neither given nor bound experts as this router's."""
        bound: ExpertPool = engine.bound_pool
        self.require_pool(bound if self.members.same_experts(bound) else engine.pool)

    def onto(self, pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]) -> TokenRouter:
        """The same router for a pool that has its experts in another order, under other names, or among others.

        They are known by their content; experts that it does not know get weight 0. Raises WeightingError, which lists the
        differences, for a pool without some of its experts, BaseModelMismatch for one of another base.
        """
        from loraweave.routers.routing.placed import placed

        return placed(self, pool if isinstance(pool, ExpertPool) else ExpertPool(pool))

    @property
    def watched(self) -> tuple[str, ...]:
        """Paths of blocks of the model whose input it looks at (`routing.blocks.running_block`)."""
        return ()

    @property
    def parts(self) -> list[TokenRouter]:
        """Itself and the routers that it is made of."""
        return [part for part in self.modules() if isinstance(part, TokenRouter)]

    def alone(self, pool: ExpertPool) -> Self:
        """A router like this one for a pool of one expert, from which `add_expert` takes the rows."""
        options = {name: value for name, value in self.options.items() if name not in self.counts}
        return type(self)(pool, **options)

    def add_expert(self, name: str, adapter: Adapter) -> Self:
        """A router with one more expert, at the end, where that is possible without training the others again.

        Their rows are those of this router, which stays as it is. Raises ScopeError where it is not possible, WeightingError
        for a name that it has already, BaseModelMismatch or LayerMismatch for an adapter that does not go with the others.
        """
        if any(part.per_expert is None for part in self.parts):
            raise ScopeError(
                f"router {self.name!r} weighs all its experts together, and cannot take {name!r} beside them: make one for "
                "the larger pool, and fit() it where it is a learned one"
            )
        return with_rows(self, name, adapter)

    def remove_expert(self, name: str) -> Self:
        """A router without one expert, the rest as before, where that has a meaning; this one stays as it is.

        Raises ScopeError where it has none, UnknownExpert for a name that it has not, WeightingError for the last one.
        """
        if any(part.per_expert is None for part in self.parts):
            raise ScopeError(
                f"router {self.name!r} weighs all its experts together, and has no meaning without {name!r}: make one for "
                "the smaller pool, and fit() it where it is a learned one"
            )
        return without_rows(self, name)

    def fit(self, *given: Any, **settings: Any) -> Self:
        """Trains a router that learns; TrainingError for one that reads all that it knows off the adapters."""
        raise TrainingError(f"router {self.name!r} learns nothing, so there is nothing to fit: activate() it as it is")

    def save_pretrained(self, folder: str | Path, *, pool: ExpertPool | None = None) -> Path:
        """Writes router.json and router.safetensors, and with `pool` the adapters of its experts, as PEFT folders.

        `lw.router(folder)` reads it again. The folder appears whole or not at all. Raises WeightingError for a folder that
        holds something else, and for a pool without its experts.
        """
        return write_router(self, Path(folder), pool)

    def push_to_hub(
        self,
        repository: str,
        *,
        pool: ExpertPool | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Puts what `save_pretrained` writes into `owner/name` of the model hub, with a card; returns the commit's id.

        A repository that is made is as the owner's settings have it, unless `private` says. `lw.router("owner/name")` reads
        it again. Raises HubReadOnly where the token may not write there, SourceUnavailable for what may work later,
        AdapterNotFound for an id of another form.
        """
        with TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "router", pool=pool)
            (folder / "README.md").write_text(router_card(self, repository, with_pool=pool is not None), encoding="utf-8")
            message = commit_message or f"router {self.name} for {len(self.experts)} experts"
            return upload(folder, repository, token=token, private=private, message=message)


def option_names(router: type[TokenRouter]) -> list[str]:
    """The names of the options that a router takes."""
    parameters = inspect.signature(router).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is inspect.Parameter.KEYWORD_ONLY]


def by_layer(pool: ExpertPool | Members, make: Callable[[ExpertPool, str], Tensor]) -> Mapping[str, Tensor]:
    """What `make` gives for each layer of a pool; nothing where there is no pool yet, only its members."""
    if isinstance(pool, Members):
        return {}
    return {layer: make(pool, layer) for layer in Members.of(pool).layers}
