"""A composition as rows have it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from loraweave.hub.adapter import Adapter
from loraweave.routers.tokens._router import TokenRouter
from loraweave.types import Task


@dataclass(frozen=True, eq=False)
class Member:
    """One mixture of a composition: `weights` is {content hash: weight}, `adapters` has these; both empty for the base.

    Where there is a `router`, it weighs `adapters`, under its own names for them, for each token. `share` is the member's
    part of the average of probabilities, `task` puts inputs into prompts of its own where they are not asked as they stand.
    """

    weights: Mapping[str, float] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    router: TokenRouter | None = None
    share: float = 1.0
    task: Task | None = None

    @property
    def is_alone(self) -> bool:
        """Whether a row under it shares no batch: its router looks at whole calls, and keeps a state beside their cache."""
        return self.router is not None and (self.router.needs_call or bool(self.router.watched))


@dataclass(frozen=True, eq=False)
class Served:
    """The members of a row, whose probabilities are averaged at each token; one but for an average.

    `canonical` is the formula in its one form, `identity` the hash of what it says with the content of its adapters.
    `stops` end an answer beside what a request asks for.
    """

    canonical: str = "base"
    identity: str = "base"
    members: tuple[Member, ...] = (Member(),)
    stops: tuple[str, ...] = ()

    @property
    def router(self) -> TokenRouter | None:
        """That of its only member."""
        return self.members[0].router

    @property
    def states(self) -> list[Hashable | None]:
        """What a token's keys and values depend on beside the tokens so far, by member; None where they depend on more.

        A router counts by what the formula says, and not as an object, which would live as long as its keys and values.
        """
        if self.router is not None:
            return [None if member.is_alone else self.identity for member in self.members]
        return [frozenset(member.weights.items()) for member in self.members]

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """Those of all members."""
        return {content: adapter for member in self.members for content, adapter in member.adapters.items()}
