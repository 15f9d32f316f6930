"""Records each change of the hub and cuts the power after its calls. Nothing is reported where a process may not trace."""

import hashlib
import os
import random
import shutil

import traced
import worlds
from kill import copy, faults, state
from recorded import Recorder

from loraweave.common import files
from loraweave.hub.stores import folder_blobs


def losses(disk, num_random, rng):
    """What may be left: nothing unsynced, everything, names without data, data without names, and draws in between."""
    num_names = len(disk.pending)
    for names in (0, num_names):
        for kept in (False, True):
            yield disk.image(num_names=names, keeps=lambda kept=kept: kept)
    for _ in range(num_random):
        share = rng.random()
        yield disk.image(num_names=rng.randint(0, num_names), keeps=lambda share=share: rng.random() < share)


def cuts(change, root, every, num_random):
    """(number of the call, whether the change had said it was done, what is left) of every different loss of power."""
    reading, writing = os.pipe()
    rng, seen = random.Random(0), set()
    with traced.Traced(lambda: change.run(root / "hub", lambda: os.write(writing, b"!"))) as child:
        recorder = Recorder(child, root, told_on=writing)
        for number, _ in enumerate(recorder.changes()):
            if number % every:
                continue
            for image in losses(recorder.disk, num_random, rng):
                digest = hashlib.sha256(repr((recorder.done, sorted(image.items()))).encode()).digest()
                if digest not in seen:
                    seen.add(digest)
                    yield number, recorder.done, image
    os.close(reading)
    os.close(writing)


def put(image, path):
    shutil.rmtree(path, ignore_errors=True)
    for name, content in image.items():
        place = path / name
        if content is None:
            place.mkdir(parents=True, exist_ok=True)
        else:
            place.write_bytes(content)


def lose_power(folder, change, every, num_random):
    root = folder / "disk"
    root.mkdir(parents=True)
    change.prepare(start := folder / "start")
    with change.known_steps():
        copy(start, root / "hub")
        old = state(copy(start, folder / "old")) if change.readable else None
        change.run(copy(start, folder / "new"))
        new = state(folder / "new")
        bad, num_cuts = [], 0
        for number, done, image in cuts(change, root, every, num_random):
            put(image, folder / "left")
            num_cuts += 1
            if found := faults(change, folder / "left" / "hub", done=done, old=old, new=new):
                bad.append([number, done, *found])
    return {"cuts": num_cuts, "bad": bad[:3]}


class Unsynced:
    """The module `os` as folder_blobs sees it, whose fsync does nothing: what the suite must notice."""

    def __getattr__(self, name):
        return (lambda descriptor: None) if name == "fsync" else getattr(os, name)


def report(folder, every, num_random, unsynced=False):
    """Cuts the power after one of `every` calls of each change; with `unsynced` an add forgets to sync its blob.

    `num_random` losses are drawn after each call beside the four extreme ones.
    """
    changes = worlds.CHANGES if traced.can_trace() else {}
    if unsynced:
        changes = {name: change for name, change in changes.items() if name == "add"}
        folder_blobs.os = files.os = Unsynced()
    try:
        return {name: lose_power(folder / name, change, every, num_random) for name, change in changes.items()}
    finally:
        folder_blobs.os = files.os = os
