"""Where a pool has the experts of a router: known by their content, whatever their names and order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraweave.errors import BaseModelMismatch, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.routing.members import Members

if TYPE_CHECKING:
    from loraweave.routers.routing.token_router import TokenRouter

NUM_SHOWN = 6


def places_in(router: TokenRouter, pool: ExpertPool) -> list[str]:
    """The pool's name of each of the router's experts, in the router's order.

    Raises BaseModelMismatch for a pool of another base, WeightingError, which lists the differences, for one without
    some of the experts.
    """
    own, other = router.members, Members.of(pool)
    if why := own.base.differs(other.base):
        raise BaseModelMismatch(f"router {router.name!r} was made for another base model than the pool's: {why}")
    found = _matched(own, other)
    if None in found:
        raise WeightingError(
            f"router {router.name!r} is for other experts than the pool's: {_differences(own, other, found)}"
        )
    return [name for name in found if name is not None]


def _matched(own: Members, other: Members) -> list[str | None]:
    """For each expert the one of the same content: under its own name if that is one, else the first not taken yet."""
    by_hash: dict[str, list[str]] = {}
    for name, digest in zip(other.names, other.hashes, strict=True):
        by_hash.setdefault(digest, []).append(name)
    found: list[str | None] = []
    for name, digest in zip(own.names, own.hashes, strict=True):
        same = by_hash.get(digest, [])
        chosen = name if name in same else next((one for one in same if one not in own.places), None)
        found.append(chosen or (same[0] if same else None))
        if found[-1] is not None:
            same.remove(found[-1])
    return found


def _differences(own: Members, other: Members, found: Sequence[str | None]) -> str:
    lacking = [name for name, place in zip(own.names, found, strict=True) if place is None]
    missing = [name for name in lacking if name not in other.places]
    changed = [name for name in lacking if name in other.places]
    extra = [name for name in other.names if name not in found and name not in own.places]
    groups = (("missing from the pool", missing), ("of other content there", changed), ("not known to the router", extra))
    listed = "; ".join(f"{what}: {_some(names)}" for what, names in groups if names)
    layers = sorted(set(own.layers) ^ set(other.layers))
    apart = f"; {len(layers)} layers are updated by one of the two alone, the first {layers[0]!r}" if layers else ""
    return (
        f"{listed}{apart}. Give it the adapters that it was made for (a folder saved with pool= has them), or make a router "
        "for this pool"
    )


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return ", ".join(map(repr, names[:NUM_SHOWN])) + more
