"""A stand-in for the model hub on loopback, and a driver that loads from it in a process of its own.

The hub's address is read once, when huggingface_hub is imported: hence the process. As a script it takes the server's
folder and writes one JSON object to stdout: what each call gave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LATER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_secretsecretsecret"


class Handler(BaseHTTPRequestHandler):
    """Serves root/owner/name: its list of files, and the files themselves.

    Repositories named `private` want the token, `gated` refuses everyone, `limited` answers the first two requests with
    429 and `flooded` all, `down` is out of order, `cut` breaks off the first answer of its weights and `severed` every one.
    `old` has moved to `lora`, and `moving` is at another commit once its file `moved` is there.

    Whoever has the token may make repositories of `mine` and commit files to them, `full` excepted, which is out of order.
    """

    root: Path
    requests: list[str]
    ranges: list[tuple[str, str]]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def do_POST(self):
        self.requests.append(self.path)
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0].strip("/").split("/")
        path = path if path[-1] == "batch" else path[1:]
        sent = [json.loads(line) for line in raw.splitlines()]
        if path[-1] == "batch":
            return self._send_json(self._lfs(sent[0]))
        if path[-1] == "validate-yaml":
            return self._send_json({"errors": [], "warnings": []})
        if path[-1] == "create":
            owner, name = sent[0]["organization"], sent[0]["name"]
        else:
            owner, name = path[1:3]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"", {}, body=True)
        if owner != "mine":
            return self._send(403, b"", {}, body=True)
        if name == "full":
            return self._send(503, b"", {}, body=True)
        if path[-1] == "create":
            return self._send_json(self._create(self.root / owner / name, sent[0]))
        if path[3] == "preupload":
            mode = {True: "lfs", False: "regular"}
            files = [
                {"path": file["path"], "uploadMode": mode[file["path"].endswith(".safetensors")], "shouldIgnore": False}
                for file in sent[0]["files"]
            ]
            return self._send_json({"files": files})
        return self._send_json(self._commit(self.root / owner / name, sent))

    def _lfs(self, sent):
        where = f"http://127.0.0.1:{self.server.server_port}/lfs"
        actions = [{**each, "actions": {"upload": {"href": f"{where}/{each['oid']}"}}} for each in sent["objects"]]
        return {"transfer": "basic", "objects": actions}

    def do_PUT(self):
        place = self.root / self.path.strip("/")
        place.parent.mkdir(exist_ok=True)
        place.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(200, b"", {}, body=True)

    def _list(self):
        asked = parse_qs(self.path.partition("?")[2])
        words = json.loads((self.root / "listed.json").read_text())
        found = [
            each
            for each in words
            if set(asked.get("filter", ())) <= set(each["tags"]) and asked.get("search", [""])[0] in each["id"]
        ]
        return self._send_json(found)

    def _create(self, repository, sent):
        repository.mkdir(parents=True, exist_ok=True)
        (repository / "made").write_text(json.dumps(sent))
        return {"url": f"http://127.0.0.1:{self.server.server_port}/{repository.parent.name}/{repository.name}"}

    def _commit(self, repository, sent):
        for line in sent:
            if line["key"] == "file":
                place = repository / line["value"]["path"]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(line["value"]["content"]))
            elif line["key"] == "lfsFile":
                place = repository / line["value"]["path"]
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(self.root / "lfs" / line["value"]["oid"], place)
            else:
                (repository / "message").write_text(line["value"]["summary"])
        where = f"http://127.0.0.1:{self.server.server_port}/{repository.parent.name}/{repository.name}/commit/{COMMIT}"
        return {"commitUrl": where, "commitOid": COMMIT}

    def _send_json(self, found):
        self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body=True)

    def log_message(self, *arguments):
        pass

    def _answer(self, *, body):
        self.requests.append(self.path)
        path = self.path.partition("?")[0].strip("/").split("/")
        if path == ["api", "models"]:
            return self._list()
        if path[:2] == ["api", "models"]:
            repository, rest = self.root / "/".join(path[2:4]), path[4:]
        else:
            repository, rest = self.root / "/".join(path[:2]), path[2:]
        if repository.name == "old":
            where = self.path.replace("/old", "/lora")
            return self._send(307, b"", {"Location": where}, body=body)
        if trouble := self._trouble(repository):
            return self._send(*trouble, body=body)
        if not repository.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        if repository.name == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        self.commit = LATER_COMMIT if (repository / "moved").exists() else COMMIT
        if len(rest) > 1 and rest[1] not in ("main", COMMIT, self.commit):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
        if path[0] == "api":
            return self._answer_api(repository, rest, body=body)
        file = repository.joinpath(*rest[2:])
        if rest[0] != "resolve" or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, body=body)
        return self._send_file(repository, file, rest[1], body=body)

    def _trouble(self, repository):
        asked = sum(f"/{repository.name}" in path for path in self.requests)
        if repository.name == "gated":
            return 403, b"", {"X-Error-Code": "GatedRepo"}
        if repository.name == "flooded" or (repository.name == "limited" and asked <= 2):
            return 429, b"", {"Retry-After": "0"}
        return (503, b"", {}) if repository.name == "down" else None

    def _send_file(self, repository, file, revision, *, body):
        data = file.read_bytes()
        commit = self.commit if revision == "main" else revision
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not body:
            return self._send(200, data, headers, body=False)
        status, start = 200, 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        breaks = repository.name == "severed" or (repository.name == "cut" and not self.ranges)
        if file.suffix == ".safetensors" and repository.name in ("cut", "severed"):
            self.ranges.append((repository.name, asked or ""))
            if breaks:
                self._send(status, data[start:], headers, body=False)
                self.wfile.write(data[start : start + 128] if repository.name == "cut" else b"")
                self.wfile.flush()
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
        return self._send(status, data[start:], headers, body=True)

    def _answer_api(self, repository, rest, *, body):
        files = sorted(str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file())
        if rest and rest[0] == "tree":
            found = [
                {"type": "file", "path": name, "size": (repository / name).stat().st_size, "oid": self.commit}
                for name in files
                if name.startswith("/".join(rest[2:]))
            ]
            # a folder that is not there, such as the one for further chat templates
            if not found:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        else:
            found = {
                "id": "/".join(repository.parts[-2:]),
                "sha": self.commit,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": name, "size": (repository / name).stat().st_size} for name in files],
            }
        return self._send(200, json.dumps(found).encode(), {"Content-Type": "application/json"}, body=body)

    def _send(self, status, data, headers, *, body):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextmanager
def serving(root):
    """(address, paths asked for, (repository, range) of what breaks off) of a server over root/owner/name/files."""
    requests: list[str] = []
    handler = type("RootedHandler", (Handler,), {"root": Path(root), "requests": requests, "ranges": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests, handler.ranges
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _outcome(call):
    try:
        return call()
    except Exception as error:
        named = [cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "loraweave.errors"]
        return {"error": type(error).__name__, "named": bool(named), "message": str(error)}


def main(online):
    import loraweave as lw
    from loraweave.hub.base import fingerprint

    def base(name, **keywords):
        model, tokenizer = lw.load_base(name, **keywords)
        return {
            "name": model.name_or_path,
            "commit": lw.base_key(model).revision,
            "samples": list(fingerprint(model).samples),
            "training": model.training,
            "tokens": tokenizer("a b")["input_ids"],
            "pads": tokenizer.pad_token_id is not None,
        }

    def adapter(name, **keywords):
        found = lw.Adapter.from_pretrained(name, **keywords)
        return {"name": found.name, "hash": found.hash, "base_model": found.base_model}

    found = {
        "base": _outcome(lambda: base("tiny/llama")),
        "adapter": _outcome(lambda: adapter("tiny/lora")),
        "cached adapter": _outcome(lambda: adapter("tiny/lora", local_files_only=True)),
        "revision": _outcome(lambda: adapter("tiny/lora", revision=COMMIT)),
    }
    if online:
        found |= {
            "unknown base": _outcome(lambda: base("tiny/nothing")),
            "unknown adapter": _outcome(lambda: adapter("tiny/nothing")),
            "unknown revision": _outcome(lambda: adapter("tiny/lora", revision="v9")),
            "not cached": _outcome(lambda: adapter("tiny/other", local_files_only=True)),
            "without token": _outcome(lambda: adapter("tiny/private")),
            "with token": _outcome(lambda: adapter("tiny/private", token=TOKEN)),
            "base at a revision": _outcome(lambda: base("tiny/llama", revision=COMMIT)),
            "base at no revision": _outcome(lambda: base("tiny/llama", revision="v9")),
            "pickled base": _outcome(lambda: base("tiny/pickled")),
        }
    else:
        found |= {
            "new base": _outcome(lambda: base("tiny/late")),
            "new adapter": _outcome(lambda: adapter("tiny/late")),
            "private adapter": _outcome(lambda: adapter("tiny/private")),
        }
    json.dump(found, sys.stdout)


def troubles(root):
    """What each trouble gave, with everything logged; `moving` moves in between."""
    from huggingface_hub import constants

    from loraweave.hub.adapter import Adapter

    logging.basicConfig(level=logging.DEBUG)
    # the client keeps what came in whole chunks, of 10 MB
    constants.DOWNLOAD_CHUNK_SIZE = 64

    def adapter(name, **keywords):
        found = Adapter.from_pretrained(name, **keywords)
        return {"hash": found.hash, "source": found.card["source"]}

    found = {
        name: _outcome(partial(adapter, f"tiny/{name}", token=TOKEN))
        for name in ("gated", "limited", "flooded", "down", "cut", "severed", "old", "private")
    }
    found["before"] = _outcome(lambda: adapter("tiny/moving"))
    (root / "tiny" / "moving" / "moved").touch()
    shutil.copy(root / "tiny" / "second" / "adapter_model.safetensors", root / "tiny" / "moving")
    found["after"] = _outcome(lambda: adapter("tiny/moving"))
    found["the commit before"] = _outcome(lambda: adapter("tiny/moving", revision=COMMIT, local_files_only=True))
    json.dump(found, sys.stdout)


def routers(folder):
    """A saved router pushed and read from there, and what cannot be; everything logged."""
    import loraweave as lw

    logging.basicConfig(level=logging.DEBUG)
    made = lw.router(folder)

    def read(name, **keywords):
        found = lw.router(name, **keywords)
        return {"state": {key: value.tolist() for key, value in found.state_dict().items()}, "pool": list(found.pool or ())}

    found = {
        "push": _outcome(
            lambda: made.push_to_hub("mine/arrow", pool=made.pool, token=TOKEN, private=True, commit_message="an arrow")
        ),
        "read": _outcome(lambda: read("mine/arrow", revision=COMMIT)),
        "cached": _outcome(lambda: read("mine/arrow", revision=COMMIT, local_files_only=True)),
        "alone": _outcome(lambda: made.push_to_hub("mine/alone", token=TOKEN)),
        "alone, read": _outcome(lambda: read("mine/alone")),
        "wrong token": _outcome(lambda: made.push_to_hub("mine/arrow", token="hf_wrongwrongwrong")),
        "others'": _outcome(lambda: made.push_to_hub("theirs/arrow", token=TOKEN)),
        "no id": _outcome(lambda: made.push_to_hub("a/b/c", token=TOKEN)),
        "out of order": _outcome(lambda: made.push_to_hub("mine/full", token=TOKEN)),
        "unknown": _outcome(lambda: read("mine/nothing")),
        "no router": _outcome(lambda: read("tiny/lora")),
    }
    json.dump(found, sys.stdout)


def shared(root):
    """What of each kind comes back once it was pushed."""
    import torch

    import loraweave as lw

    def llama():
        return lw.load_base(root / "tiny" / "llama")

    model, tokenizer = llama()
    lora = lw.Adapter.from_pretrained(root / "tiny" / "lora")
    task = lw.Task([("a", "a")], instruction="say it")
    weighed = lw.compose(model, tokenizer, [lora], task, method="manual", weights={lora.name: 0.5}, progress=False)
    routed = lw.compose(model, tokenizer, [lora], task, method="arrow", top_k=1, folds=0, progress=False)
    experts = lw.experts("mola", model, num_experts=(2,), rank=2, target_modules=("q_proj",))
    ids = torch.tensor([[3, 1, 3]])

    def logits(of):
        with torch.no_grad():
            return of(ids).logits.tolist()

    def answer(composition):
        with composition.activate() as live:
            return logits(live)

    def again(name):
        return answer(lw.Composition.from_pretrained(name, model, tokenizer))

    found = {
        "adapter": _outcome(lambda: lora.push_to_hub("mine/lora", token=TOKEN)),
        "export": _outcome(lambda: lora.export(root / "exported").push_to_hub("mine/export", token=TOKEN)),
        "weighed": _outcome(lambda: weighed.push_to_hub("mine/weighed", token=TOKEN)),
        "routed": _outcome(lambda: routed.push_to_hub("mine/routed", token=TOKEN)),
        "experts": _outcome(lambda: experts.push_to_hub("mine/experts", token=TOKEN)),
        "no right": _outcome(lambda: weighed.push_to_hub("theirs/weighed", token=TOKEN)),
        "adapter, hashes": _outcome(lambda: [lora.hash, lw.Adapter.from_pretrained("mine/lora").hash]),
        "export, hash": _outcome(lambda: lw.Adapter.from_pretrained("mine/export").hash),
        "weighed, answers": _outcome(lambda: [answer(weighed), again("mine/weighed")]),
        "routed, answers": _outcome(lambda: [answer(routed), again("mine/routed")]),
        "experts, answers": _outcome(lambda: [logits(experts), logits(lw.experts("mine/experts", llama()[0]))]),
        "no composition": _outcome(lambda: again("mine/lora")),
        "no experts": _outcome(lambda: lw.experts("mine/lora", llama()[0])),
    }
    json.dump(found, sys.stdout)


def listed(root):
    """What the model hub has for a base, by what it is filtered by, and the record of one that is added."""
    import loraweave as lw
    from loraweave.extensions.sources import discover

    def names(**filters):
        return [str(each) for each in discover("tiny/llama", **filters)]

    def add():
        [one] = discover("tiny/llama", query="second")
        (Path.cwd() / one.repository).mkdir(parents=True)
        record = lw.Hub(root / "hub").add(one)
        figures = [one.license, one.likes, one.downloads, one.size_bytes, one.commit]
        return [record.name, record.hash, figures, record.source.location, record.source.revision]

    filtered = {
        "all": _outcome(names),
        "one": _outcome(lambda: names(limit=1)),
        "named": _outcome(lambda: names(query="second")),
        "mit": _outcome(lambda: names(license=["MIT"])),
        "liked": _outcome(lambda: names(min_likes=5)),
        "loaded": _outcome(lambda: names(min_downloads=50)),
        "small": _outcome(lambda: names(max_bytes=10)),
        "folder": _outcome(lambda: discover(root / "tiny" / "llama")),
        "added": _outcome(add),
    }
    json.dump(filtered, sys.stdout)


def loaded_from(address, home, *arguments, cwd=None, **variables):
    """What this file, run with that model hub and cache, found, and all that it printed."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    command = [sys.executable, __file__, *map(str, arguments)]
    environment = {**plain, **own, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return {**json.loads(done.stdout), "printed": done.stdout + done.stderr}


if __name__ == "__main__":
    if sys.argv[1] == "troubles":
        troubles(Path(sys.argv[2]))
    elif sys.argv[1] == "shared":
        shared(Path(sys.argv[2]))
    elif sys.argv[1] == "listed":
        listed(Path(sys.argv[2]))
    elif sys.argv[1] == "routers":
        routers(Path(sys.argv[2]))
    else:
        main(sys.argv[1] == "online")
