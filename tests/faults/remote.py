"""A program of its own: kills a writer of a hub on PostgreSQL and S3 before each of its messages to either server.

Its arguments are an empty folder, a URL of PostgreSQL with `{}` for the schema and one of S3 with `{}` for the prefix. It
prints, for every change, the number of kills and what was wrong after one of them.
"""

import json
import os
import signal
import sys
from contextlib import suppress

import psycopg
import s3fs
import torch
from tiny_hubs import CHANGES, ended, fill, forked, state

from loraweave.hub.hub import Hub

STORE_CALLS = ("pipe_file", "rm_file", "cat_file", "open", "find", "info", "exists")


class Killer:
    """Kills the process before the message of that number."""

    def __init__(self, number):
        self.left = number

    def install(self):
        self._count(psycopg.Connection, "execute")
        for name in STORE_CALLS:
            self._count(s3fs.S3FileSystem, name)

    def _count(self, kind, name):
        real = getattr(kind, name)

        def counted(*args, **kwargs):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(kind, name, counted)


class Place:
    """A hub, which only children open: neither library's connections survive a fork."""

    def __init__(self, folder, postgres, s3, name):
        self.arguments = postgres.format(name), s3.format(name)
        self.answer = folder + "/answer"

    def open(self):
        return Hub(self.arguments[0], blobs=self.arguments[1])

    def fill(self):
        with self.open() as hub:
            fill(hub)

    def change(self, change, number):
        hub = self.open()
        killer = Killer(number)
        killer.install()
        CHANGES[change](hub)

    def look(self):
        with self.open() as hub:
            for record in hub:
                assert hub[record.name].hash == record.hash
            with open(self.answer, "w") as file:
                json.dump(state(hub), file)

    def state(self):
        with suppress(FileNotFoundError):
            os.unlink(self.answer)
        assert ended(forked(self.look)) == 0
        with open(self.answer) as file:
            return json.load(file)


def kill_at_every_message(folder, postgres, s3, change):
    def fresh(label):
        place = Place(folder, postgres, s3, f"{change}_{label}")
        assert ended(forked(place.fill)) == 0
        return place

    whole = fresh("whole")
    old = whole.state()[0]
    assert ended(forked(lambda: whole.change(change, 0))) == 0
    new = whole.state()[0]
    place, bad = fresh("0"), []
    for number in range(1, 200):
        status = ended(forked(lambda place=place, number=number: place.change(change, number)))
        found, problems = place.state()
        if problems or found not in (old, new) or (status == 0 and found != new) or status not in (0, -signal.SIGKILL):
            bad.append([number, status, found, problems])
        if status == 0 or bad:
            return {"kills": number - 1, "bad": bad}
        if found == new and old != new:
            # done, although the writer did not live to say so: start over for the next message
            place = fresh(str(number))
    return {"kills": -1, "bad": bad}


def main():
    torch.set_num_threads(1)
    folder, postgres, s3 = sys.argv[1:]
    print(json.dumps({change: kill_at_every_message(folder, postgres, s3, change) for change in CHANGES}))


if __name__ == "__main__":
    main()
