"""Opens a hub in a folder that really cannot be written, as another user where it is root."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import worlds

from loraweave.errors import HubReadOnly
from loraweave.hub.hub import Hub

NOBODY = 65534
CALLS = {
    "add": lambda hub: hub.add(worlds.adapter(9)),
    "update": lambda hub: hub.update("adapter 0", description="new"),
    "rename": lambda hub: hub.rename("adapter 0", "new"),
    "remove": lambda hub: hub.remove("adapter 0"),
    "store_vectors": lambda hub: hub.store_vectors("e", [("adapter 0", "d", [1.0, 1.0, 1.0])]),
    "gc": lambda hub: hub.gc(),
}


def contents(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def attempts(path):
    """What each call says, with reading first."""
    with Hub(path) as hub:
        said = {"names": [record.name for record in hub], "same": hub["adapter 0"].hash == worlds.adapter(0).hash}
        said["problems"] = list(hub.verify().problems)
        for name, call in CALLS.items():
            try:
                call(hub)
                said[name] = "done"
            except HubReadOnly as error:
                said[name] = str(error)
    return said


def unprivileged(work):
    """What `work` returns in a child that has no right to write what it does not own."""
    reading, telling = os.pipe()
    if os.fork() == 0:
        if os.geteuid() == 0:
            os.setuid(NOBODY)
        try:
            os.write(telling, json.dumps(work()).encode())
        except BaseException as error:
            os.write(telling, json.dumps(repr(error)).encode())
        finally:
            os._exit(0)
    os.close(telling)
    with os.fdopen(reading, "rb") as pipe:
        said = json.loads(pipe.read())
    os.wait()
    return said


def report(folder):
    """What reading and writing said, and whether the hub is byte for byte what it was. `folder` may be closed to others."""
    root = Path(tempfile.mkdtemp())
    try:
        path = root / "hub"
        worlds.fresh(path)
        for parent, _, files in os.walk(root):
            os.chmod(parent, 0o555)
            for name in files:
                os.chmod(os.path.join(parent, name), 0o444)
        before = contents(path)
        return {"said": unprivileged(lambda: attempts(path)), "unchanged": contents(path) == before}
    finally:
        for parent, _, _ in os.walk(root):
            os.chmod(parent, 0o755)
        shutil.rmtree(root)
