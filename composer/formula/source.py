"""Where a formula finds its adapters: in a hub, by name and version and with its compositions, or in a pool, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from loraweave.common.names import unknown_expert
from loraweave.composer.compose.saved import FORMAT_WITH_MEMBERS, FORMAT_WITH_ROUTER, SavedRecipe
from loraweave.composer.formula.nodes import Named, Stored
from loraweave.errors import AdapterNotFound, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.hub.compositions import StoredComposition
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router as read_router

Given = Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]

# {hash of a stored composition: hash of its adapter}, since a server asks at every request; emptied when it is full
_CONTENTS: dict[str, str] = {}
_MAX_CONTENTS = 4096


class PoolSource:
    """The adapters of a pool, which has no versions of its own and no compositions: both are experts under their text."""

    def __init__(self, pool: ExpertPool) -> None:
        self.pool = pool

    def require(self, leaf: Named | Stored) -> None:
        """Raises UnknownExpert, which names near misses, for one that the pool does not have."""
        if leaf.key in self.pool.names:
            return
        if leaf.key != getattr(leaf, "name", None):
            raise AdapterNotFound(
                f"the pool has no expert {leaf.key!r}, and versions and compositions are a hub's: pass the hub, or the "
                "formula's own pool, formula.pool(hub)"
            )
        raise unknown_expert(leaf.key, self.pool.names)

    def adapter(self, leaf: Named | Stored) -> Adapter:
        """The adapter under the name that the formula has for it."""
        self.require(leaf)
        found = self.pool[leaf.key]
        return found if found.name == leaf.key else replace(found, name=leaf.key)

    def content(self, leaf: Named | Stored) -> str:
        """The hash of the adapter's content."""
        self.require(leaf)
        return self.pool[leaf.key].hash

    def stored(self, leaf: Stored) -> StoredComposition | None:
        """None: what a pool has under such a name is an adapter."""
        return None


class HubSource:
    """The adapters and compositions of a hub as they are now."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    def require(self, leaf: Named | Stored) -> None:
        """Raises AdapterNotFound, which names near misses, for one that the hub does not have."""
        if isinstance(leaf, Stored):
            self.hub.composition(leaf.name)
        else:
            self.content(leaf)

    def adapter(self, leaf: Named | Stored) -> Adapter:
        """The adapter under the name that the formula has for it. ScopeError for a composition that is none."""
        if isinstance(leaf, Stored):
            return _adapter_of(self.hub.composition(leaf.name), leaf)
        found = self.hub.get(leaf.name, version=leaf.version)
        return found if found.name == leaf.key else replace(found, name=leaf.key)

    def content(self, leaf: Named | Stored) -> str:
        """The hash of the adapter's content; no adapter of the hub is opened, and a stored composition's only once."""
        if isinstance(leaf, Stored):
            stored = self.hub.composition(leaf.name).hash
            found = _CONTENTS.get(stored)
            if found is None:
                found = self.adapter(leaf).hash
                if len(_CONTENTS) >= _MAX_CONTENTS:
                    _CONTENTS.clear()
                _CONTENTS[stored] = found
            return found
        if leaf.version is None:
            return self.hub.record(leaf.name).hash
        versions = {record.version: record.hash for record in self.hub.history(leaf.name)}
        if leaf.version not in versions:
            listed = ", ".join(map(str, versions))
            raise AdapterNotFound(f"adapter {leaf.name!r} has no version {leaf.version}; it has {listed}")
        return versions[leaf.version]

    def stored(self, leaf: Stored) -> StoredComposition | None:
        """The composition that the hub keeps."""
        return self.hub.composition(leaf.name)


Source = HubSource | PoolSource


def source_of(given: Given | Source) -> Source:
    """Where to look. Raises WeightingError for anything but a hub, a pool, a list or a mapping of adapters."""
    if isinstance(given, HubSource | PoolSource):
        return given
    return HubSource(given) if isinstance(given, Hub) else PoolSource(ExpertPool.of(given))


def is_base(stored: StoredComposition) -> bool:
    """Whether a stored composition is the base model itself."""
    folders = ("adapter/", "router/", "member-0/")
    return stored.formula is None and not any(path.startswith(folders) for path in stored.files)


def has_router(stored: StoredComposition) -> bool:
    """Whether a router weighs in a stored composition."""
    return stored.recipe.get("format") == FORMAT_WITH_ROUTER


def has_members(stored: StoredComposition) -> bool:
    """Whether a stored composition is an average of members."""
    return stored.recipe.get("format") == FORMAT_WITH_MEMBERS


def router_of(stored: StoredComposition) -> TokenRouter:
    """The router of a stored composition, with its adapters as `pool`."""
    with stored.unpacked() as folder:
        return read_router(folder / "router")


def _adapter_of(stored: StoredComposition, leaf: Stored) -> Adapter:
    with stored.unpacked() as folder:
        recipe = SavedRecipe.read(folder)
        if has_router(stored):
            raise ScopeError(f"{leaf} is a router, not an adapter, and stands alone: activate formula.mixture(hub)")
        if names := recipe.member_names:
            raise ScopeError(
                f"{leaf} is an average of {' and '.join(names)}, whose members answer apart: write it to a "
                "folder by hub.composition(name).write(folder), and read it by Composition.from_pretrained"
            )
        return Adapter.from_pretrained(folder / "adapter", name=leaf.key)
