"""A server that is told to stop, and what it says of itself before and meanwhile."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from server_clients import gate_before, raw_request, until

import loraweave as lw
from loraweave.errors import HubError


def test_a_server_is_ready_while_its_hub_answers_and_healthy_without(serve, monkeypatch):
    with serve(api_key="secret") as client:
        assert client.send("GET", "/ready")[::2] == (200, {"status": "ready"})
        away = client.hub.path.with_name("away")
        shutil.move(client.hub.path, away)
        assert client.send("GET", "/ready")[::2] == (503, {"status": "the hub does not answer"})
        assert client.send("GET", "/health")[0] == 200
        with monkeypatch.context() as on_a_server:
            # whose folder on this machine is made when a blob is fetched
            on_a_server.setattr(client.hub, "_address", ("postgresql://host/hub", None))
            assert client.send("GET", "/ready")[0] == 200
        shutil.move(away, client.hub.path)
        assert client.send("GET", "/ready")[0] == 200

        def gone(hub):
            raise HubError("no connection")

        monkeypatch.setattr(lw.Hub, "generation", property(gone))
        assert client.send("GET", "/ready")[0] == 503


def test_answers_that_have_begun_end_and_new_ones_are_refused_until_then(serve):
    with serve(grace=60) as client, ThreadPoolExecutor(1) as pool, gate_before(client.engine.model) as gate:
        running = pool.submit(client.complete, "b")
        assert gate.reached.wait(60)
        client.server.should_exit = True
        until(lambda: client.send("GET", "/ready")[::2] == (503, {"status": "stopping"}))
        status, headers, body = client.complete("a")
        assert (status, headers["Retry-After"], body["error"]["code"]) == (503, "5", "unavailable")
        assert client.send("GET", "/health")[0] == 200
        gate.open()
        assert running.result()[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_do_not_end_in_time_are_ended(serve, stream):
    with serve(grace=0) as client, gate_before(client.engine.model) as gate:
        gate.open()
        with raw_request(client, stream=stream, max_tokens=1000) as reading:
            text = b""
            while stream and b"data: " not in text:
                text += reading.recv(4096)
            gate.shut()
            assert gate.reached.wait(60) or stream
            client.server.should_exit = True
            while part := reading.recv(65536):
                text += part
            gate.open()
        if not stream:
            assert text.startswith(b"HTTP/1.1 503 ")
            return
        assert text.index(b"the server is stopping") < text.index(b"data: [DONE]")
