"""A server in front of one of ours that answers as other engines do, or gives requests to somebody else."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Refuse(Exception):
    """What a hook raises to answer with a status: Refuse(400, "no logprobs")."""


@contextmanager
def proxy(behind, *, before=lambda body, in_flight: body, routes=None):
    """The URL of a server: `before` changes the body of each completion, `routes` {(method, path): body -> JSON} come first.

    `in_flight` is how many completions are being answered.
    """
    lock, open_requests = threading.Lock(), [0]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *line):
            pass

        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, body):
            with lock:
                open_requests[0] += 1
            try:
                status, told = 200, self.told(body)
            except Refuse as refused:
                status, told = refused.args[0], {"error": {"message": refused.args[1]}}
            except urllib.error.HTTPError as error:
                status, told = error.code, json.loads(error.read())
            with lock:
                open_requests[0] -= 1
            data = json.dumps(told).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def told(self, body):
            own = (routes or {}).get((self.command, self.path))
            if own is not None:
                return own(body)
            data = None
            if body is not None:
                data = json.dumps(before(body, open_requests[0])).encode()
            request = urllib.request.Request(behind + self.path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
