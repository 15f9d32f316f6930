"""A program that test_hub_stores_at_once.py runs: forks two writers and a reader for each hub, and says how they ended.

Its argument is JSON: a list of the places of hubs, each [path, blobs]. It forks because a new process would spend seconds on
imports; the test's own process has threads, which a fork would lose.
"""

import json
import sys
from contextlib import suppress

import torch
from tiny_hubs import adapter, ended, forked

from loraweave.errors import AdapterNotFound
from loraweave.hub.hub import Hub


def write(place, first):
    with Hub(place[0], blobs=place[1]) as hub:
        for seed in range(first, first + 5):
            hub.add(adapter(seed))
            hub.update(f"adapter {seed}", description=f"number {seed}")
        hub.remove(f"adapter {first}")
        hub.gc()


def read(place):
    with Hub(place[0], blobs=place[1]) as hub:
        seen = 0
        while seen < 8:
            records = hub.records()
            seen = max(seen, len(records))
            with suppress(AdapterNotFound):
                if records:
                    assert hub[records[-1].name].hash == records[-1].hash


def main():
    torch.set_num_threads(1)
    found = []
    for place in json.loads(sys.argv[1]):
        hub = Hub(place[0], blobs=place[1])
        hub.add(adapter(999))
        # the children go on with their own hubs, and one with the hub that was open before the fork
        children = [forked(lambda: write(place, 0)), forked(lambda: write(place, 5)), forked(lambda: read(place))]  # noqa: B023
        children.append(forked(lambda: hub.add(adapter(10))))  # noqa: B023
        hub.add(adapter(11))
        statuses = [ended(child) for child in children]
        hub.remove("adapter 999")
        found.append([statuses, sorted(record.name for record in hub), list(hub.verify().problems)])
        hub.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
