"""Kills a process at system calls of each change. Nothing is reported where a process may not trace its child."""

import os
import shutil

import traced
import worlds

from loraweave.hub.hub import Hub


def kill_at(number, change, path):
    """Kills the change before the system call of that number; (whether it died of it, whether it had said it was done)."""
    reading, writing = os.pipe()

    with traced.Traced(lambda: change.run(path, lambda: os.write(writing, b"!"))) as child:
        os.close(writing)
        next((call for at, call in enumerate(child.calls()) if at == number), None)
        child.kill()
        died = child.status < 0
    with os.fdopen(reading, "rb") as pipe:
        return died, bool(pipe.read())


def points(change, path, most):
    """The numbers of the system calls to die before: all, or up to `most` of those that change files, spread evenly."""
    with traced.Traced(lambda: change.run(path)) as child:
        calls = list(child.calls())
    if child.status:
        raise RuntimeError(f"the change failed by itself with status {child.status}")
    if not most:
        return range(len(calls) + 1)
    changing = [number for number, call in enumerate(calls) if call.name in traced.CHANGING]
    return sorted({changing[i * len(changing) // most] for i in range(most)})


def copy(start, path):
    shutil.rmtree(path, ignore_errors=True)
    if start.exists():
        shutil.copytree(start, path)
    return path


def state(path):
    with Hub(path) as hub:
        return worlds.state(hub)


def faults(change, path, *, done, old, new):
    """What is wrong after a kill: the hub must be old or new, new if that was acknowledged, and a repetition must work."""
    try:
        found = []
        if change.readable:
            # a flipped blob stays flipped until the change that heals it is done
            harmed = change.prepare is worlds.harmed and not done
            found += worlds.faults(path, [new] if done else [old, new], may_be_harmed=harmed)
        change.run(path)
        return found + worlds.faults(path, [new])
    except Exception as error:
        return [repr(error)]


def kill_everywhere(folder, change, most):
    change.prepare(start := folder / "start")
    with change.known_steps():
        # here first: what a child imports, the next one would import again, by other calls
        change.run(copy(start, folder / "new"))
        new = state(folder / "new")
        numbers = points(change, copy(start, folder / "whole"), most)
        old = state(copy(start, folder / "old")) if change.readable else None
        bad, kills = [], 0
        for number in numbers:
            died, done = kill_at(number, change, copy(start, folder / "killed"))
            kills += died
            if found := faults(change, folder / "killed", done=done, old=old, new=new):
                bad.append([number, *found])
    return {"kills": kills, "points": len(numbers), "bad": bad[:3]}


def report(folder, most):
    """Kills each change at up to `most` system calls that change files, or with 0 at every system call."""
    changes = worlds.CHANGES if traced.can_trace() else {}
    return {name: kill_everywhere(folder / name, change, most) for name, change in changes.items()}
