"""A composition as text: which adapters, how much of each, and how they are put together.

Its adapters are those of a hub, which is read by name and version, compositions included, or of a pool, by name.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

from loraweave.common.files import as_path, replacing
from loraweave.common.names import MAX_NAME_CHARACTERS, text_digest, unknown_expert
from loraweave.composer.compose.report import FILE as COMPOSITION
from loraweave.composer.compose.report import FORMAT_WITH_ROUTER, PARTS, SavedRecipe
from loraweave.composer.formula.nodes import (
    AROUND,
    MAX_CHARACTERS,
    Argument,
    Auto,
    Content,
    Ensemble,
    Leaf,
    Merge,
    Named,
    Root,
    Routed,
    Stored,
    Sum,
    as_sum,
    ensemble_of,
    exact,
    leaves,
    misplaced,
    plain,
    replaced,
    tokens,
)
from loraweave.composer.formula.parser import Expansion, Parser
from loraweave.composer.merge.merge import merge
from loraweave.errors import AdapterNotFound, FormulaError, ScopeError, UnknownExpert, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.compositions import StoredComposition
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router as make_router
from loraweave.routers.tokens._written import FILE as ROUTER

FILE, FORMAT = "formula.json", 1
HubOrPool = Hub | ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]

# {hash of a stored composition: hash of its adapter}, since a server asks at every request; emptied when it is full
_CONTENTS: dict[str, str] = {}
_MAX_CONTENTS = 4096


def parse(text: str) -> Formula:
    """Return the composition that a formula states, such as "0.7*a + 0.3*ties(b, c; density=0.5)".

    `a`, `'any text'`: an adapter. `a@3`: its version 3. `@name`: a composition that the hub keeps. `method(a, b; option=1)`:
    a merge by a name of `names("methods")`, of equal shares or with a weight for each. Alone: `router(a, b; option=1)`, a
    router of `names("routers")`; `ensemble(a, b)`, whose members' probabilities are averaged; `auto`, retrieval for each
    request; `base`, the base model. Docs: docs/formulas.md.

    Raises FormulaError, whose message ends in the formula with a caret under the faulty piece, for what cannot be read,
    unknown methods, routers and options, numbers that are not finite, and above the limits: 4096 characters, 64 adapters,
    brackets 8 deep. The adapters are looked up only when they are used.
    """
    if not isinstance(text, str):
        raise FormulaError(f"a formula is text such as '0.7*a + 0.3*b', not {type(text).__name__} {text!r:.60}")
    if len(text) > MAX_CHARACTERS:
        raise FormulaError(f"a formula has at most {MAX_CHARACTERS} characters, not {len(text)}: {text[:AROUND]!a} ...")
    # as names are
    whole = unicodedata.normalize("NFC", text)
    return _within_limits(Formula(Parser(whole).root(), whole))


@dataclass(frozen=True)
class Formula:
    """A composition as a value: two formulas that say the same are equal, whatever their spelling; `parse` makes one.

    `root` is its canonical form, `text` what was written. Where a method takes `hub_or_pool`, that is a Hub, an ExpertPool,
    or a list or mapping of adapters; FormulaError shows the place of a missing adapter, with near misses.
    """

    root: Root
    text: str = field(default="", compare=False, repr=False)

    @cached_property
    def canonical(self) -> str:
        """The one text that all formulas that say the same share; `parse` reads it back."""
        return str(self.root)

    def __str__(self) -> str:
        return self.canonical

    def __repr__(self) -> str:
        return f"Formula({self.canonical!r})"

    @property
    def is_auto(self) -> bool:
        """True if retrieval chooses the adapters for each request."""
        return self.root == Auto()

    @property
    def is_base(self) -> bool:
        """True if the formula is the base model with nothing added; False for a stored composition before `expand`."""
        return self.root == Sum(())

    def expand(self, hub_or_pool: HubOrPool) -> Formula:
        """Return the formula with its stored formulas written out and stored compositions of the base alone left out.

        Other stored compositions stay as they are. Raises FormulaError, whose cause is AdapterNotFound, for an unknown one,
        and FormulaError for formulas that name each other in a circle, and above the limits.
        """
        source = _source(hub_or_pool)
        if Stored not in map(type, leaves(self.root)):
            return self

        def read(leaf: Stored) -> Root | None:
            with self._at(leaf):
                stored = _stored(source, leaf)
            if stored is None:
                return None
            if stored.formula is not None:
                return parse(stored.formula).root
            folders = ("adapter/", "router/", "member-0/")
            is_base = COMPOSITION in stored.files and not any(path.startswith(folders) for path in stored.files)
            return Sum(()) if is_base else None

        return _within_limits(Formula(Expansion(read).of(self.root), self.text))

    def adapters(self, hub_or_pool: HubOrPool | None = None) -> tuple[str, ...]:
        """Return the sorted names of the adapters that the formula needs; with a hub or pool also those of stored formulas.

        Raises FormulaError for a missing one. Adapters inside stored compositions are not listed.
        """
        known = self
        if hub_or_pool is not None:
            source = _source(hub_or_pool)
            known = self.expand(source)
            for leaf in leaves(known.root):
                with self._at(leaf):
                    if isinstance(leaf, Named) or _stored(source, leaf) is None:
                        _content(source, leaf)
        return tuple(sorted({leaf.name for leaf in leaves(known.root) if isinstance(leaf, Named)}))

    def identity(self, hub_or_pool: HubOrPool) -> str:
        """Return the SHA-256 of the canonical form with the content hash of every adapter in place of its name.

        Formulas of one identity have the same effect on one base model; an adapter whose content has changed makes it
        another. Raises ScopeError for `auto`, which differs for each request.
        """
        source = _source(hub_or_pool)
        known = self.expand(source)
        if (stored := known.stored(source)) is not None:
            return text_digest(f"{'router' if has_router(stored) else 'average'} {stored.hash}")

        def content(leaf: Leaf) -> Content:
            with self._at(leaf):
                return Content(_content(source, leaf))

        match known.root:
            case Auto():
                raise ScopeError("'auto' has no identity: retrieval chooses for each request, and what it chose has one")
            case Routed(router, experts, options):
                said: Root | Merge = Merge(router, tuple(sorted(map(content, experts), key=str)), None, options)
            case Ensemble(members, shares):
                said = ensemble_of([replaced(member, content) for member in members], shares)
            case Sum() as root:
                said = as_sum(replaced(root, content))
        return text_digest(str(said))

    def pool(self, hub_or_pool: HubOrPool) -> ExpertPool:
        """Return the adapters that the formula needs as experts, each opened once, named `a`, `a@3` or `@name`.

        The formula's methods, given this pool, use these very adapters, even if the hub changes. Raises ScopeError for
        `auto` and for the base model, which have no adapters.
        """
        source = _source(hub_or_pool)
        known = self.expand(source)
        if (stored := known.stored(source)) is not None and has_router(stored):
            return cast(ExpertPool, router_of(stored).pool)
        known._require_adapters("be a pool")
        return ExpertPool({leaf.key: self._adapter(source, leaf) for leaf in dict.fromkeys(leaves(known.root))})

    def mixture(self, hub_or_pool: HubOrPool | None = None) -> dict[str, float] | TokenRouter:
        """Return what `Composer.activate` takes: {expert of `pool`: weight} for a plain sum, or the router.

        Routers and stored compositions need the hub or pool. The base model is {}. Raises ScopeError, which names the way
        out, for `auto`, for ensembles and for merges by a method.
        """
        known = self if hub_or_pool is None else self.expand(hub_or_pool)
        if known.is_auto:
            raise ScopeError(_AUTO.format("be a mixture"))
        if hub_or_pool is None:
            if isinstance(known.root, Routed) or any(isinstance(leaf, Stored) for leaf in leaves(known.root)):
                raise ScopeError(f"the mixture of {self} needs its adapters: pass the hub or the pool")
        elif (stored := known.stored(hub_or_pool)) is not None and has_router(stored):
            return router_of(stored)
        weights: dict[str, float] = {}
        match known.root:
            case Routed(router, _, options):
                router_options = {name: plain(value) for name, value in options}
                return make_router(router, self.pool(hub_or_pool), **router_options)  # type: ignore[arg-type]
            case Ensemble():
                raise ScopeError(_ENSEMBLE.format("be one mixture"))
            case Sum(terms):
                for weight, term in terms:
                    if not isinstance(term, Leaf):
                        raise ScopeError(
                            f"{term} is not a weighted sum of adapters: formula.merge(hub) makes it one adapter to activate"
                        )
                    weights[term.key] = weight
        return weights

    def members(self, hub_or_pool: HubOrPool | None = None) -> tuple[tuple[float, Formula], ...]:
        """Return (share, formula) for each member of an ensemble, where shares sum to 1; (1, itself) for other formulas."""
        known = self if hub_or_pool is None else self.expand(hub_or_pool)
        match known.root:
            case Ensemble(members, written):
                shares = [exact(share) for share in written or (1.0,) * len(members)]
                return tuple(
                    (float(share / sum(shares)), Formula(as_sum(member), self.text))
                    for share, member in zip(shares, members, strict=True)
                )
        return ((1.0, known),)

    def stored(self, hub_or_pool: HubOrPool) -> StoredComposition | None:
        """Return the stored composition that is the whole formula if it has a router or parts; else None."""
        match self.root:
            case Sum(terms=((1.0, Stored() as leaf),)):
                stored = _stored(_source(hub_or_pool), leaf)
                return stored if stored is not None and (has_router(stored) or has_parts(stored)) else None
        return None

    def merge(
        self,
        hub_or_pool: HubOrPool,
        *,
        rank: int | None = None,
        name: str | None = None,
        heads: str = "error",
        progress: bool = True,
        allow_licenses: bool = False,
        interference: bool = True,
    ) -> Adapter:
        """Return the one adapter that the formula's sums and methods, nested or not, make by `lw.merge`.

        `rank` cuts the result; `heads` ("error" or "average"), `progress`, `allow_licenses` and `interference` are those of
        `lw.merge`, for every merge in it. `name` is by default the canonical form. Raises ScopeError, which names the way
        out, for routers, `auto` and the base model, and what `lw.merge` raises.
        """
        if heads == "first":
            raise WeightingError("a formula has no first adapter, since a + b is b + a; use heads='average', or lw.merge")
        source = _source(hub_or_pool)
        known = self.expand(source)
        known._require_adapters("be one adapter")
        combine = partial(merge, heads=heads, progress=progress, allow_licenses=allow_licenses, interference=interference)

        def merged(node: Argument, rank: int | None, name: str) -> Adapter:
            match node:
                case Named() | Stored():
                    return self._adapter(source, node)
                case Sum(terms=((1.0, Merge() as only),)):
                    return merged(only, rank, name)
                case Sum(terms):
                    method, parts, weights = "linear", [term for _, term in terms], tuple(weight for weight, _ in terms)
                    options: dict[str, Any] = {"rank": rank}
                case Merge(method, parts, weights, written):
                    options = {option: plain(value) for option, value in written}
                    if rank is not None and options.setdefault("rank", rank) != rank:
                        raise WeightingError(
                            f"rank={rank} is asked for, and the formula has rank={options['rank']}; leave one out"
                        )
                case _:
                    raise TypeError(f"{node} is the content of an adapter, and for identities only")
            adapters = [merged(part, None, _short(str(part))) for part in parts]
            return combine(adapters, weights, method=method, name=name, **options)

        return merged(cast(Sum, known.root), rank, name or _short(known.canonical))

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write formula.json into a folder of its own, which `Hub.save_composition` can keep, and return the folder."""
        target = as_path(folder, "the folder of a formula", FormulaError)
        if target.exists() and any(path.name != FILE for path in target.iterdir()):
            raise FormulaError(f"{target} holds something that is not a formula; name another folder")
        with replacing(target) as new:
            said = {"format": FORMAT, "formula": self.canonical}
            (new / FILE).write_text(json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8")
        return target

    def _require_adapters(self, verb: str) -> None:
        match self.root:
            case Auto():
                raise ScopeError(_AUTO.format(verb))
            case Sum(()):
                raise ScopeError(f"the base model cannot {verb}: it has no adapter; use the model as it is")
            case Ensemble() if verb == "be one adapter":
                raise ScopeError(_ENSEMBLE.format(verb))
            case Routed(router) if verb == "be one adapter":
                raise ScopeError(
                    f"router {router!r} cannot {verb}: what it gives depends on the input. Activate it instead: "
                    "Composer(model, formula.pool(hub)).activate(formula.mixture(hub))"
                )

    def _adapter(self, source: Hub | ExpertPool, leaf: Named | Stored) -> Adapter:
        """Return the adapter under the name that the formula has for it."""
        with self._at(leaf):
            if isinstance(source, ExpertPool):
                adapter = _expert(source, leaf)
            elif isinstance(leaf, Named):
                adapter = source.get(leaf.name, version=leaf.version)
            else:
                adapter = _adapter_of(source.composition(leaf.name), leaf)
        return adapter if adapter.name == leaf.key else replace(adapter, name=leaf.key)

    @contextmanager
    def _at(self, leaf: Named | Stored) -> Iterator[None]:
        """Raise an AdapterNotFound or UnknownExpert about `leaf`, a name in the formula, as a FormulaError at its place."""
        try:
            yield
        except (AdapterNotFound, UnknownExpert) as error:
            dashed = isinstance(leaf, Named) and "-" in leaf.name and str(leaf) == leaf.name
            hint = "; a difference has spaces around its '-'" if dashed else ""
            pieces = tokens(self.text) if self.text else []
            places = (
                piece
                for before, piece in zip([None, *pieces], pieces, strict=False)
                if piece.kind in ("word", "quoted")
                and piece.value == leaf.name
                and (before is not None and before.kind == "@") == isinstance(leaf, Stored)
            )
            raise misplaced(f"{error}{hint}", self.text, next(places, None)) from error


_ENSEMBLE = "an ensemble cannot {}: its members answer apart. formula.members(hub) has them, and lw.ensemble averages"
_AUTO = "'auto' cannot {}: retrieval chooses for each request, by lw.Retriever or lw.compose; a formula of what it took can"


def _within_limits(formula: Formula) -> Formula:
    """Return the formula. Raises FormulaError if its canonical form is above a limit, so that it could not be read back."""
    if len(formula.canonical) > MAX_CHARACTERS:
        raise FormulaError(
            f"written out, this formula has {len(formula.canonical)} characters, above the limit of {MAX_CHARACTERS}: "
            f"{formula.canonical[:60]!a} ..."
        )
    tokens(formula.canonical)
    return formula


def _short(text: str) -> str:
    """Return a formula's text as an adapter's name; a long one is cut and ends in its digest."""
    return text if len(text) <= MAX_NAME_CHARACTERS else f"{text[: MAX_NAME_CHARACTERS - 16]}... {text_digest(text)[:12]}"


def _source(hub_or_pool: HubOrPool) -> Hub | ExpertPool:
    """Return a Hub unchanged, anything else as a pool. Raises WeightingError for anything but adapters."""
    return hub_or_pool if isinstance(hub_or_pool, Hub) else ExpertPool.of(hub_or_pool)


def _stored(source: Hub | ExpertPool, leaf: Stored) -> StoredComposition | None:
    """Return the composition that the formula's name `leaf` has in a hub; None for a pool, which has adapters alone."""
    return source.composition(leaf.name) if isinstance(source, Hub) else None


def _content(source: Hub | ExpertPool, leaf: Leaf) -> str:
    """Return the content hash of the adapter that `leaf` names; only that of a stored composition is opened, and once."""
    if isinstance(source, ExpertPool):
        return _expert(source, leaf).hash
    if isinstance(leaf, Stored):
        stored = source.composition(leaf.name)
        if stored.hash not in _CONTENTS:
            digest = _adapter_of(stored, leaf).hash
            if len(_CONTENTS) >= _MAX_CONTENTS:
                _CONTENTS.clear()
            _CONTENTS[stored.hash] = digest
        return _CONTENTS[stored.hash]
    if leaf.version is None:
        return source.record(leaf.name).hash
    versions = {record.version: record.hash for record in source.history(leaf.name)}
    if leaf.version not in versions:
        listed = ", ".join(map(str, versions))
        raise AdapterNotFound(f"adapter {leaf.name!r} has no version {leaf.version}; it has {listed}")
    return versions[leaf.version]


def _expert(pool: ExpertPool, leaf: Leaf) -> Adapter:
    """Return the expert of the pool that `leaf`, a name in a formula, stands for.

    Raises UnknownExpert, which names near misses; AdapterNotFound for `a@3` and `@name`.
    """
    if leaf.key in pool.adapters:
        return pool.adapters[leaf.key]
    if leaf.key != leaf.name:
        raise AdapterNotFound(
            f"the pool has no expert {leaf.key!r}, and versions and compositions are a hub's: pass the hub, or the "
            "formula's own pool, formula.pool(hub)"
        )
    raise unknown_expert(leaf.key, pool.names)


def has_router(stored: StoredComposition) -> bool:
    """Return True if a stored composition is a router, or has one."""
    return ROUTER in stored.files or (COMPOSITION in stored.files and stored.recipe.get("format") == FORMAT_WITH_ROUTER)


def has_parts(stored: StoredComposition) -> bool:
    """Return True if a stored composition is an average of members, or has steps that answer one after the other."""
    return COMPOSITION in stored.files and stored.recipe.get("format") in PARTS


def router_of(stored: StoredComposition) -> TokenRouter:
    """Return a stored composition's router, with its adapters as `pool`. Raises ScopeError for one saved without them."""
    with stored.unpacked() as folder:
        router = make_router(folder if ROUTER in stored.files else folder / "router")
    if router.pool is None:
        raise ScopeError(
            f"@{stored.name} is a router that was saved without its adapters: save the folder of "
            "router.save_pretrained(folder, pool=pool)"
        )
    return router


def _adapter_of(stored: StoredComposition, leaf: Stored) -> Adapter:
    """Return a stored composition's adapter. Raises ScopeError for a composition that is not one adapter."""
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
