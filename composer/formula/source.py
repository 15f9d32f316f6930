"""The sources of a formula's adapters, a hub or a pool, and how stored formulas are written out inside it.

A hub is read by name and version, compositions included, a pool by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from loraweave.common.names import unknown_expert
from loraweave.composer.compose.saved import FILE as COMPOSITION
from loraweave.composer.compose.saved import FORMAT_WITH_ROUTER, PARTS, SavedRecipe
from loraweave.composer.formula.nodes import (
    Argument,
    Auto,
    Ensemble,
    Leaf,
    Root,
    Routed,
    Stored,
    Sum,
    as_argument,
    as_sum,
    ensemble_of,
    leaves,
    replaced,
)
from loraweave.composer.formula.parser import MAX_ADAPTERS
from loraweave.errors import AdapterNotFound, FormulaError, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.hub.compositions import StoredComposition
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router as read_router
from loraweave.routers.tokens._written import FILE as ROUTER

Given = Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]

# {hash of a stored composition: hash of its adapter}, since a server asks at every request; emptied when it is full
_CONTENTS: dict[str, str] = {}
_MAX_CONTENTS = 4096


class PoolSource:
    """The adapters of a pool. It keeps no versions and no compositions: `a@3` and `@name` are experts of these names."""

    def __init__(self, pool: ExpertPool) -> None:
        self.pool = pool

    def require(self, leaf: Leaf) -> None:
        """Raise UnknownExpert, with near misses, for an adapter that is not there; AdapterNotFound for `a@3` and `@name`."""
        if leaf.key in self.pool.names:
            return
        if leaf.key != leaf.name:
            raise AdapterNotFound(
                f"the pool has no expert {leaf.key!r}, and versions and compositions are a hub's: pass the hub, or the "
                "formula's own pool, formula.pool(hub)"
            )
        raise unknown_expert(leaf.key, self.pool.names)

    def adapter(self, leaf: Leaf) -> Adapter:
        """Return the adapter under the name that the formula has for it."""
        self.require(leaf)
        adapter = self.pool[leaf.key]
        return adapter if adapter.name == leaf.key else replace(adapter, name=leaf.key)

    def content(self, leaf: Leaf) -> str:
        """Return the hash of the adapter's content."""
        self.require(leaf)
        return self.pool[leaf.key].hash

    def stored(self, leaf: Stored) -> StoredComposition | None:
        """Return None: what a pool has under such a name is an adapter."""
        return None


class HubSource:
    """The adapters and compositions of a hub as they are now."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def require(self, leaf: Leaf) -> None:
        """Raise AdapterNotFound, which names near misses, for a leaf that the hub does not have."""
        if isinstance(leaf, Stored):
            self.hub.composition(leaf.name)
        else:
            self.content(leaf)

    def adapter(self, leaf: Leaf) -> Adapter:
        """Return the adapter under the name that the formula has for it. Raises ScopeError if a composition is none."""
        if isinstance(leaf, Stored):
            return _adapter_of(self.hub.composition(leaf.name), leaf)
        adapter = self.hub.get(leaf.name, version=leaf.version)
        return adapter if adapter.name == leaf.key else replace(adapter, name=leaf.key)

    def content(self, leaf: Leaf) -> str:
        """Return the hash of the adapter's content. Only a stored composition's adapter is opened for that, and once."""
        if isinstance(leaf, Stored):
            stored = self.hub.composition(leaf.name).hash
            digest = _CONTENTS.get(stored)
            if digest is None:
                digest = self.adapter(leaf).hash
                if len(_CONTENTS) >= _MAX_CONTENTS:
                    _CONTENTS.clear()
                _CONTENTS[stored] = digest
            return digest
        if leaf.version is None:
            return self.hub.record(leaf.name).hash
        versions = {record.version: record.hash for record in self.hub.history(leaf.name)}
        if leaf.version not in versions:
            listed = ", ".join(map(str, versions))
            raise AdapterNotFound(f"adapter {leaf.name!r} has no version {leaf.version}; it has {listed}")
        return versions[leaf.version]

    def stored(self, leaf: Stored) -> StoredComposition | None:
        """Return the composition that the hub keeps under the leaf's name."""
        return self.hub.composition(leaf.name)


Source = HubSource | PoolSource


def source_of(given: Given | Source) -> Source:
    """Return the source to look in. Raises WeightingError for anything but a hub, a pool, a list or mapping of adapters."""
    if isinstance(given, HubSource | PoolSource):
        return given
    return HubSource(given) if isinstance(given, Hub) else PoolSource(ExpertPool.of(given))


def is_base(stored: StoredComposition) -> bool:
    """Return whether a stored composition is the base model itself."""
    folders = ("adapter/", "router/", "member-0/")
    return COMPOSITION in stored.files and not any(path.startswith(folders) for path in stored.files)


def has_router(stored: StoredComposition) -> bool:
    """Return whether a router weighs in a stored composition, or is all of it."""
    return ROUTER in stored.files or (COMPOSITION in stored.files and stored.recipe.get("format") == FORMAT_WITH_ROUTER)


def has_parts(stored: StoredComposition) -> bool:
    """Return whether a stored composition is an average of members, or steps one after the other."""
    return COMPOSITION in stored.files and stored.recipe.get("format") in PARTS


def router_of(stored: StoredComposition) -> TokenRouter:
    """Return a stored composition's router, with its adapters as `pool`. Raises ScopeError for one saved without them."""
    with stored.unpacked() as folder:
        router = read_router(folder if ROUTER in stored.files else folder / "router")
    if router.pool is None:
        raise ScopeError(
            f"@{stored.name} is a router that was saved without its adapters: save the folder of "
            "router.save_pretrained(folder, pool=pool)"
        )
    return router


def _adapter_of(stored: StoredComposition, leaf: Stored) -> Adapter:
    if has_router(stored):
        raise ScopeError(f"{leaf} is a router, not an adapter, and stands alone: activate formula.mixture(hub)")
    if COMPOSITION not in stored.files:
        raise ScopeError(
            f"{leaf} is a pool in shared bases, not an adapter: read it by JointPool.from_pretrained, from the folder of "
            "hub.composition(name).write(folder)"
        )
    with stored.unpacked() as folder:
        recipe = SavedRecipe.read(folder)
        if names := recipe.part_names:
            raise ScopeError(
                f"{leaf} has the {recipe.parts} {' and '.join(names)}, which answer apart: write it to a folder by "
                "hub.composition(name).write(folder), and read it by Composition.from_pretrained"
            )
        return Adapter.from_pretrained(folder / "adapter", name=leaf.key)


class Expansion:
    """The writing out of stored formulas: `find` returns a stored composition, or None to leave it; `read` a text's root.

    Each stored formula is read once. Raises FormulaError for a circle, for a router or `auto` inside something else, and
    above the limit of adapters.
    """

    def __init__(self, find: Callable[[Stored], StoredComposition | None], read: Callable[[str], Root]) -> None:
        self.find = find
        self.read = read
        self.known: dict[str, Root | None] = {}
        self.inside: list[str] = []

    def of(self, root: Root) -> Root:
        """Return the root without stored formulas, and without stored compositions that are the base."""
        match root:
            case Auto():
                return root
            case Routed():
                experts = [self._expert(root, expert) for expert in root.experts]
                if len(set(experts)) < len(experts):
                    raise FormulaError(f"{root} has an expert twice when its stored formulas are written out")
                return Routed(root.router, tuple(sorted(experts, key=str)), root.options)
            case Ensemble():
                members = [replaced(member, self._leaf) for member in root.members]
                return self._within(root, ensemble_of(members, root.shares))
            case Sum(terms=((1.0, Stored() as leaf),)):
                stored_root = self._stored(leaf)
                return root if stored_root is None else stored_root
        expanded = replaced(root, self._leaf)
        return self._within(root, as_sum(expanded))

    @staticmethod
    def _within(root: Root, whole: Root) -> Root:
        if (count := len(leaves(whole))) > MAX_ADAPTERS:
            raise FormulaError(f"{root} has {count} adapters when its stored formulas are written out, above {MAX_ADAPTERS}")
        return whole

    def _leaf(self, leaf: Leaf) -> Argument:
        stored_root = self._stored(leaf) if isinstance(leaf, Stored) else None
        if stored_root is None:
            return leaf
        if not isinstance(stored_root, Sum):
            raise FormulaError(f"{leaf} is {stored_root}, which stands alone: it can be no part of a formula")
        return as_argument(stored_root)

    def _expert(self, root: Routed, leaf: Leaf) -> Leaf:
        expert = self._leaf(leaf)
        if not isinstance(expert, Leaf):
            raise FormulaError(
                f"{leaf} is {expert}, and an expert of {root.router!r} is one adapter; add its merge to the hub"
            )
        return expert

    def _stored(self, leaf: Stored) -> Root | None:
        """Return the root of a stored formula, written out; None for a composition that is no formula."""
        if leaf.name in self.inside:
            circle = " -> ".join(f"@{name}" for name in [*self.inside, leaf.name])
            raise FormulaError(f"stored formulas name each other in a circle: {circle}; save one of them again")
        if leaf.name not in self.known:
            composition = self.find(leaf)
            self.inside.append(leaf.name)
            if composition is None or (composition.formula is None and not is_base(composition)):
                self.known[leaf.name] = None
            else:
                self.known[leaf.name] = Sum(()) if composition.formula is None else self.of(self.read(composition.formula))
            self.inside.pop()
        return self.known[leaf.name]
