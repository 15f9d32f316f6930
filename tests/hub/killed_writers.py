"""A program of its own, run by test_hub_processes.py: forks writers of a hub, kills them, and says what it found as JSON.

It forks because a new process would spend seconds on imports; the test's own process has threads, which a fork would lose.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_hubs import CHANGES, Steps, adapter, ended, fill, forked, state

from loraweave.hub.hub import Hub

COUNTED = ("mkdir", "open", "write", "fsync", "fchmod", "close", "replace", "unlink")


def killed_at(step, path, change):
    """The exit status of a writer that is killed before that step of the change, or of opening the hub without one."""

    def work():
        steps = Steps(lambda what: os.kill(os.getpid(), signal.SIGKILL), calls=COUNTED, left=0 if change else step)
        steps.install()
        hub = Hub(path)
        if change:
            steps.left = step
            change(hub)
            hub.close()

    return ended(forked(work))


def found_in(path):
    with Hub(path) as hub:
        return state(hub)


def fresh(path):
    with Hub(path) as hub:
        fill(hub)


def kill_at_every_step(folder, change):
    """Number of kills, and the states that were neither the old nor the new one."""
    bad, kills = [], 0
    fresh(folder / "whole")
    old = found_in(folder / "whole")[0]
    with Hub(folder / "whole") as hub:
        CHANGES[change](hub)
    new = found_in(folder / "whole")[0]
    fresh(path := folder / "0")
    for step in range(1, 1000):
        status = killed_at(step, path, CHANGES[change])
        kills += status == -signal.SIGKILL
        found, problems = found_in(path)
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
        status = killed_at(step, folder / str(step), None)
        found, problems = found_in(folder / str(step))
        if found != [[], [], []] or problems:
            bad.append([step, found, problems])
        if status == 0:
            return {"kills": step - 1, "bad": bad}
    return {"kills": -1, "bad": bad}


def kill_at_random(path, rounds):
    """Two writers at once, killed at a random moment after they acknowledged something; all of that must be there."""
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
        said = os.read(reading, 1)
        time.sleep(0.12 * rng.random())
        for child in children:
            os.kill(child, signal.SIGKILL)
        kills += sum(ended(child) == -signal.SIGKILL for child in children)
        with os.fdopen(reading) as pipe:
            acknowledged |= {int(line) for line in (said.decode() + pipe.read()).split("\n") if line}
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
        "bad": [lost, wrong, problems, left],
    }


def read_while_another_adds(path):
    """Whether every list was a beginning of the final one and every listed adapter could be read."""
    hub = Hub(path)
    child = forked(lambda: [hub.add(adapter(seed)) for seed in range(25)])
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
