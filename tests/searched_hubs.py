"""A hub of adapters named for the words that they are found by, and what a search reads of it."""

import tiny_hubs
from counted_words import WORDS

from loraweave.hub.hub import Hub
from loraweave.hub.tables.filtering import Filters


def adapter(name, seed=0):
    return tiny_hubs.adapter(seed, name, base_model="base")


def names(index, text, k=1, **filters):
    return [hit.record.name for hit in index.hits(index.embed([text]), k, Filters(**filters))[0]]


def add_new(hub):
    for number in range(3):
        hub.add(adapter(f"new {number}", 9 + number), examples=["cat cat dog"])


def reads(hub, monkeypatch):
    """What the hub is asked for, as (since, number of changes)."""
    asked, original = [], Hub.changes

    def watched(self, embedder_id, **options):
        changes = original(self, embedder_id, **options)
        asked.append((options["since"], len(changes.page)))
        return changes

    monkeypatch.setattr(Hub, "changes", watched)
    return asked


def filled(hub):
    """The hub with an adapter for each word."""
    for number, word in enumerate(WORDS):
        hub.add(adapter(word, number), examples=[word], tags=["even"] if number % 2 == 0 else ["odd"])
    return hub
