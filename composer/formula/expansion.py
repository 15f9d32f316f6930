"""Stored formulas written out inside the formula that names them."""

from __future__ import annotations

from collections.abc import Callable

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
from loraweave.composer.formula.source import is_base
from loraweave.errors import FormulaError
from loraweave.hub.compositions import StoredComposition


class Expansion:
    """Writes out stored formulas; `find` gives a stored composition, None to leave it as it is, `read` the root of a text.

    Each stored formula is read once. Raises FormulaError for a circle, for a router or `auto` inside something else, and
    above the limit of adapters.
    """

    def __init__(self, find: Callable[[Stored], StoredComposition | None], read: Callable[[str], Root]) -> None:
        self.find = find
        self.read = read
        self.known: dict[str, Root | None] = {}
        self.inside: list[str] = []

    def of(self, root: Root) -> Root:
        """The root without stored formulas and stored compositions that are the base."""
        match root:
            case Auto():
                return root
            case Routed():
                experts = [self._expert(root, each) for each in root.experts]
                if len(set(experts)) < len(experts):
                    raise FormulaError(f"{root} has an expert twice when its stored formulas are written out")
                return Routed(root.router, tuple(sorted(experts, key=str)), root.options)
            case Ensemble():
                members = [replaced(each, self._leaf) for each in root.members]
                return self._within(root, ensemble_of(members, root.shares))
            case Sum(terms=((1.0, Stored() as leaf),)):
                found = self._stored(leaf)
                return root if found is None else found
        expanded = replaced(root, self._leaf)
        return self._within(root, as_sum(expanded))

    @staticmethod
    def _within(root: Root, whole: Root) -> Root:
        if (count := len(leaves(whole))) > MAX_ADAPTERS:
            raise FormulaError(f"{root} has {count} adapters when its stored formulas are written out, above {MAX_ADAPTERS}")
        return whole

    def _leaf(self, leaf: Leaf) -> Argument:
        found = self._stored(leaf) if isinstance(leaf, Stored) else None
        if found is None:
            return leaf
        if not isinstance(found, Sum):
            raise FormulaError(f"{leaf} is {found}, which stands alone: it can be no part of a formula")
        return as_argument(found)

    def _expert(self, root: Routed, leaf: Leaf) -> Leaf:
        found = self._leaf(leaf)
        if not isinstance(found, Leaf):
            raise FormulaError(
                f"{leaf} is {found}, and an expert of {root.router!r} is one adapter; add its merge to the hub"
            )
        return found

    def _stored(self, leaf: Stored) -> Root | None:
        """What a stored formula says, written out; None for a composition that is no formula."""
        if leaf.name in self.inside:
            circle = " -> ".join(f"@{name}" for name in [*self.inside, leaf.name])
            raise FormulaError(f"stored formulas name each other in a circle: {circle}; save one of them again")
        if leaf.name not in self.known:
            found = self.find(leaf)
            self.inside.append(leaf.name)
            if found is None or (found.formula is None and not is_base(found)):
                self.known[leaf.name] = None
            else:
                self.known[leaf.name] = Sum(()) if found.formula is None else self.of(self.read(found.formula))
            self.inside.pop()
        return self.known[leaf.name]
