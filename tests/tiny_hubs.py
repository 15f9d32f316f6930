"""Small hubs to be changed, interrupted and damaged: their adapters, the changes, and what is found afterwards."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
from tiny_models import random_adapter

from loraweave.common import files
from loraweave.hub.stores import folder_blobs


def adapter(seed, name=None, *, layers=("layer",), base_model="org/base", **fields):
    """An update of rank 2 from 5 inputs to 3 outputs in each layer, the same for the same seed."""
    name = f"adapter {seed}" if name is None else name
    return random_adapter(name, dict.fromkeys(layers, (2, 5, 3)), seed, base_model=base_model, **fields)


class Saved:
    """A composition of two files with a text in one of them."""

    def __init__(self, text):
        self.text = text

    def save_pretrained(self, folder):
        (folder / "below").mkdir(parents=True)
        (folder / "composition.json").write_text(json.dumps({"report": {"chosen": self.text}}))
        (folder / "below" / "weights").write_bytes(bytes(range(256)))
        return folder


def fill(hub):
    """Two adapters, one of them in two versions, a vector, a composition, and something for gc to do."""
    for seed in range(3):
        hub.add(adapter(seed))
    hub.add(adapter(6), name="adapter 1", replace=True)
    hub.store_vectors("e", [("adapter 0", "d", np.ones(3))])
    hub.remove("adapter 2")
    hub.save_composition("kept", Saved("old"))


# of a hub that `fill` made
CHANGES = {
    "add": lambda hub: hub.add(adapter(9), description="new"),
    "update": lambda hub: hub.update("adapter 0", description="new"),
    "rename": lambda hub: hub.rename("adapter 0", "new"),
    "remove": lambda hub: hub.remove("adapter 0"),
    "replace": lambda hub: hub.add(adapter(7), name="adapter 0", replace=True),
    "rollback": lambda hub: hub.rollback("adapter 1", 1),
    "store_vectors": lambda hub: hub.store_vectors("e", [("adapter 1", "d", np.ones(3))]),
    "save_composition": lambda hub: hub.save_composition("kept", Saved("new"), replace=True),
    "remove_composition": lambda hub: hub.remove_composition("kept"),
    "gc": lambda hub: hub.gc(),
}


def state(hub):
    """(what a user sees of the hub, what verify finds wrong), as JSON gives it back."""
    rows = [[record.name, record.version, record.hash, record.description] for record in hub]
    kept = [[stored.name, stored.hash, stored.report] for stored in hub.compositions()]
    return [rows, sorted(hub.vectors("e")), kept], list(hub.verify().problems)


class Steps:
    """Counts the calls of `os` and the statements of SQLite, and does `act(what)` before the one of number `left`."""

    def __init__(self, act, *, left=0, calls=("mkdir", "open", "write", "fsync", "fchmod", "replace")):
        self.act, self.left, self.calls, self.last = act, left, calls, None

    def count(self, what):
        self.left -= 1
        if self.left == 0:
            self.last = what
            self.act(what)

    def install(self, patch=setattr):
        """Counts from now on; `patch(thing, name, value)` sets an attribute."""
        steps, connect = self, sqlite3.connect

        class CountedOs:
            def __getattr__(self, name):
                real = getattr(os, name)

                def counted(*args, **options):
                    steps.count(name)
                    return real(*args, **options)

                return counted if name in steps.calls else real

        class Connection(sqlite3.Connection):
            def execute(self, statement, *args):
                # a ROLLBACK belongs to the handling of a fault
                if not statement.startswith("ROLLBACK"):
                    steps.count(statement)
                return super().execute(statement, *args)

            def close(self):
                if "close" in steps.calls:
                    steps.count("close")
                super().close()

        for module in (folder_blobs, files):
            patch(module, "os", CountedOs())
        patch(sqlite3, "connect", lambda *args, **options: connect(*args, **options, factory=Connection))


def flip(path, offset=-1):
    """Changes one bit of a file that is read-only."""
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[offset] ^= 4
    path.write_bytes(data)


def run_sql(folder, statement, *parameters):
    """Runs a statement on a hub's catalogue behind its back."""
    connection = sqlite3.connect(folder / "catalogue.sqlite", isolation_level=None)
    connection.execute(statement, parameters)
    connection.close()


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


def run_program(path, *arguments, timeout_s):
    """What a program of the tests prints, from its JSON. It may fork: unlike the tests' own process it has no threads."""
    places = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    # more threads would only take memory that is counted
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(path), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
