"""Hubs to be harmed, the changes that are interrupted in them, and what may be found afterwards."""

import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from installed import rebuild
from tiny_hubs import adapter, flip, run_sql

from loraweave.hub.hub import Hub
from loraweave.hub.indexes import flat
from loraweave.hub.search import keys, search
from loraweave.hub.stores import migrations

# so that a hub of a few adapters has an index file too
flat.FEW_KEYS = 1
for files in keys.index_files():
    files.MIN_SAVED = 1

NEXT_STEP = ("CREATE TABLE later (id INTEGER PRIMARY KEY)", "INSERT INTO later VALUES (1)")


def fresh(path):
    """A hub of three adapters under four names, one in quarantine, with vectors and something for gc to do."""
    with Hub(path) as hub:
        for seed in range(4):
            hub.add(adapter(seed), description=f"task {seed}", tags=["a"])
        hub.store_vectors("e", [("adapter 0", "d", np.ones(3))])
        hub.remove("adapter 3")
        hub.add(adapter(1), name="second name")
        hub.quarantine("adapter 2")


def versioned(path):
    """The same with a second version of one adapter."""
    fresh(path)
    with Hub(path) as hub:
        hub.add(adapter(5), name="adapter 0", replace=True)


def harmed(path):
    """The same with one blob flipped, so that adding its adapter again heals it."""
    fresh(path)
    flip(next(file for file in path.glob("blobs/*/*") if adapter(0).hash in file.name))


def headless(path):
    """The same with a catalogue that lost its row of state and can be rebuilt."""
    fresh(path)
    run_sql(path, "DELETE FROM state")


def emptied(path):
    """No hub yet."""
    shutil.rmtree(path, ignore_errors=True)


def _nothing():
    pass


def _on_open_hub(change):
    def run(path, tell=_nothing):
        with Hub(path) as hub:
            change(hub)
            tell()

    return run


def _rebuild(path, tell=_nothing):
    rebuild(path)
    tell()


def _indexed(hub):
    """A search, which keeps its keys in the catalogue and its index in a file."""
    index = search.SearchIndex(hub, embedder="hashing", index="flat")
    index.hits(index.embed(["task 1"]), 3)


def _rolled_back(hub):
    if hub.record("adapter 0").version == 2:
        hub.rollback("adapter 0", 1)


def _bound(hub):
    """The adapter with its base model at hand, whose fingerprint the record then has."""
    base = torch.nn.ModuleDict({"layer": torch.nn.Linear(5, 3)})
    torch.nn.init.constant_(base["layer"].weight, 0.5)
    base.name_or_path = "org/base"
    hub.bind("adapter 0", base)


def _gone(hub, name):
    if name in hub:
        hub.remove(name)


@dataclass(frozen=True)
class Change:
    """`run` changes the hub that `prepare` made; both take its folder. An interrupted `run` can be repeated.

    `run` calls its second argument when the change is done and before the hub is closed.
    `steps` are schema steps that the program gains in between. `readable` says whether the hub opens before the change.
    """

    prepare: Callable[[Path], None]
    run: Callable[..., None]
    steps: tuple[tuple[str, ...], ...] = ()
    readable: bool = True

    @contextmanager
    def known_steps(self):
        """The program as it is when the change is made."""
        before = migrations.STEPS
        migrations.STEPS = (*before, *self.steps)
        try:
            yield
        finally:
            migrations.STEPS = before


CHANGES = {
    "add": Change(fresh, _on_open_hub(lambda hub: hub.add(adapter(9), description="new"))),
    "add known content": Change(fresh, _on_open_hub(lambda hub: hub.add(adapter(0), name="third name"))),
    "add many": Change(fresh, _on_open_hub(lambda hub: hub.add_many([adapter(seed) for seed in (7, 0, 8)]))),
    "search": Change(fresh, _on_open_hub(_indexed)),
    "heal": Change(harmed, _on_open_hub(lambda hub: hub.add(adapter(0)))),
    "update": Change(fresh, _on_open_hub(lambda hub: hub.update("adapter 0", description="new", tags=["b"]))),
    "rename": Change(fresh, _on_open_hub(lambda hub: hub.rename("adapter 0", "new") if "adapter 0" in hub else None)),
    "remove": Change(fresh, _on_open_hub(lambda hub: _gone(hub, "adapter 0"))),
    "reindex": Change(fresh, _on_open_hub(lambda hub: hub.store_vectors("e", [("adapter 1", "d", np.ones(3))]))),
    "gc": Change(fresh, _on_open_hub(lambda hub: hub.gc())),
    "add a version": Change(versioned, _on_open_hub(lambda hub: hub.add(adapter(6), name="adapter 0", replace=True))),
    "roll back": Change(versioned, _on_open_hub(_rolled_back)),
    "prune": Change(versioned, _on_open_hub(lambda hub: hub.prune("adapter 0"))),
    "quarantine": Change(fresh, _on_open_hub(lambda hub: hub.quarantine("adapter 0"))),
    "release": Change(fresh, _on_open_hub(lambda hub: hub.release("adapter 2"))),
    "bind": Change(fresh, _on_open_hub(_bound)),
    "migrate": Change(fresh, _on_open_hub(lambda hub: hub.generation), steps=(NEXT_STEP,)),
    "create": Change(emptied, _on_open_hub(lambda hub: hub.generation), readable=False),
    "rebuild": Change(headless, _rebuild, readable=False),
}


def state(hub):
    """What a user sees of the hub: adapters in order, all their versions, and whose vectors there are."""
    listed = []
    for newest in [*hub.records(), *hub.records(quarantined=True)]:
        history = [(one.version, one.hash, one.description, one.tags, one.fingerprint) for one in hub.history(newest.name)]
        listed.append((newest.name, newest.quarantined, *history))
    return [*listed, *sorted(hub.vectors("e"))]


def faults(path, allowed, *, may_be_harmed=False):
    """What is wrong with the hub after an interruption, as sentences: [] when it is as before or as after the change."""
    with Hub(path) as hub:
        found = state(hub)
        wrong = [] if found in allowed else [f"neither the old state nor the new one: {found}"]
        report = hub.verify()
        if may_be_harmed and len(report.problems) <= 1:
            return wrong
        wrong += report.problems
        newest = [*hub.records(), *hub.records(quarantined=True)]
        for record in [record for one in newest for record in hub.history(one.name)]:
            if hub.get(record.name, version=record.version, quarantined=True).hash != record.hash:
                wrong.append(f"version {record.version} of {record.name!r} has another content")
        hub.gc()
        left = sorted(file.name for file in path.glob("tmp/*"))
        after = hub.verify()
        if left or after.problems or after.orphans or state(hub) != found:
            wrong.append(f"after gc: {left}, {after}")
    return wrong
