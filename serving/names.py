"""Model names as formulas over the hub, and the compositions that the server makes of formulas."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

import torch

from loraweave.common.chat import Conversation, turn_end
from loraweave.composer.compose.composition import Composition
from loraweave.composer.formula.formula import Formula, has_parts, parse, router_of
from loraweave.composer.formula.nodes import Merge, Named, Stored, Sum, leaves
from loraweave.composer.merge.method_call import MethodCall, TruncatedUpdate
from loraweave.composer.model.scoring import answer_limit
from loraweave.errors import CompositionError, RetrievalError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import base_key
from loraweave.hub.compositions import StoredComposition
from loraweave.hub.hub import Hub
from loraweave.hub.pool import ExpertPool
from loraweave.hub.search.search import NO_FILTERS
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.serving.limits import Limits, Refusal
from loraweave.types import LINE, Factors, Task

# the most adapters that `auto` mixes, the temperature of their weights, and the share below which one is left out
NUM_FOUND, TEMPERATURE, LEAST_SHARE = 3, 0.1, 0.1
# the share of inputs that fit no adapter of the hub, but that `auto` may still answer with one
FALSE_ACCEPT = 0.5


@dataclass(frozen=True, eq=False)
class Served:
    """A composition as a row runs it: a mixture, or the average of the probabilities of `averaged` mixtures at each token.

    `canonical` is the formula in its normal form, `identity` the hash of the formula and its adapters' contents. A mixture
    has `weights`, {content hash: weight}, and `adapters`, {content hash: adapter}, both empty for the base model; or a
    `router`, which weighs `adapters`, by the router's names for them, at each token. `task`, if not None, writes the prompts
    around inputs. The compositions `before` answer first, one after the other; the last answer is the mixture's input.
    `share` is the part of an averaged mixture in the average. `stops` end an answer besides the request's own; the answer of
    a composition that runs before others has at most `max_new_tokens`.
    """

    canonical: str = "base"
    identity: str = "base"
    weights: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    router: TokenRouter | None = None
    task: Task | None = None
    before: tuple[Served, ...] = ()
    share: float = 1.0
    averaged: tuple[Served, ...] = ()
    stops: tuple[str, ...] = ()
    max_new_tokens: int = 0

    @property
    def members(self) -> tuple[Served, ...]:
        """The mixtures that answer: those that are averaged, or the composition itself."""
        return self.averaged or (self,)

    @property
    def is_alone(self) -> bool:
        """True if the member's requests need a batch of their own, since its router looks at whole calls of the model."""
        return self.router is not None and (self.router.needs_call or bool(self.router.watched))

    @cached_property
    def is_activated(self) -> bool:
        """True if any adapter takes effect only from its invocation tokens on."""
        return any(adapter.invocation for adapter in self.all_adapters.values())

    @cached_property
    def all_adapters(self) -> Mapping[str, Adapter]:
        """All adapters that an answer uses, of members and of their `before`, by content hash or by the router's names."""
        adapters: dict[str, Adapter] = {}
        for member in self.members:
            adapters |= member.adapters
        for member in self.members:
            for step in member.before:
                adapters |= step.all_adapters
        return adapters

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """The keys that rows need in the engine: content hashes, or the identity of a composition with a router."""
        return tuple(self.all_adapters) if self.router is None else (self.identity,)

    @property
    def apart(self) -> str:
        """The reason why weights vary by token, in a member or a composition of its `before`; "" if they do not."""
        if self.router is not None:
            return f"router {self.router.name!r} weighs each token"
        for adapter in self.all_adapters.values():
            if adapter.invocation:
                return f"adapter {adapter.name!r} acts only from its invocation tokens on"
        steps = (step.apart for member in self.members for step in member.before)
        return next(filter(None, steps), "")


@dataclass(frozen=True)
class Wanted:
    """A requested formula with the stored formulas in it expanded, and the hash of the formula and its adapters' contents.

    `merges` is True if the formula contains a merge by a method, which takes a while to make. Once opened, it also has its
    `stored` composition or the `pool` of its adapters, and `num_values`, the most values that making it may merge or read
    from files.
    """

    formula: Formula
    identity: str
    merges: bool = False
    stored: StoredComposition | None = None
    pool: ExpertPool | None = None
    num_values: int = 0


class Names:
    """The compositions that model names stand for, over a hub that may change meanwhile; several threads may call it.

    Only adapters that the hub stores are opened. `auto` considers adapters for the served model alone.
    """

    def __init__(self, hub: Hub, model: Any, tokenizer: Any, limits: Limits) -> None:
        self._hub = hub
        self._model = model
        self._tokenizer = tokenizer
        self._base = base_key(model)
        self._limits = limits
        self._retriever: Retriever | None = None
        self._generation = -1
        self._searched: tuple[int, int] | None = None

    def found_for(self, prompt: str) -> Formula:
        """Return the formula that `auto` stands for with a prompt; for one thread at a time. The first search takes seconds.

        The adapters nearest to the input, and to the instruction if the prompt has one, get weights softmax(score / 0.1);
        weights below 0.1 are left out. The formula is `base` if no adapter is near enough.
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
        """Return the retriever, recalibrated if the hub changed, so that most inputs that fit no adapter find nothing."""
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
        """Expand a model name or formula in the hub as it is now, without opening an adapter; `auto` is returned unchanged.

        Raises FormulaError, the hub's errors for names that it lacks, and Refusal for a formula above the limits.
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
            raise Refusal(400, f"{expanded} is a merge by a method, and this server does not merge", param="model")
        return Wanted(expanded, expanded.identity(self._hub), merges)

    def opened(self, wanted: Wanted) -> Wanted:
        """Open the composition's adapters or stored files as the hub has them now; read only what measuring them takes."""
        formula = wanted.formula
        if (stored := formula.stored(self._hub)) is not None:
            return replace(wanted, stored=stored, num_values=sum(stored.files.values()) // torch.float32.itemsize)
        # the identity is that of the pool's adapters, even if the hub changes meanwhile
        pool = formula.pool(self._hub)
        merged = [_merged(member.root, pool)[1] for _, member in formula.members() if _has_merge(member)]
        return replace(wanted, identity=formula.identity(pool), pool=pool, num_values=sum(merged))

    def make(self, wanted: Wanted) -> Served:
        """Make an opened composition.

        Raises what the hub, `lw.merge`, `lw.router` and `Composition.from_pretrained` raise.
        """
        formula, pool = wanted.formula, wanted.pool
        if wanted.stored is not None:
            return self._of_stored(wanted.stored, formula.canonical, formula.identity(self._hub))
        assert pool is not None
        members = [replace(_mixture(member, pool), share=share) for share, member in formula.members()]
        return replace(_average(members), canonical=formula.canonical, identity=wanted.identity)

    def listed(self) -> list[tuple[str, int]]:
        """List (name, Unix time at which it was stored) of the base, every adapter and every stored composition."""
        adapters = [(str(Named(record.name)), _seconds(record.created)) for record in self._hub.records()]
        stored = [(str(Stored(composition.name)), _seconds(composition.created)) for composition in self._hub.compositions()]
        return [("base", 0), *adapters, *stored]

    def _of_stored(self, stored: StoredComposition, canonical: str, identity: str) -> Served:
        if has_parts(stored):
            members = self._members(stored)
            whole = replace(_average(members), stops=self._stops(members[0].task))
        else:
            router = router_of(stored)
            whole = _routed(router, router.pool)
        return replace(whole, canonical=canonical, identity=identity)

    def _stops(self, task: Task | None) -> tuple[str, ...]:
        """Return the strings that end an answer: the task's stops and a chat's end of turn; a line's end without a task."""
        if task is None:
            return LINE
        end = turn_end(self._tokenizer, Conversation((("user", "input"),))) if task.chat else ""
        return (*task.stops, *([end] if end else []))

    def _members(self, stored: StoredComposition) -> list[Served]:
        """Return a `Served` for each mixture of a stored composition and each order of its task's examples."""
        with stored.unpacked() as folder:
            read = Composition.from_pretrained(folder, self._model, self._tokenizer)
        members = list(read.members.values()) or [read]
        total = sum(member.share for member in members)
        return [variant for member in members for variant in self._asked(member, member.share / total)]

    def _asked(self, member: Composition, share: float) -> list[Served]:
        """Return a `Served` for each order of the task's examples: a program's last step, with the others in `before`."""
        *earlier, last = list(member.steps.items()) or [("", member)]
        limit = answer_limit(self._tokenizer, member.task.examples) if earlier else 0
        before = []
        for name, step in earlier:
            if step.task.labels:
                raise CompositionError(f"step {name!r} answers by a label, which this server does not rank")
            whole, stops = _average(self._asked(step, 1.0)), self._stops(step.task)
            before.append(replace(whole, canonical=name, identity=name, stops=stops, max_new_tokens=limit))
        mixture = last[1]
        alone = Served() if mixture.is_base else _whole(mixture.adapter)
        tasks = mixture.task.in_orders()
        return [replace(alone, share=share / len(tasks), task=task, before=tuple(before)) for task in tasks]


def _average(members: Sequence[Served]) -> Served:
    """Return the members' average, or the only member itself."""
    return members[0] if len(members) == 1 else Served(averaged=tuple(members))


def _mixture(formula: Formula, pool: ExpertPool) -> Served:
    """Make one mixture of a formula: a merged adapter, a router's experts, or a weighted sum."""
    if _has_merge(formula):
        # the merge stays on the server: a license may forbid to give it away, but not to use it
        return _whole(formula.merge(pool, progress=False, allow_licenses=True, interference=False))
    mixture = formula.mixture(pool)
    if not isinstance(mixture, dict):
        return _routed(mixture, pool)
    # a weight outside the range of fp32 is refused under the adapter's name
    MixtureWeights.of(mixture, tuple(mixture))
    weights: dict[str, float] = defaultdict(float)
    for key, weight in mixture.items():
        # two names of one content are one expert
        weights[pool.adapters[key].hash] += weight
    return Served(weights=weights, adapters={pool.adapters[key].hash: pool.adapters[key] for key in mixture})


def _has_merge(formula: Formula) -> bool:
    """Return True if the formula, or a member of its average, is a merge by a method or a sum that contains one."""
    for _, member in formula.members():
        for _, term in member.root.terms if isinstance(member.root, Sum) else ():
            if isinstance(term, Merge):
                return True
    return False


def _merged(node: Any, pool: ExpertPool) -> tuple[dict[str, tuple[int, int, int]], int]:
    """Return ({layer: (rank, inputs, outputs)}, values) that a merge and the merges inside it have at most.

    A method that gives factors adds up ranks; any other may give a layer its full rank.
    """
    match node:
        case Sum(terms=((1.0, only),)):
            return _merged(only, pool)
        case Sum(terms):
            parts, adds, limit = [term for _, term in terms], True, None
        case Merge(method, parts, _, options):
            adds = MethodCall(method, {}).function.__annotations__.get("return") in (Factors, TruncatedUpdate)
            limit = dict(options).get("rank")
        case _:
            factors = pool[node.key].layers.items()
            return {layer: (part.rank, part.a_RI.shape[1], part.b_OR.shape[0]) for layer, part in factors}, 0
    inside = [_merged(part, pool) for part in parts]
    layers: dict[str, Any] = {}
    for sizes, _ in inside:
        for layer, (rank, *shape) in sizes.items():
            rank = layers.get(layer, (0,))[0] + rank if adds else min(shape)
            layers[layer] = (min(limit, rank) if isinstance(limit, int) else rank, *shape)
    num_values = sum(rank * (num_in + num_out) for rank, num_in, num_out in layers.values())
    return layers, num_values + sum(count for _, count in inside)


def _whole(adapter: Adapter) -> Served:
    """Return the mixture of one adapter, at weight 1."""
    return Served(weights={adapter.hash: 1.0}, adapters={adapter.hash: adapter})


def _routed(router: TokenRouter, pool: ExpertPool | None) -> Served:
    assert pool is not None
    return Served(adapters={name: pool[name] for name in router.experts}, router=router)


def _task_of(prompt: str) -> tuple[str, str]:
    """Split a prompt of the default template into (instruction, input), without demonstrations; ("", prompt) for others."""
    before, input_mark, last = prompt.rpartition("Input: ")
    text, output_mark, after = last.rpartition("\nOutput:")
    if not (input_mark and output_mark) or after.strip() or not (before.endswith("\n") or not before):
        return "", prompt
    return before.partition("Input: ")[0].strip(), text


def _seconds(created: str) -> int:
    return int(datetime.fromisoformat(created).timestamp()) if created else 0
