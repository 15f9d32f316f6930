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


def kind(child, call, root):
    """What a call does to what: its name, and the file or the folder right below the hub's that it is about."""
    path = os.path.relpath(child.path(call) or "/", root)
    return f"{call.name} {'outside' if path.startswith('..') else path.split(os.sep)[0]}"


def points(change, path, most, met):
    """The numbers of the system calls to die before, each with its kind.

    All, or up to `most` of those that change files, spread evenly, and one of each kind that is not in `met` yet.
    """
    with traced.Traced(lambda: change.run(path)) as child:
        kinds = [kind(child, call, path) if call.name in traced.CHANGING else None for call in child.calls()]
    if child.status:
        raise RuntimeError(f"the change failed by itself with status {child.status}")
    if not most:
        return dict(enumerate([*kinds, None]))
    places = {}
    for number, made in enumerate(kinds):
        if made is not None:
            places.setdefault(made, []).append(number)
    changing = sorted(number for numbers in places.values() for number in numbers)
    chosen = {changing[i * len(changing) // most] for i in range(most)}
    # not the first of each kind: what tells two calls of a kind apart is what came before them
    chosen |= {numbers[len(numbers) // 2] for made, numbers in places.items() if made not in met}
    met.update(places)
    return {number: kinds[number] for number in sorted(chosen)}


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


def kill_everywhere(folder, change, most, met):
    change.prepare(start := folder / "start")
    with change.known_steps():
        # here first: what a child imports, the next one would import again, by other calls
        change.run(copy(start, folder / "new"))
        new = state(folder / "new")
        kinds = points(change, copy(start, folder / "whole"), most, met)
        old = state(copy(start, folder / "old")) if change.readable else None
        bad, kills = [], 0
        for number in kinds:
            died, done = kill_at(number, change, copy(start, folder / "killed"))
            kills += died
            if found := faults(change, folder / "killed", done=done, old=old, new=new):
                bad.append([number, *found])
    return {"kills": kills, "points": len(kinds), "kinds": sorted({made for made in kinds.values() if made}), "bad": bad[:3]}


def report(folder, most):
    """Kills each change at `most` system calls that change files and one of each new kind; with 0 at every system call."""
    changes, met = worlds.CHANGES if traced.can_trace() else {}, set()
    return {name: kill_everywhere(folder / name, change, most, met) for name, change in changes.items()}
