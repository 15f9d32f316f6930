"""What a model name stands for: the weighted adapters of a formula over the hub, as they are at that moment."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from loraweave.composer.formula.formula import Formula, parse
from loraweave.composer.formula.nodes import Named, Stored, leaves
from loraweave.errors import ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.retrieval.retriever import Retriever
from loraweave.serving.limits import Limits
from loraweave.serving.refusals import Refusal
from loraweave.serving.served import Served
from loraweave.types import BaseKey


class Names:
    """Formulas over a hub, which may change meanwhile. Several threads may ask; nothing is opened but what the hub stores.

    `base` is the served model's key: `auto` looks at adapters for it alone.
    """

    def __init__(self, hub: Hub, limits: Limits, base: BaseKey | None = None) -> None:
        self._hub = hub
        self._base = base
        self._limits = limits
        self._lock = threading.Lock()
        # one of its own, since the first search of a hub takes seconds, which no other request waits for
        self._search_lock = threading.Lock()
        self._known: OrderedDict[str, Served] = OrderedDict()
        self._retriever: Retriever | None = None

    def served(self, name: str, prompt: str) -> Served:
        """What a formula stands for; with `auto`, what retrieval finds for the prompt.

        Raises FormulaError and what the hub raises for names that it does not have; ScopeError for routers and averages,
        which need more than one mixture a row; Refusal for a formula above the limits.
        """
        limit = self._limits.formula_characters
        if len(name) > limit:
            raise Refusal(400, f"the model's name has {len(name)} characters, above the limit of {limit}", param="model")
        formula = parse(name)
        if formula.is_auto:
            formula = self._found_for(prompt)
        formula = formula.expand(self._hub)
        if formula.is_base:
            return Served()
        if (count := len(set(leaves(formula.root)))) > self._limits.adapters:
            raise Refusal(
                400, f"{name!r:.80} has {count} adapters, above the limit of {self._limits.adapters}", param="model"
            )
        found = self._kept(formula.identity(self._hub))
        if found is None:
            pool = formula.pool(self._hub)
            # of these very adapters, whatever becomes of the hub meanwhile
            mixture, adapters = self._mixture(formula, pool)
            found = self._keep(Served(formula.canonical, formula.identity(pool), mixture, adapters))
        return replace(found, canonical=formula.canonical)

    def listed(self) -> list[tuple[str, int]]:
        """(name, Unix time at which it was stored) of the base, every adapter and every stored composition."""
        adapters = [(str(Named(record.name)), _seconds(record.created)) for record in self._hub.records()]
        stored = [(str(Stored(each.name)), _seconds(each.created)) for each in self._hub.compositions()]
        return [("base", 0), *adapters, *stored]

    def _found_for(self, prompt: str) -> Formula:
        with self._search_lock:
            if self._retriever is None:
                self._retriever = Retriever(self._hub)
            found = self._retriever.for_task([prompt], k=1, evidence=False, base_model=self._base) if prompt.strip() else []
        return parse(str(Named(found[0].name)) if found else "base")

    def _mixture(self, formula: Formula, pool: ExpertPool) -> tuple[Mapping[str, float], Mapping[str, Adapter]]:
        try:
            mixture = formula.mixture(pool)
        except ScopeError:
            # a method's merge, or a sum with one in it
            if not self._limits.merges:
                raise Refusal(400, f"{formula} is a merge by a method, and this server makes none", param="model") from None
            # it stays here: a license may forbid to give a merge away, and not to use it
            merged = formula.merge(pool, progress=False, allow_licenses=True)
            return {merged.hash: 1.0}, {merged.hash: merged}
        if not isinstance(mixture, Mapping):
            raise ScopeError(
                f"{formula} is a router, which weighs every token by itself; this server has weighted sums and merges so "
                "far: ask for one, or use Composer.generate in process"
            )
        weights: dict[str, float] = defaultdict(float)
        for key, weight in mixture.items():
            # two names of one content are one expert
            weights[pool[key].hash] += weight
        return dict(weights), {pool[key].hash: pool[key] for key in mixture}

    def _kept(self, identity: str) -> Served | None:
        with self._lock:
            found = self._known.get(identity)
            if found is not None:
                self._known.move_to_end(identity)
            return found

    def _keep(self, served: Served) -> Served:
        with self._lock:
            self._known[served.identity] = served
            while len(self._known) > self._limits.loaded:
                self._known.popitem(last=False)
        return served


def _seconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp()) if created else 0
