"""The base class of routers that look at a layer's input: their experts and options, how they are saved, grown and moved."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

import loraweave.registry as registry
from loraweave.common.options import Declared, options_of
from loraweave.errors import BaseModelMismatch, ScopeError, TrainingError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.hub.sources import README, push
from loraweave.routers.combined import begin, derive, known_as, needs_call
from loraweave.routers.tokens._members import LayerTensors, Members, find_names
from loraweave.routers.tokens._written import router_card, write_router
from loraweave.routers.weights import Router


class TokenRouter(Declared, nn.Module):
    """A router that computes w_BTE from each layer's input x_BTI. Its experts are a pool's, in the pool's order.

    A subclass takes the pool, and its own options as keywords. It keeps each option as an attribute of the same name, and
    all its tensors as parameters and buffers (`LayerTensors` for one tensor per layer). Made from `Members` alone it has no
    tensors of experts; loading a file adds them. Raises WeightingError for an option outside its annotated kind. A layer's
    weights count only for the experts that update it (`self.members.layers[layer].experts`).
    """

    noun: ClassVar[str] = "router"
    # whether fit() is needed before the weights mean anything
    learned: ClassVar[bool] = False
    # whether the weights of every token sum to 1
    simplex: bool = True
    # {tensor whose rows belong to experts: tensor that says to which, or None where row e belongs to expert e}; None for a
    # router that weighs all experts together, so that none can join or leave
    per_expert: ClassVar[Mapping[str, str | None] | None] = None
    # options that cannot exceed the number of experts
    counts: ClassVar[tuple[str, ...]] = ()

    # the report of its training, as JSON
    report: Mapping[str, Any] | None = None
    # the adapters saved in its folder, if any
    pool: ExpertPool | None = None

    def __new__(cls, pool: Any = None, *rest: Any, **options: Any) -> Self:
        made = super().__new__(cls, pool, *rest, **options)
        for option in cls.counts:
            if (count := options.get(option)) is not None and count > len(pool.names):
                raise WeightingError(
                    f"router {cls.registered_name()!r} got {option}={count}, but the pool has {len(pool.names)} experts; it "
                    "takes a whole number from 1 to that"
                )
        return made

    def __init__(self, pool: ExpertPool | Members) -> None:
        super().__init__()
        self.members = Members.of(pool)

    @property
    def name(self) -> str:
        """The router's name in the registry."""
        return self.registered_name()

    @property
    def experts(self) -> tuple[str, ...]:
        return self.members.names

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers that some expert updates."""
        return tuple(self.members.layers)

    @property
    def options(self) -> dict[str, Any]:
        """The options that the router was made with, by name."""
        return {name: getattr(self, name) for name in option_names(type(self))}

    @property
    def needs_call(self) -> bool:
        """True if `begin` must show the router each call of the model before the router can weigh inputs."""
        return type(self).begin is not TokenRouter.begin

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        """Return the router for one call of the model with `arguments`, {name: value}; by default itself."""
        return self

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE in fp32 or better; row b depends on row b of x alone."""
        raise NotImplementedError

    def require_pool(self, pool: ExpertPool) -> None:
        """Raise WeightingError unless the pool's names, contents and order match, BaseModelMismatch for another base."""
        members = self.members
        if pool.names != members.names:
            raise WeightingError(
                f"router {self.name!r} is for experts {members.names}, but the pool has {pool.names}, in this order; make "
                "the router for this pool, or swap() to pool.subset(router.experts)"
            )
        for name, digest in zip(members.names, members.hashes, strict=True):
            if (pool_digest := pool.adapters[name].hash) != digest:
                raise WeightingError(
                    f"router {self.name!r} was made for an expert {name!r} with hash {digest}, but the pool's has "
                    f"{pool_digest}; give it the adapter it was made for, or make the router for this pool"
                )
        if why := members.base.differs(Members.of(pool).base):
            raise BaseModelMismatch(f"router {self.name!r} was made for another base model than the pool's: {why}")

    def require_engine(self, engine: Any) -> None:
        """Raise WeightingError or BaseModelMismatch unless a Composer has the router's experts, bound to its base or not."""
        bound: ExpertPool = engine.bound_pool
        self.require_pool(bound if self.members.same_experts(bound) else engine.pool)

    def onto(self, pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]) -> TokenRouter:
        """Return this router for a pool that has its experts in another order, under other names, or among other experts.

        Experts are recognised by content; experts that the router does not know get weight 0. Raises WeightingError, listing
        the differences, if the pool lacks some of its experts, and BaseModelMismatch for a pool of another base.
        """
        expert_pool = ExpertPool.of(pool)
        names = tuple(find_names(self.members, expert_pool, self.name))
        return self if names == self.experts == expert_pool.names else _Placed(self, expert_pool, names)

    @property
    def watched(self) -> tuple[str, ...]:
        """The paths of the blocks whose input the router reads (`running_block` returns that input)."""
        return ()

    @property
    def parts(self) -> list[TokenRouter]:
        """The router itself and the routers that it is made of."""
        return [part for part in self.modules() if isinstance(part, TokenRouter)]

    def alone(self, pool: ExpertPool) -> Self:
        """Return a router with these options for a pool of one expert, whose tensors `add_expert` takes over."""
        options = {name: value for name, value in self.options.items() if name not in self.counts}
        return type(self)(pool, **options)

    def add_expert(self, name: str, adapter: Adapter) -> Self:
        """Return a router with one more expert at the end; this router is unchanged.

        The other experts keep their rows of the `per_expert` tensors. Raises ScopeError if they would have to be trained
        again, WeightingError for a name that is taken, BaseModelMismatch or LayerMismatch for an adapter that does not fit.
        """
        if any(part.per_expert is None for part in self.parts):
            raise ScopeError(
                f"router {self.name!r} weighs all its experts together, and cannot take {name!r} beside them: make one for "
                "the larger pool, and fit() it where it is a learned one"
            )
        return with_rows(self, name, adapter)

    def remove_expert(self, name: str) -> Self:
        """Return a router without one expert and otherwise the same; this router is unchanged.

        Raises ScopeError if the weights of the other experts depend on it, UnknownExpert for an unknown name, WeightingError
        for the last expert.
        """
        if any(part.per_expert is None for part in self.parts):
            raise ScopeError(
                f"router {self.name!r} weighs all its experts together, and has no meaning without {name!r}: make one for "
                "the smaller pool, and fit() it where it is a learned one"
            )
        return without_rows(self, name)

    def fit(self, *arguments: Any, **settings: Any) -> Self:
        """Train a router that learns. Raises TrainingError for a router that computes everything from the adapters."""
        raise TrainingError(f"router {self.name!r} learns nothing, so there is nothing to fit: activate() it as it is")

    def save_pretrained(self, folder: str | Path, *, pool: ExpertPool | None = None) -> Path:
        """Write router.json and router.safetensors, and with `pool` its experts' adapters as PEFT folders.

        `lw.router(folder)` reads the folder, which appears whole or not at all. Raises WeightingError if the folder holds
        something else or the pool lacks its experts, ScopeError for a class outside routers/, which lw.router() could not
        find.
        """
        known = registry.get("routers", self.name) if self.name in registry.names("routers") else None
        if type(self) not in (known, getattr(known, "token_router", None)):
            raise ScopeError(
                f"router {type(self).__name__} is in no file of routers/, so lw.router() could not read it again: keep its "
                "state_dict() with safetensors, and make it again"
            )
        kept: dict[str, Any] = {"options": self.options, "members": self.members, "report": self.report}
        return write_router(Path(folder), pool, name=self.name, tensors=self.state_dict(), **kept)

    def save_whole(self, folder: str | Path) -> Path:
        """Save as `save_pretrained` does, with the adapters of `self.pool`, for a hub. Raises ScopeError without a pool."""
        if self.pool is None:
            raise ScopeError(
                f"router {self.name!r} has no adapters of its own, without which nothing can be mixed: give the folder of "
                "router.save_pretrained(folder, pool=pool)"
            )
        return self.save_pretrained(folder, pool=self.pool)

    def push_to_hub(
        self,
        repository: str,
        *,
        pool: ExpertPool | None = None,
        token: str | None = None,
        private: bool | None = None,
        commit_message: str | None = None,
    ) -> str:
        """Upload what `save_pretrained` writes, with a card, to `owner/name` on the model hub; return the commit's id.

        A new repository is public or private as the owner's settings say, unless `private` does. `lw.router("owner/name")`
        reads it back. Raises HubReadOnly if the token may not write there, SourceUnavailable if a retry may help,
        AdapterNotFound for an id of another form.
        """

        def write(folder: Path) -> None:
            self.save_pretrained(folder, pool=pool)
            card = router_card(self.name, self.members, repository, with_pool=pool is not None)
            (folder / README).write_text(card, encoding="utf-8")

        message = commit_message or f"router {self.name} for {len(self.experts)} experts"
        return push(write, repository, token=token, private=private, message=message)


def option_names(router: type[TokenRouter]) -> list[str]:
    """Return the names of a router's options."""
    return list(options_of(router, after=1))


class _Placed(TokenRouter):
    """A wrapper of `router` for a larger or reordered pool, whose other experts get weight 0; saved as `router` alone."""

    place_P: Tensor

    def __init__(self, router: TokenRouter, pool: ExpertPool, names: tuple[str, ...]) -> None:
        super().__init__(pool)
        self.router = router
        # in layers that the router does not know all weights are 0
        self.simplex = router.simplex and set(self.layers) <= set(router.layers)
        self._names_of_own = dict(zip(router.experts, names, strict=True))
        self._own = ExpertPool({expert: pool.adapters[name] for expert, name in zip(router.experts, names, strict=True)})
        self.register_buffer("place_P", torch.tensor([pool.places[name] for name in names]), persistent=False)

    @property
    def name(self) -> str:
        return self.router.name

    @property
    def options(self) -> dict[str, Any]:
        return self.router.options

    @property
    def needs_call(self) -> bool:
        return needs_call(self.router)

    def begin(self, model: Any, arguments: Mapping[str, Any]) -> Router:
        with known_as(self._names_of_own):
            of_call = begin(self.router, model, arguments)
        return self if of_call is self.router else derive(of_call, self._spread)

    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return self._spread(self.router, x_BTI, layer)

    def _spread(self, router: Router, x_BTI: Tensor, layer: str) -> Tensor:
        """Return w_BTE over the pool's experts, from `router`'s weights for its own experts."""
        if layer not in self.router.members.layers:
            return x_BTI.new_zeros(1, 1, len(self.experts), dtype=torch.float32)
        w_BTP = router.weights(x_BTI, layer)
        return w_BTP.new_zeros(*w_BTP.shape[:2], len(self.experts)).index_copy(2, self.place_P.to(w_BTP.device), w_BTP)

    def save_pretrained(self, folder: str | Path, *, pool: ExpertPool | None = None) -> Path:
        return self.router.save_pretrained(folder, pool=None if pool is None else self._own)


R = TypeVar("R", bound="TokenRouter")
# {layer: tensor}; the key "" where one tensor serves all layers
Tables = dict[str, Tensor]


def without_rows(router: R, name: str) -> R:
    """Return a copy without one expert and its rows of the `per_expert` tensors, all other rows the same, bit for bit."""
    members, gone = router.members.without(name), router.members.places[name]
    copy = deepcopy(router)
    copy.pool = None if router.pool is None else router.pool.without(name)
    for old, part in zip(router.parts, copy.parts, strict=True):
        part.members = members
        for table, owner in (part.per_expert or {}).items():
            owners = _owners_of(old, table, owner)
            kept = {layer: rows[owners[layer] != gone] for layer, rows in _tables(old, table).items()}
            _put_tables(part, table, {layer: rows for layer, rows in kept.items() if not layer or layer in members.layers})
        for owner in _owner_tables(part):
            owners = {layer: owner_S[owner_S != gone] for layer, owner_S in _tables(old, owner).items()}
            shifted = {layer: owner_S - (owner_S > gone).to(owner_S.dtype) for layer, owner_S in owners.items()}
            _put_tables(part, owner, {layer: owner_S for layer, owner_S in shifted.items() if layer in members.layers})
        for count in part.counts:
            if (chosen := getattr(part, count)) is not None:
                setattr(part, count, min(chosen, len(members.names)))
    return copy


def with_rows(router: R, name: str, adapter: Adapter) -> R:
    """Return a copy with one more expert, whose rows of the `per_expert` tensors come from a router for it alone.

    All other rows stay the same.
    """
    members, place = router.members.including(name, adapter), len(router.experts)
    alone = router.alone(ExpertPool({name: adapter}))
    copy = deepcopy(router)
    copy.pool = None if router.pool is None else router.pool.including(name, adapter)
    for old, new, part in zip(router.parts, alone.parts, copy.parts, strict=True):
        part.members = members
        for table, owner in (part.per_expert or {}).items():
            counts = (place, 1) if owner is None else (0, 0)
            _put_tables(part, table, _join_rows(_tables(old, table), _tables(new, table), counts))
        for owner in _owner_tables(part):
            later = {layer: owner_S + place for layer, owner_S in _tables(new, owner).items()}
            _put_tables(part, owner, _join_rows(_tables(old, owner), later, (0, 0)))
    return copy


def _owner_tables(part: TokenRouter) -> list[str]:
    return list(dict.fromkeys(owner for owner in (part.per_expert or {}).values() if owner is not None))


def _owners_of(part: TokenRouter, table: str, owner: str | None) -> Tables:
    """Return {layer: the index of the expert that owns each row of a table}."""
    if owner is not None:
        return _tables(part, owner)
    return {layer: torch.arange(len(rows), device=rows.device) for layer, rows in _tables(part, table).items()}


def _join_rows(first: Tables, second: Tables, num_rows: tuple[int, int]) -> Tables:
    """Stack the rows of both tables by layer.

    A layer that the first or second table lacks has `num_rows[0]` or `num_rows[1]` rows of zeros instead.
    """
    joined = {}
    for layer in dict.fromkeys([*first, *second]):
        like = first[layer] if layer in first else second[layer]
        above, below = (
            rows[layer].to(like) if layer in rows else like.new_zeros(count, *like.shape[1:])
            for rows, count in zip((first, second), num_rows, strict=True)
        )
        joined[layer] = torch.cat([above, below])
    return joined


def _tables(part: TokenRouter, name: str) -> Tables:
    held = getattr(part, name)
    if isinstance(held, LayerTensors):
        return {layer: held[layer].detach() for layer in held}
    return {"": held.detach()}


def _put_tables(part: TokenRouter, name: str, tables: Mapping[str, Tensor]) -> None:
    held = getattr(part, name)
    if not isinstance(held, LayerTensors):
        setattr(part, name, nn.Parameter(tables[""]) if isinstance(held, nn.Parameter) else tables[""])
        return
    for layer in [layer for layer in held if layer not in tables]:
        del held[layer]
    for layer, rows in tables.items():
        held[layer] = rows
