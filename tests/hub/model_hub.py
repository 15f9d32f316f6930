"""A stand-in for the model hub on loopback, and a driver that loads from it in a process of its own.

The hub's address is read once, when huggingface_hub is imported: hence the process. As a script it takes the server's
folder and writes one JSON object to stdout: what each call gave.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secretsecretsecret"


class Handler(BaseHTTPRequestHandler):
    """Serves root/owner/name: its list of files, and the files themselves. Repositories named `private` want the token."""

    root: Path
    requests: list[str]

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def log_message(self, *arguments):
        pass

    def _answer(self, *, body):
        self.requests.append(self.path)
        path = self.path.partition("?")[0].strip("/").split("/")
        if path[:2] == ["api", "models"]:
            repository, rest = self.root / "/".join(path[2:4]), path[4:]
        else:
            repository, rest = self.root / "/".join(path[:2]), path[2:]
        if not repository.is_dir():
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        if repository.name == "private" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"", {"X-Error-Code": "RepoNotFound"}, body=body)
        if len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"}, body=body)
        if path[0] == "api":
            return self._answer_api(repository, rest, body=body)
        file = repository.joinpath(*rest[2:])
        if rest[0] != "resolve" or not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body=body)
        data = file.read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        return self._send(200, data, headers, body=body)

    def _answer_api(self, repository, rest, *, body):
        files = sorted(str(file.relative_to(repository)) for file in repository.rglob("*") if file.is_file())
        if rest and rest[0] == "tree":
            found = [
                {"type": "file", "path": name, "size": (repository / name).stat().st_size, "oid": COMMIT}
                for name in files
                if name.startswith("/".join(rest[2:]))
            ]
            # a folder that is not there, such as the one for further chat templates
            if not found:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)
        else:
            found = {
                "id": "/".join(repository.parts[-2:]),
                "sha": COMMIT,
                "private": False,
                "tags": [],
                "siblings": [{"rfilename": name} for name in files],
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
    """(address, list of the paths that were asked for) of a server over root/owner/name/files."""
    requests: list[str] = []
    handler = type("RootedHandler", (Handler,), {"root": Path(root), "requests": requests})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
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
    from loraweave.hub.fingerprint import fingerprint

    def base(name):
        model, tokenizer = lw.load_base(name)
        return {
            "name": model.name_or_path,
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
            "pickled base": _outcome(lambda: base("tiny/pickled")),
        }
    else:
        found |= {
            "new base": _outcome(lambda: base("tiny/late")),
            "new adapter": _outcome(lambda: adapter("tiny/late")),
            "private adapter": _outcome(lambda: adapter("tiny/private")),
        }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1] == "online")
