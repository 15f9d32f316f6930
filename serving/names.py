"""The meaning of model names: the compositions of formulas over the hub, as it is at that moment."""

from __future__ import annotations

import math
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from loraweave.common.chat import Conversation, turn_end
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.task_mixture import answer_limit
from loraweave.composer.formula.formula import Formula, has_parts, parse, router_of
from loraweave.composer.formula.nodes import Merge, Named, Stored, Sum, leaves
from loraweave.errors import CompositionError, RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_key
from loraweave.hub.compositions import StoredComposition
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.hub.search.search import NO_FILTERS
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.tokens._router import TokenRouter
from loraweave.serving.limits import Limits, Refusal
from loraweave.types import LINE, Task

# what `auto` takes at most, how sharply it prefers, and what it leaves out
NUM_FOUND, TEMPERATURE, LEAST_SHARE = 3, 0.1, 0.1
# the share of inputs like the hub's, but for none of its adapters, that `auto` may answer with one
FALSE_ACCEPT = 0.5


@dataclass(frozen=True, eq=False)
class Member:
    """One mixture of a composition: `weights` is {content hash: weight}, `adapters` has these; both empty for the base.

    Where there is a `router`, it weighs `adapters`, under its own names for them, for each token. `share` is the member's
    part of the average of probabilities, `task` puts inputs into prompts of its own where they are not asked as they stand.
    The compositions `before` answer first, one after the other; the last answer is the member's input.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    router: TokenRouter | None = None
    share: float = 1.0
    task: Task | None = None
    before: tuple[Served, ...] = ()

    @property
    def is_alone(self) -> bool:
        """True if a row under it shares no batch: its router looks at whole calls, and keeps a state beside their cache."""
        return self.router is not None and (self.router.needs_call or bool(self.router.watched))

    @cached_property
    def is_activated(self) -> bool:
        """True if one of its adapters counts from its invocation tokens on."""
        return any(adapter.invocation for adapter in self.adapters.values())


@dataclass(frozen=True, eq=False)
class Served:
    """The members of a row, whose probabilities are averaged at each token; one member but for an average.

    `canonical` is the formula in its one form, `identity` the hash of what it says with the content of its adapters.
    `stops` end an answer beside what a request asks for; one that others go on from has at most `max_new_tokens`.
    """

    canonical: str = "base"
    identity: str = "base"
    members: tuple[Member, ...] = (Member(),)
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0

    @property
    def router(self) -> TokenRouter | None:
        """The router of its only member, or None."""
        return self.members[0].router

    @cached_property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters of all members, and of the steps before them."""
        adapters: dict[str, Adapter] = {}
        for member in self.members:
            adapters |= member.adapters
        for member in self.members:
            for step in member.before:
                adapters |= step.adapters
        return adapters

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """The keys of what its rows keep in the engine: adapters by content, or a router by the composition's identity."""
        return tuple(self.adapters) if self.router is None else (self.identity,)

    @property
    def apart(self) -> str:
        """The reason why a row's tokens have weights of their own, in a member or a step before it; "" if there is none."""
        if self.router is not None:
            return f"router {self.router.name!r} weighs each token"
        for adapter in self.adapters.values():
            if adapter.invocation:
                return f"adapter {adapter.name!r} counts from its invocation tokens on"
        steps = (step.apart for member in self.members for step in member.before)
        return next(filter(None, steps), "")


@dataclass(frozen=True)
class Wanted:
    """A formula with stored formulas and `auto` replaced, and the hash of the formula with the hub's contents.

    `merges` says that it is a merge by a method, or has one in it, which takes a while.
    """

    formula: Formula
    identity: str
    merges: bool = False


class Names:
    """The formulas over a hub, which may change meanwhile. Several threads may ask; only what the hub stores is opened.

    `auto` looks at adapters for the served model alone.
    """

    def __init__(self, hub: Hub, model: Any, tokenizer: Any, limits: Limits) -> None:
        self._hub = hub
        self._model = model
        self._tokenizer = tokenizer
        self._base = base_key(model)
        self._limits = limits
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Served] = OrderedDict()
        self._retriever: Retriever | None = None
        self._generation = -1
        self._searched: tuple[int, int] | None = None

    def found_for(self, prompt: str) -> Formula:
        """Return the formula that `auto` stands for with a prompt; for one thread at a time. The first search takes seconds.

        The adapters nearest to the input, and to the instruction if the prompt has one, weigh softmax(score / 0.1); those
        below a tenth are left out. It is the base where none is near enough.
        """
        instruction, text = _task_of(prompt)
        if not text.strip() or not len(self._hub):
            return parse("base")
        hits = self._searching().for_task(
            [text], description=instruction, k=NUM_FOUND, evidence=False, base_model=self._base
        )
        shares = [math.exp((hit.score - hits[0].score) / TEMPERATURE) for hit in hits]
        weights = [share / sum(shares) for share in shares if share / sum(shares) >= LEAST_SHARE]
        terms = [f"{weight / sum(weights):.2f}*{Named(hit.name)}" for weight, hit in zip(weights, hits, strict=False)]
        return parse(" + ".join(terms) or "base")

    def _searching(self) -> Retriever:
        """Return the retriever, calibrated to find nothing for a best score that inputs of other tasks reach too often."""
        if self._retriever is None:
            self._retriever = Retriever(self._hub)
        if (generation := self._hub.generation) == self._generation:
            return self._retriever
        seqs = self._hub.seqs(NO_FILTERS)
        state = len(seqs), max(seqs, default=0)
        if state != self._searched:
            self._retriever.abstention, self._searched = None, state
            # a hub of one adapter, or without samples, has nothing to compare with
            with suppress(RetrievalError):
                self._retriever.calibrate(false_accept=FALSE_ACCEPT)
        self._generation = generation
        return self._retriever

    def wanted(self, name: str | Formula) -> Wanted:
        """Return what a model's name or a formula means in the hub as it is now; no adapter is opened. `auto` stays so.

        Raises FormulaError and what the hub raises for names that it does not have, Refusal for a formula above the limits.
        """
        if isinstance(name, str) and len(name) > (limit := self._limits.formula_characters):
            raise Refusal(400, f"the model's name has {len(name)} characters, above the limit of {limit}", param="model")
        formula = parse(name) if isinstance(name, str) else name
        if formula.is_auto:
            return Wanted(formula, "auto")
        expanded = formula.expand(self._hub)
        if expanded.is_base:
            return Wanted(expanded, Served.identity)
        if (count := len(set(leaves(expanded.root)))) > self._limits.adapters:
            raise Refusal(
                400, f"{formula.text!r:.80} has {count} adapters, above the limit of {self._limits.adapters}", param="model"
            )
        merges = _has_merge(expanded)
        if merges and not self._limits.merges:
            raise Refusal(400, f"{expanded} is a merge by a method, and this server makes none", param="model")
        return Wanted(expanded, expanded.identity(self._hub), merges)

    def known(self, wanted: Wanted) -> Served | None:
        """Return the composition if it was made before and is still kept, else None."""
        if wanted.formula.is_base:
            return Served()
        with self._lock:
            served = self._known.get(wanted.identity)
            if served is None:
                return None
            self._known.move_to_end(wanted.identity)
        return replace(served, canonical=wanted.formula.canonical)

    def make(self, wanted: Wanted) -> Served:
        """Make and keep the composition, of the hub's adapters as they are when this is called.

        Raises what the hub, `lw.merge`, `lw.router` and `Composition.from_pretrained` raise.
        """
        if (served := self.known(wanted)) is not None:
            return served
        formula = wanted.formula
        if (stored := formula.stored(self._hub)) is not None:
            made = self._of_stored(stored, formula.canonical, formula.identity(self._hub))
        else:
            # of these very adapters, whatever becomes of the hub meanwhile
            pool = formula.pool(self._hub)
            members = tuple([replace(_member(member, pool), share=share) for share, member in formula.members()])
            made = Served(formula.canonical, formula.identity(pool), members)
        with self._lock:
            self._known[made.identity] = made
            while len(self._known) > self._limits.loaded:
                self._known.popitem(last=False)
        return made

    def listed(self) -> list[tuple[str, int]]:
        """List (name, Unix time at which it was stored) of the base, every adapter and every stored composition."""
        adapters = [(str(Named(record.name)), _seconds(record.created)) for record in self._hub.records()]
        stored = [(str(Stored(composition.name)), _seconds(composition.created)) for composition in self._hub.compositions()]
        return [("base", 0), *adapters, *stored]

    def _of_stored(self, stored: StoredComposition, canonical: str, identity: str) -> Served:
        if has_parts(stored):
            members = self._members(stored)
            return Served(canonical, identity, members, stops=self._stops(members[0].task))
        router = router_of(stored)
        return Served(canonical, identity, (_routed(router, router.pool),))

    def _stops(self, task: Task | None) -> tuple[str, ...]:
        """Return what ends an answer, as in Composition.predict: the task's stops, and the end of a chat's turn."""
        if task is None:
            return LINE
        end = turn_end(self._tokenizer, Conversation((("user", "input"),))) if task.chat else ""
        return (*task.stops, *([end] if end else []))

    def _members(self, stored: StoredComposition) -> tuple[Member, ...]:
        """Return each member in each of its prompt forms."""
        with stored.unpacked() as folder:
            read = Composition.from_pretrained(folder, self._model, self._tokenizer)
        members = list(read.members.values()) or [read]
        total = sum(member.share for member in members)
        return tuple(variant for member in members for variant in self._asked(member, member.share / total))

    def _asked(self, member: Composition, share: float) -> list[Member]:
        """Return the member in each of its prompt forms; for a program, the last step after those before it."""
        *earlier, last = list(member.steps.items()) or [("", member)]
        limit = answer_limit(self._tokenizer, member.task.examples) if earlier else 0
        before = []
        for name, step in earlier:
            if step.task.labels:
                raise CompositionError(f"step {name!r} answers by a label, which this server does not rank")
            stops = self._stops(step.task)
            before.append(Served(name, name, tuple(self._asked(step, 1.0)), stops, max_new_tokens=limit))
        mixture = last[1]
        alone = Member() if mixture.is_base else _whole(mixture.adapter)
        tasks = mixture.task.in_orders()
        return [replace(alone, share=share / len(tasks), task=task, before=tuple(before)) for task in tasks]


def _member(formula: Formula, pool: ExpertPool) -> Member:
    """Make one member of a formula."""
    if _has_merge(formula):
        # it stays here: a license may forbid to give a merge away, and not to use it
        return _whole(formula.merge(pool, progress=False, allow_licenses=True, interference=False))
    mixture = formula.mixture(pool)
    if not isinstance(mixture, dict):
        return _routed(mixture, pool)
    weights: dict[str, float] = defaultdict(float)
    for key, weight in mixture.items():
        # two names of one content are one expert
        weights[pool[key].hash] += weight
    return Member(dict(weights), {pool[key].hash: pool[key] for key in mixture})


def _has_merge(formula: Formula) -> bool:
    """Return whether the formula, or a member of it, is a merge by a method or has one in its sum."""
    for _, member in formula.members():
        for _, term in member.root.terms if isinstance(member.root, Sum) else ():
            if isinstance(term, Merge):
                return True
    return False


def _whole(adapter: Adapter) -> Member:
    """Make a member of an adapter as it is."""
    return Member({adapter.hash: 1.0}, {adapter.hash: adapter})


def _routed(router: TokenRouter, pool: ExpertPool | None) -> Member:
    assert pool is not None
    return Member({}, {name: pool[name] for name in router.experts}, router)


def _task_of(prompt: str) -> tuple[str, str]:
    """Split a prompt of the default template into (instruction, input), without demonstrations; ("", prompt) for others."""
    before, input_mark, last = prompt.rpartition("Input: ")
    text, output_mark, after = last.rpartition("\nOutput:")
    if not (input_mark and output_mark) or after.strip() or not (before.endswith("\n") or not before):
        return "", prompt
    return before.partition("Input: ")[0].strip(), text


def _seconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp()) if created else 0
