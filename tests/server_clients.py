"""A server on loopback, its clients, and a gate before its model."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from contextlib import contextmanager

from loraweave.serving.app import make_server
from loraweave.serving.scheduler import Metrics


def running(hub, model, tokenizer, *, limits=None, **options):
    """The port of a server that ends with the block."""
    return answering(make_server(hub, model, tokenizer, port=0, limits=limits, log_level="critical", **options))


@contextmanager
def answering(server):
    """The port of a uvicorn server, which runs in a thread until the block ends."""
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


class Counted(Metrics):
    """The figures that tests look at, under the names of the extension `operations`, where that is not installed."""

    def __init__(self):
        self._figures = {"new_tokens_total": 0, 'rows_total{gone="true"}': 0, 'rows_total{gone="false"}': 0}
        self._watched = {}

    def watch(self, **figures):
        self._watched |= figures

    def read(self, num_tokens, num_kept, num_rows):
        self._figures["new_tokens_total"] += num_rows

    def stepped(self, num_rows):
        self._figures["new_tokens_total"] += num_rows

    def ended(self, row):
        self._figures[f'rows_total{{gone="{str(row.gone).lower()}"}}'] += 1

    def text(self):
        figures = {**self._figures, **{name: read() for name, read in self._watched.items()}}
        return "".join(f"loraweave_{name} {value}\n" for name, value in figures.items()).encode()


class Client:
    """One server's address, and how many model calls are let through."""

    def __init__(self, port, hub, engine):
        self.port = port
        self.hub = hub
        self.engine = engine

    def send(self, method, path, body=None, **headers):
        """(status, headers, body) of one request; a body that is no bytes goes as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, {"Content-Type": "application/json", **headers})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, answer.headers, json.loads(text) if text[:1] == b"{" else text.decode()
        finally:
            connection.close()

    def complete(self, model="a", prompt="abc", **fields):
        asked = {"model": model, "prompt": prompt, "max_tokens": 9, "temperature": 0, **fields}
        return self.send("POST", "/v1/completions", asked)

    def events(self, path="/v1/completions", **fields):
        """The bodies of a stream's events, without the last one, which is [DONE]."""
        status, headers, text = self.send("POST", path, {"stream": True, **fields})
        assert status == 200, text
        assert headers["Content-Type"].startswith("text/event-stream")
        *found, last, end = text.split("\n\n")
        assert (last, end) == ("data: [DONE]", "")
        return [json.loads(event.removeprefix("data: ")) for event in found]

    def metric(self, name):
        return float(re.search(rf"^loraweave_{re.escape(name)} (\S+)$", self.send("GET", "/metrics")[2], re.MULTILINE)[1])


class Gate:
    """Calls of the model wait here while it is shut; `reached` is set by the first that does."""

    def __init__(self):
        self.reached = threading.Event()
        self._free = threading.Event()

    def wait(self, *call):
        if not self._free.is_set():
            self.reached.set()
        assert self._free.wait(60)

    def open(self):
        self._free.set()

    def shut(self):
        self._free.clear()


@contextmanager
def gate_before(model):
    gate = Gate()
    hook = model.register_forward_pre_hook(gate.wait)
    try:
        yield gate
    finally:
        gate.open()
        hook.remove()


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextmanager
def raw_request(client, **fields):
    """The socket of a client that asks for 1000 tokens, and leaves at the block's end."""
    asked = {"model": "c", "prompt": "abc", "max_tokens": 1000, "temperature": 0, **fields}
    data = json.dumps(asked).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    head += [f"Content-Length: {len(data)}"]
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as opened:
        opened.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        yield opened
