"""A program of its own, run by test_hub_processes.py: forks writers of a hub, kills them, and says what it found as JSON.

It forks because a new process would spend seconds on imports; the test's own process has threads, which a fork would lose.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time
from pathlib import Path

import numpy as np
import torch

import loraweave.common.files
import loraweave.hub.stores.catalogue
import loraweave.hub.stores.folder_blobs
from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub
from loraweave.types import Factors


def adapter(seed):
    generator = torch.Generator().manual_seed(seed)
    factors = Factors(torch.randn(2, 5, generator=generator), torch.randn(3, 2, generator=generator))
    return Adapter(f"adapter {seed}", "org/base", {"layer": factors})


def forked(work):
    """Starts `work` in a child, which ends without the parent's clean-up; returns its process id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def ended(child):
    """The child's exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Killer:
    """Kills the process before the n-th counted step, which is after the step before it."""

    def __init__(self):
        self.left = 0

    def before(self, act, *args, **kwargs):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return act(*args, **kwargs)

    def install(self):
        killer, real_connect = self, sqlite3.connect

        class CountedOs:
            def __getattr__(self, name):
                real = getattr(os, name)
                if name not in ("mkdir", "open", "write", "fsync", "fchmod", "close", "replace", "unlink"):
                    return real
                return lambda *args, **kwargs: killer.before(real, *args, **kwargs)

        class Connection(sqlite3.Connection):
            def execute(self, *args):
                return killer.before(super().execute, *args)

            def close(self):
                return killer.before(super().close)

        loraweave.hub.stores.folder_blobs.os = loraweave.common.files.os = CountedOs()
        sqlite3.connect = lambda *args, **kwargs: real_connect(*args, **kwargs, factory=Connection)


CHANGES = {
    "add": lambda hub: hub.add(adapter(9)),
    "update": lambda hub: hub.update("adapter 0", description="new"),
    "rename": lambda hub: hub.rename("adapter 0", "new"),
    "remove": lambda hub: hub.remove("adapter 0"),
    "replace": lambda hub: hub.add(adapter(7), name="adapter 0", replace=True),
    "rollback": lambda hub: hub.rollback("adapter 1", 1),
    "store_vectors": lambda hub: hub.store_vectors("e", [("adapter 1", "d", np.ones(3))]),
    "gc": lambda hub: hub.gc(),
}


def state(path):
    with Hub(path) as hub:
        report = hub.verify()
        vectors = sorted(hub.vectors("e"))
        rows = [(record.name, record.version, record.hash, record.description) for record in hub]
        return rows + vectors, list(report.problems)


def fresh(path):
    with Hub(path) as hub:
        for seed in range(3):
            hub.add(adapter(seed))
        hub.add(adapter(6), name="adapter 1", replace=True)
        # something for gc to do
        hub.remove("adapter 2")


def kill_at_every_step(folder, change):
    """Number of kills, and the states that were neither the old nor the new one."""
    bad, kills = [], 0
    fresh(folder / "whole")
    old = state(folder / "whole")[0]
    with Hub(folder / "whole") as hub:
        CHANGES[change](hub)
    new = state(folder / "whole")[0]
    fresh(path := folder / "0")
    for step in range(1, 1000):

        def work(path=path, step=step):
            killer = Killer()
            killer.install()
            hub = Hub(path)
            killer.left = step
            CHANGES[change](hub)
            hub.close()

        status = ended(forked(work))
        kills += status == -signal.SIGKILL
        found, problems = state(path)
        if problems or found not in (old, new) or (status == 0 and found != new):
            bad.append([step, status, found, problems])
        if status == 0 or bad:
            break
        if found == new and old != new:
            # done, although the writer did not live to say so: start over for the next step
            fresh(path := folder / f"{step}")
    return {"kills": kills, "bad": bad}


def kill_while_creating(folder):
    bad = []
    for step in range(1, 1000):
        path = folder / str(step)

        def work(path=path, step=step):
            killer = Killer()
            killer.install()
            killer.left = step
            Hub(path)

        status = ended(forked(work))
        found, problems = state(path)
        if found or problems:
            bad.append([step, found, problems])
        if status == 0:
            return {"kills": step - 1, "bad": bad}
    return {"kills": -1, "bad": bad}


def kill_at_random(path, rounds):
    """Two writers at once, killed at a random moment; what they acknowledged must be there."""
    rng = random.Random(0)
    acknowledged, kills = set(), 0
    for turn in range(rounds):
        reading, writing = os.pipe()

        def work(first, writing=writing):
            hub = Hub(path)
            for seed in range(first, first + 10_000):
                hub.add(adapter(seed))
                os.write(writing, b"%d\n" % seed)

        children = [forked(lambda first=first: work(first)) for first in (turn * 20_000 + 100, turn * 20_000 + 10_100)]
        os.close(writing)
        time.sleep(0.03 + 0.12 * rng.random())
        for child in children:
            os.kill(child, signal.SIGKILL)
        kills += sum(ended(child) == -signal.SIGKILL for child in children)
        with os.fdopen(reading) as pipe:
            acknowledged |= {int(line) for line in pipe.read().split("\n") if line}
    with Hub(path) as hub:
        problems = list(hub.verify().problems)
        lost = sorted(seed for seed in acknowledged if f"adapter {seed}" not in hub)
        wrong = [record.name for record in hub if hub[record.name].hash != adapter(int(record.name.split()[1])).hash]
        names = len(hub)
        hub.gc()
        left = [path.name for path in (path / "tmp").iterdir()]
    return {
        "kills": kills,
        "acknowledged": len(acknowledged),
        "there": names,
        "lost": lost,
        "wrong": wrong,
        "problems": problems,
        "left": left,
    }


def read_while_another_adds(path):
    """Whether every list was a beginning of the final one and every listed adapter could be read."""
    hub = Hub(path)

    def work():
        for seed in range(25):
            hub.add(adapter(seed))

    child = forked(work)
    seen, unread = [], []
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        records = hub.records()
        seen.append([record.name for record in records])
        if records and hub[records[-1].name].hash != records[-1].hash:
            unread.append(records[-1].name)
    final = [record.name for record in hub]
    return {"final": len(final), "prefixes": all(names == final[: len(names)] for names in seen), "unread": unread}


def share_a_hub_over_a_fork(path):
    """Parent and child go on with the hub that was open before the fork."""
    hub = Hub(path)
    hub.add(adapter(0))
    list(hub)
    child = forked(lambda: [hub.add(adapter(seed)) for seed in range(1, 6)])
    for seed in range(6, 11):
        hub.add(adapter(seed))
    status = ended(child)
    return {"status": status, "there": len(hub), "generation": hub.generation, "problems": list(hub.verify().problems)}


def main():
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {
        "every step": {change: kill_at_every_step(folder / change, change) for change in CHANGES},
        "creating": kill_while_creating(folder / "creating"),
        "random": kill_at_random(folder / "random", 10),
        "reading": read_while_another_adds(folder / "reading"),
        "fork": share_a_hub_over_a_fork(folder / "fork"),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
