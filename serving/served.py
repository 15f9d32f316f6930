"""Compositions in the form that rows need."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from loraweave.hub.adapter import Adapter
from loraweave.routers.invoked import last_place
from loraweave.routers.tokens._router import TokenRouter
from loraweave.types import Task


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

    def states(self, prompt: Sequence[int]) -> list[tuple[Hashable | None, int | None]]:
        """Return pairs (weights, count): a row's first `count` tokens depend on these weights alone; None is all its tokens.

        An adapter with invocation tokens is among them from these on: a row's keys and values before the first of them are
        those of a row without it.
        """
        starts = {
            content: last_place(prompt, adapter.invocation)
            for content, adapter in self.adapters.items()
            if adapter.invocation
        }
        counting: set[tuple[Hashable, ...]] = {
            (content, weight) for content, weight in self.weights.items() if content not in starts
        }
        states: list[tuple[Hashable | None, int | None]] = []
        for start in sorted({start for start in starts.values() if start is not None}):
            states.append((frozenset(counting), start))
            counting |= {(content, self.weights[content], start) for content, place in starts.items() if place == start}
        return [*states, (frozenset(counting), None)]


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

    @property
    def apart(self) -> str:
        """The reason why a row's tokens have weights of their own, in a member or a step before it; "" if there is none."""
        for member in self.members:
            if member.router is not None:
                return f"router {member.router.name!r} weighs each token"
            for adapter in member.adapters.values():
                if adapter.invocation:
                    return f"adapter {adapter.name!r} counts from its invocation tokens on"
            for step in member.before:
                if step.apart:
                    return step.apart
        return ""

    def states(self, prompts: Sequence[Sequence[int]]) -> list[list[tuple[Hashable | None, int | None]]]:
        """Return what a token's keys and values depend on beside the tokens so far, by member, for the prompt of each.

        As `Member.states` has it, with None for weights where they depend on more. A router counts by what the formula
        says, and not as an object, which would live as long as its keys and values.
        """
        if self.router is not None:
            return [[(None if member.is_alone or member.is_activated else self.identity, None)] for member in self.members]
        return [member.states(prompt) for member, prompt in zip(self.members, prompts, strict=True)]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters of all members, and of the steps before them."""
        steps = [step for member in self.members for step in member.before]
        of_members = {content: adapter for member in self.members for content, adapter in member.adapters.items()}
        return of_members | {content: adapter for step in steps for content, adapter in step.adapters.items()}
