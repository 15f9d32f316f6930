"""Adds mutated adapter folders to a hub, each under a limit of time and memory.

The hub must take a folder or refuse it with an error of loraweave's; anything else is a failure.
"""

import os
import random
import resource
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import folders
import mutations
import packed

from loraweave.errors import LoraweaveError
from loraweave.hub.hub import Hub

# one case takes about a millisecond; the longest that is defined is the time limit of a pattern
LIMIT_S = 12.0
# what the process may grow by, beside twice the folder's size
ALLOWANCE_BYTES = 64 * 2**20
NAMES = [
    None, None, None, "../x", "a/b", "C:\\x", "\0", "", "x" * 10_000, "\u202ex", "con",
    "a\nb", "\ud800", ".", "'; DROP TABLE x",
]  # fmt: skip


class TooSlow(BaseException):
    """Not an Exception, so that no handler takes it for an ordinary error."""


def put(files, folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)
        elif content.kind == "link":
            (folder / name).symlink_to(content.target)
        elif content.kind == "pipe":
            os.mkfifo(folder / name)
        else:
            (folder / name).mkdir()


def keep(source, place):
    place.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(
            source, place / "case", symlinks=True, ignore=lambda _, names: [n for n in names if (source / n).is_fifo()]
        )
    else:
        shutil.copy(source, place)


class Limited:
    """Limits time and address space while it is entered."""

    def __init__(self, size_bytes, *, allowance_bytes=ALLOWANCE_BYTES, seconds=LIMIT_S):
        self.size_bytes = 2 * size_bytes + allowance_bytes
        self.seconds = seconds

    def __enter__(self):
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + self.size_bytes, resource.RLIM_INFINITY))
        signal.setitimer(signal.ITIMER_REAL, self.seconds)

    def __exit__(self, *_):
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def taken(hub, folder, name, *, allow_pickle=True):
    """Adds the folder, reads it back and removes it; whether what was read is what was added."""
    record = hub.add(folder, name=name, allow_pickle=allow_pickle)
    same = hub[record.name].hash == record.hash
    hub.remove(record.name)
    return same


def outcome(hub, folder, name, limits, *, allow_pickle=True):
    """(the class of what came of adding the folder, what is wrong with that or None)."""
    try:
        with limits:
            same = taken(hub, folder, name, allow_pickle=allow_pickle)
    except LoraweaveError as error:
        named = str(error)
        # a message is for people; it may quote a file, but not pour it out
        return type(error).__name__, None if 0 < len(named) < 3_000 else f"a message of {len(named)} characters"
    except (Exception, TooSlow) as error:
        return type(error).__name__, repr(error)[:300]
    return "added", None if same else "what was read back is another adapter"


def strangers(folder):
    """What lies in the sandbox and is neither the hub's nor the suite's."""
    own = {"hub", "failures", "temporary"}
    hub = {"blobs", "tmp", "write.lock", "catalogue.sqlite", "catalogue.sqlite-wal", "catalogue.sqlite-shm"}
    found = [path.name for path in folder.iterdir() if path.name not in own and not path.name.startswith("case")]
    found += [path.name for path in (folder / "temporary").iterdir()]
    return found + [path.name for path in (folder / "hub").iterdir() if path.name not in hub]


def case(rng, folder, files):
    """Puts the files, spoiled, into a folder, or one time in eight into an archive; (source, size, what was done)."""
    made = mutations.spoil(rng, files) if rng.random() < 0.9 else []
    if rng.random() < 7 / 8:
        put(files, folder / "case")
        return folder / "case", sum(len(content) for content in files.values() if isinstance(content, bytes)), made
    suffix, raw = packed.archive(rng, files)
    source = folder / f"case{suffix}"
    source.write_bytes(raw)
    return source, len(raw), [*made, suffix]


def fuzz(folder, first, count):
    sound = folders.folders()
    outcomes, made_by, failures = Counter(), Counter(), []
    with Hub(folder / "hub") as hub:
        for name, files in sound.items():
            put(files, folder / "case")
            # not limited: the first call imports
            assert taken(hub, folder / "case", name), name
        for number in range(first, first + count):
            rng = random.Random(number)
            kind = rng.choice(sorted(sound))
            files = dict(sound[kind])
            source, size_bytes, made = case(rng, folder, files)
            consent = rng.random() < 0.5
            result, wrong = outcome(hub, source, rng.choice(NAMES), Limited(size_bytes), allow_pickle=consent)
            outcomes[result] += 1
            made_by.update(made)
            if wrong or (number % 50 == 0 and strangers(folder)):
                failures.append([number, kind, made, wrong or strangers(folder)])
                keep(source, folder / "failures" / str(number))
            if number % 500 == 0:
                hub.gc()
        hub.gc()
        problems = list(hub.verify().problems)
    return {
        "cases": count,
        "outcomes": outcomes,
        "mutations": made_by,
        "failures": failures[:20],
        "num_failures": len(failures),
        "problems": problems,
        "left": strangers(folder),
    }


@contextmanager
def prepared(folder):
    """A process in which cases can be limited, and which works in `folder`, where whatever is left behind is found."""
    before = Path.cwd(), tempfile.tempdir
    signal.signal(signal.SIGALRM, too_slow)
    # a path made from a name of the file would be relative to here; archives are unpacked in the other
    os.chdir(folder)
    (folder / "temporary").mkdir()
    tempfile.tempdir = str(folder / "temporary")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        os.chdir(before[0])
        tempfile.tempdir = before[1]


def too_slow(*_):
    raise TooSlow


def report(folder, count, first):
    """Adds `count` cases, from the number `first` on. The folder of a failure is kept in `failures/<number>`."""
    with prepared(folder):
        return fuzz(folder, first, count)
