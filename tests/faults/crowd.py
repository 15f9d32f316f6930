"""Many writers, readers, a long reader and gc on one hub at once."""

import os
import time
from contextlib import suppress

import worlds

import loraweave.common.files
import loraweave.hub.stores.folder_blobs
from loraweave.errors import AdapterNotFound
from loraweave.hub.hub import Hub

# what a writer waits for twenty others, whose renames are slow, on cores that do other work
PATIENCE_S = 600.0


class SlowRename:
    """The module `os` as folder_blobs sees it on a network's file system, where a rename takes its time."""

    def __getattr__(self, name):
        return self._replace if name == "replace" else getattr(os, name)

    def _replace(self, source, target):
        time.sleep(0.02)
        os.replace(source, target)


def forked(work, telling):
    """Starts `work` in a child, which ends without the parent's clean-up, and says what went wrong as a line."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        for line in work():
            os.write(telling, f"{line}\n".encode())
        status = 0
    except BaseException as error:
        os.write(telling, f"{error!r}\n".encode())
    finally:
        os._exit(status)


def write(path, number, count):
    """Adds `count` adapters, removes one of them, and changes another and one that all change."""
    with Hub(path, timeout_s=PATIENCE_S) as hub:
        for seed in range(number * count, (number + 1) * count):
            hub.add(worlds.adapter(seed))
        hub.update(f"adapter {number * count}", description=f"by {number}")
        hub.rename(f"adapter {number * count + 1}", f"renamed {number}")
        hub.remove(f"adapter {number * count + 2}")
        hub.update("everyone's", description=f"by {number}")
    return ()


def read(path, done, parent):
    """Yield a sentence on what a reader must never see, until the file `done` is there or the process `parent` is gone."""
    with Hub(path, timeout_s=PATIENCE_S) as hub:
        while not done.exists() and os.getppid() == parent:
            records = hub.records()
            if len({record.name for record in records}) != len(records):
                yield "one name twice"
            for record in records[-3:]:
                # another process may remove it between the two calls
                with suppress(AdapterNotFound):
                    if hub[record.name].hash != record.hash:
                        yield f"{record.name} has another content"


def report(folder, num_writers, count):
    """What `num_writers` writers, who add `count` adapters each, two readers, a long reader and gc did to each other."""
    loraweave.hub.stores.folder_blobs.os = loraweave.common.files.os = SlowRename()
    try:
        return crowd(folder, num_writers, count)
    finally:
        loraweave.hub.stores.folder_blobs.os = loraweave.common.files.os = os


def crowd(folder, num_writers, count):
    path, done = folder / "hub", folder / "done"
    with Hub(path, timeout_s=PATIENCE_S) as hub:
        hub.add(worlds.adapter(10**6), name="everyone's")
        hub.add(worlds.adapter(10**6 + 1), name="held")
        held = hub["held"]
        hub.remove("held")
    reading, telling = os.pipe()
    driver = os.getpid()
    readers = [forked(lambda: read(path, done, driver), telling) for _ in range(2)]
    writers = [forked(lambda number=number: write(path, number, count), telling) for number in range(num_writers)]
    with Hub(path, timeout_s=PATIENCE_S) as hub, hub._catalogue.reading() as connection:
        # one moment of the hub, which lasts while everything else happens
        before = connection.execute("SELECT count(*) FROM adapters").fetchone()[0]
        while any(os.waitid(os.P_PID, writer, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for writer in writers):
            hub.gc()
            time.sleep(0.05)
        after = connection.execute("SELECT count(*) FROM adapters").fetchone()[0]
    statuses = [os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) for writer in writers]
    done.touch()
    statuses += [os.waitstatus_to_exitcode(os.waitpid(reader, 0)[1]) for reader in readers]
    os.close(telling)
    with os.fdopen(reading) as pipe:
        said = pipe.read().splitlines()
    with Hub(path, timeout_s=PATIENCE_S) as hub:
        names = sorted(record.name for record in hub)
        numbers = range(num_writers)
        wanted = {"everyone's", *(f"renamed {number}" for number in numbers)}
        wanted |= {f"adapter {seed}" for seed in range(num_writers * count) if seed % count not in (1, 2)}
        wrong = [record.name for record in hub if hub[record.name].hash != record.hash]
        described = [hub.record(f"adapter {number * count}").description == f"by {number}" for number in numbers]
        return {
            "said": said,
            "statuses": statuses,
            "missing": sorted(wanted - set(names)),
            "unwanted": sorted(set(names) - wanted),
            "wrong": wrong,
            "described": all(described),
            "problems": list(hub.verify().problems),
            "long reader": before == after,
            "held": held.hash == worlds.adapter(10**6 + 1).hash,
        }
