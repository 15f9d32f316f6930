"""Attacks on the server's threads and connections, each counted in bytes, tokens read or connections."""

from __future__ import annotations

import asyncio
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
from server_clients import until

from loraweave.serving.limits import Turns
from loraweave.serving.prompts import Prompts

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def connect(client):
    return socket.create_connection(("127.0.0.1", client.port), timeout=30)


def received(opened):
    """All bytes until the other side closes."""
    text = b""
    try:
        while part := opened.recv(65536):
            text += part
    except ConnectionError:
        pass
    return text


def test_long_prompts_are_refused_unread(serve, monkeypatch):
    with serve(prompt_characters=1000) as client:
        monkeypatch.setattr(Prompts, "read", None)
        chat = {"model": "a", "messages": [{"role": "user", "content": "a" * 1001}]}
        asked = [client.complete(prompt=prompt) for prompt in ("a" * 1001, ["b", "a" * 1001], [5] * 1001)]
        for status, _, body in [*asked, client.send("POST", "/v1/chat/completions", chat)]:
            assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
            assert "has 1001 characters, and at most 1000 are read" in body["error"]["message"]


def test_by_default_a_prompt_has_sixteen_characters_for_each_token_of_the_context(serve):
    with serve() as client:
        assert client.complete(prompt="a" * 32769)[2]["error"]["message"].startswith("the prompt has 32769 characters")
        assert client.complete(prompt="a" * 32768)[2]["error"]["message"].startswith("the prompt has 32768 tokens")


def test_a_short_prompt_waits_for_no_long_one_which_are_read_one_at_a_time(serve, monkeypatch):
    begun, own = [], Prompts.read
    with serve() as client, ThreadPoolExecutor(12) as pool, ExitStack() as stack:
        free = threading.Event()
        stack.callback(free.set)

        def read(self, asked):
            if len(asked.prompt) > 20000:
                begun.append(len(asked.prompt))
                assert free.wait(60)
            return own(self, asked)

        monkeypatch.setattr(Prompts, "read", read)
        waiting = [pool.submit(client.complete, prompt="a" * 20001) for _ in range(12)]
        until(lambda: begun)
        until(lambda: client.metric("open_requests") == 12)
        assert client.complete(max_tokens=2)[0] == 200
        assert len(begun) == 1
        free.set()
        assert {each.result()[0] for each in waiting} == {400}


def test_turns_are_shared_by_cost_among_clients_and_left_by_those_who_go():
    taken = []

    async def use(turns, client, cost):
        async with turns.turn(client, cost):
            taken.append(client)
            for _ in range(3):
                await asyncio.sleep(0)

    async def all_of():
        turns = Turns()
        uses = [asyncio.create_task(use(turns, "many", 100)) for _ in range(8)]
        await asyncio.sleep(0)
        uses += [asyncio.create_task(use(turns, "few", 10)) for _ in range(3)]
        uses[2].cancel()
        await asyncio.gather(*uses, return_exceptions=True)
        assert not turns._is_taken
        await use(turns, "later", 1)

    asyncio.run(all_of())
    assert taken[:5] == ["many", "few", "few", "few", "many"]
    assert taken[-1] == "later"
    assert taken.count("many") == 7


def test_an_endless_head_is_ended_before_it_is_kept(serve):
    with serve(api_key="secret", head_bytes=20_000) as client, connect(client) as opened:
        opened.sendall(b"GET /v1/models HTTP/1.1\r\nX-Long: ")
        sent = 0
        with suppress(OSError):
            while sent < 100 << 20:
                sent += opened.send(b"a" * 65536)
        # what the sockets on both sides hold, and no more
        assert sent < 16 << 20


@pytest.mark.parametrize(("num_bytes", "status"), [(2000, b"200"), (4000, b"400")])
def test_a_head_that_arrives_whole_has_so_many_bytes_too(serve, num_bytes, status):
    with serve(head_bytes=3000) as client:
        head = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nX-Long: "
        for filler in (b"a", b" "):
            with connect(client) as opened:
                opened.sendall(head + filler * (num_bytes - len(head) - 5) + b"a\r\n\r\n")
                answer = received(opened)
            assert answer.split()[1] == status
            assert b"x-request-id: " in answer.lower()


def test_a_connection_without_a_request_ends_in_time_and_one_that_waits_for_its_answer_does_not(serve):
    with serve(head_seconds=0.3) as client:
        with connect(client) as silent, connect(client) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nX-")
            assert (received(silent), received(slow)) == (b"", b"")
        assert client.complete("b", max_tokens=300)[0] == 200


def test_the_oldest_connection_without_a_request_makes_room_for_a_new_one(serve):
    with serve(connections=5) as client, ExitStack() as stack:
        opened = [stack.enter_context(connect(client)) for _ in range(40)]
        for _ in range(3):
            assert client.send("GET", "/health")[0] == 200
        assert [received(each) for each in opened[:30]] == [b""] * 30
        until(lambda: len(client.face._bodies._reading) == 0)


def test_bodies_that_are_being_read_have_so_many_bytes_together(serve):
    with serve(reading_bytes=100_000, body_bytes=50_000) as client, ExitStack() as stack:
        held, slow = [], []
        for _ in range(20):
            slow.append(stack.enter_context(connect(client)))
            slow[-1].sendall(HEAD + b"Content-Length: 40000\r\n\r\n" + b"a" * 30_000)
            until(lambda: client.face._bodies.num_bytes >= min(len(slow), 3) * 30_000)
            held.append(client.face._bodies.num_bytes)
        assert max(held) == 90_000
        assert client.complete(prompt="abc", max_tokens=2)[0] == 200
        # those that began first are told
        for each in slow[:17]:
            assert each.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_ends_in_time(serve):
    with serve(body_seconds=0.3) as client, connect(client) as opened:
        opened.sendall(HEAD + b"Content-Length: 40\r\n\r\n{")
        assert opened.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert client.face._bodies.num_bytes == 0
