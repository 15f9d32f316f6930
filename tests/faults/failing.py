"""Has system calls of each change fail. Nothing is reported where a process may not trace its child, nor off x86_64."""

import errno
import json
import os
import platform

import traced
import worlds
from kill import copy, state

from loraweave.errors import HubError

WRITING = {"write", "pwrite64", "fallocate", "mkdir", "mkdirat"}
# fault -> (the errno, the calls that may fail with it, whether all later ones do too)
FAULTS = {
    "full": (errno.ENOSPC, WRITING, True),
    "io": (errno.EIO, traced.CHANGING, False),
    "stale": (errno.ESTALE, traced.CHANGING | traced.READING, False),
}


def candidates(child, root, names):
    """Whether each call of the child is one on the hub's files that may fail."""
    for call in child.calls():
        path = child.path(call) if call.name in names else None
        yield path is not None and path.startswith(str(root))


def run(change, path, telling):
    """The child's work: the change, and then one line on what came of it."""
    try:
        change.run(path)
        said = ["done", ""]
    except HubError as error:
        said = ["named", f"{type(error).__name__}: {error}"]
    except Exception as error:
        said = ["raised", repr(error)]
    os.write(telling, json.dumps(said).encode())


def fail_at(number, change, path, fault):
    """Runs the change, whose call of that number fails; what came of it."""
    code, names, lasting = FAULTS[fault]
    reading, telling = os.pipe()
    with traced.Traced(lambda: run(change, path, telling)) as child:
        at = -1
        for fits in candidates(child, path, names):
            at += fits
            if fits and (at == number or (lasting and at > number)):
                child.fail(code)
    os.close(telling)
    with os.fdopen(reading, "rb") as pipe:
        return json.loads(pipe.read() or b'["died", ""]')


def size_of_files(path):
    """Of blobs and temporary files, that is, without the catalogue's."""
    return sum(file.stat().st_size for file in path.glob("*/**/*") if file.is_file())


def faults(change, path, said, *, old, new, size_bytes):
    """What is wrong afterwards: an error must have a name and leave the hub as it was, and a repetition must work."""
    kind, message = said
    found = [] if kind in ("done", "named") else [f"{kind}: {message}"]
    try:
        if change.readable:
            harmed = change.prepare is worlds.harmed and kind != "done"
            if "HubFull" in message and size_of_files(path) > size_bytes:
                found.append("the space was not freed")
            found += worlds.faults(path, [new] if kind == "done" else [old], may_be_harmed=harmed)
        change.run(path)
        return found + worlds.faults(path, [new])
    except Exception as error:
        return [*found, repr(error)]


def fail_everywhere(folder, change, most, fault):
    change.prepare(start := folder / "start")
    size_bytes = size_of_files(start)
    with change.known_steps():
        change.run(copy(start, folder / "new"))
        new = state(folder / "new")
        old = state(copy(start, folder / "old")) if change.readable else None
        path = copy(start, folder / "whole")
        with traced.Traced(lambda: change.run(path)) as child:
            num_calls = sum(candidates(child, path, FAULTS[fault][1]))
        bad, named = [], 0
        for number in sorted({i * num_calls // most for i in range(most)}) if most else range(num_calls):
            said = fail_at(number, change, copy(start, path), fault)
            named += said[0] == "named"
            if found := faults(change, path, said, old=old, new=new, size_bytes=size_bytes):
                bad.append([number, said, *found])
    return {"failures": num_calls if not most else min(most, num_calls), "named": named, "bad": bad[:3], "num_bad": len(bad)}


def report(folder, most):
    """Has up to `most` calls of each change fail by each fault, one a run; with 0 every such call."""
    able = traced.can_trace() and platform.machine() == "x86_64"
    return {
        f"{name}, {fault}": fail_everywhere(folder / name / fault, change, most, fault)
        for name, change in (worlds.CHANGES.items() if able else ())
        for fault in FAULTS
    }
