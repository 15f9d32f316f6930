"""Who answered in place of what was asked: the nearest of everything that may have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from loraweave.composer.formula.nodes import Named
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.serving.verify.answers import Answer, distance
from loraweave.serving.verify.asked import Asked
from loraweave.serving.verify.hypotheses import BASE, Hypothesis, possible
from loraweave.serving.verify.references import Probe, References

# adapters of the hub that the server does not name
MAX_OTHERS = 64
# two that lie within this of the nearest are taken for the plainer one
NEAR = 1.5

Replies = Sequence[tuple[Probe, Answer]]


class Culprits:
    """The adapters that a server names, and those of the hub."""

    def __init__(self, hub: Hub, references: References, asked: Sequence[Asked], num_tokens: int) -> None:
        self._hub = hub
        self._references = references
        self._asked = asked
        self._num_tokens = num_tokens

    def nearest(self, asked: Asked, replies: Replies, least: float) -> tuple[Hypothesis, float]:
        """What fits these answers best, and its largest distance; of those within `least` the plainest."""
        found = [(each, 0.0) for each in self._hypotheses(asked)]
        for probe, reply in replies:
            known = self._references.answers([each for each, _ in found], [probe.ids], self._num_tokens)[0]
            found = [(each, max(score, distance(reply, answer))) for (each, score), answer in zip(found, known, strict=True)]
            # one that is far from an answer is not looked at further
            limit = max(least, NEAR * min(score for _, score in found))
            found = [(each, score) for each, score in found if score <= limit]
        return found[0]

    def _hypotheses(self, asked: Asked) -> list[Hypothesis]:
        served = [(each.name, each.adapter) for each in self._asked if each is not asked and each.adapter is not None]
        own = asked.adapter
        known = {adapter.hash for _, adapter in served} | ({own.hash} if own else set())
        # a base that is asked alone has nobody to be taken for
        of = own or (served[0][1] if served else None)
        others = [*served, *(self._of_hub(of, known) if of is not None else ())]
        if own is None:
            return [BASE, *(Hypothesis(f"got {name}", ((adapter, 1.0),)) for name, adapter in others)]
        older = self._older(next(iter(asked.parts)), known) if list(asked.parts.values()) == [1.0] else ()
        parts = [(self._hub.get(leaf.name, version=leaf.version), weight) for leaf, weight in asked.parts.items()]
        return possible(own, others, older, parts if len(parts) > 1 else (), self._references.config)

    def _of_hub(self, of: Adapter, known: set[str]) -> Iterator[tuple[str, Adapter]]:
        """Those for the same base that the server does not name."""
        left = MAX_OTHERS
        for record in self._hub.records(base_model=of.base):
            if left and record.hash not in known:
                adapter = self._hub[record.name]
                if self._references.fits(adapter):
                    known.add(record.hash)
                    left -= 1
                    yield record.name, adapter

    def _older(self, leaf: Named, known: set[str]) -> Iterator[tuple[str, Adapter]]:
        for record in self._hub.history(leaf.name):
            if record.hash not in known:
                yield f"{leaf.name}@{record.version}", self._hub.get(leaf.name, version=record.version)
