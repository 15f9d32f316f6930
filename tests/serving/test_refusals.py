"""What the server refuses, and what a full queue, a deadline and a client that leaves do to it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from types import SimpleNamespace

import pytest
from served_rows import alone
from server_clients import gate_before, raw_request, until

import loraweave as lw
from loraweave.serving.app import Face, make_server

REFUSED = [
    ({"model": "aa"}, 404, "model", "did you mean 'a'"),
    ({"model": "@kep"}, 404, "model", "did you mean 'kept'"),
    ({"model": "a@7"}, 404, "model", "no version 7"),
    ({"model": "0.5*a +"}, 400, "model", r"\^"),
    ({"model": "@kept + arrow(a, b)"}, 400, "model", "stands alone"),
    ({"model": "mole(a, b)"}, 400, "model", "."),
    ({"model": "1e300*a"}, 400, "model", "fp32"),
    ({"model": "b + 1e308*a"}, 400, "model", r"1e\+308.*'a'|'a'.*1e\+308"),
    ({"model": "'" + "a" * 2000 + "'"}, 400, "model", "2002 characters, above the limit of 1024"),
    ({"model": " + ".join(f"a@{n}" for n in range(1, 18))}, 400, "model", "17 adapters, above the limit of 16"),
    ({"model": "../../etc/passwd"}, 400, "model", "."),
    ({"model": "https://example.org/x"}, 400, "model", "."),
    ({"model": 3}, 400, "model", "string"),
    ({"prompt": []}, 400, None, "."),
    ({"prompt": [70]}, 400, "prompt", "token id 70 is outside the vocabulary of 61"),
    ({"prompt": "a" * 3000}, 400, "prompt", "the model's context is 2048"),
    ({"prompt": "a" * 2040}, 400, "max_tokens", "beyond the context"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5000}, 400, "max_tokens", "at most 1024"),
    ({"max_tokens": True}, 400, "max_tokens", "valid integer"),
    ({"max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    ({"max_tokens": 5.5}, 400, "max_tokens", "valid integer"),
    ({"temperature": "0"}, 400, "temperature", "valid number"),
    ({"stream": "true"}, 400, "stream", "valid boolean"),
    ({"n": True}, 400, "n", "valid integer"),
    ({"prompt": [True]}, 400, "prompt", "."),
    ({"frequency_penalty": False}, 400, "frequency_penalty", "is not supported"),
    ({"best_of": True}, 400, "best_of", "is not supported"),
    ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"temperature": float("nan")}, 400, "temperature", "."),
    ({"n": 17}, 400, "n", "17 answers are asked for, above the limit of 16"),
    ({"stop": [""]}, 400, None, "at least 1 character"),
    ({"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    ({"stop": ["a"] * 40}, 400, "stop", "at most 16 items"),
    ({"logit_bias": {"3": 5}}, 400, "logit_bias", "logit_bias=.* is not supported"),
    ({"echo": True}, 400, "echo", "echo=True is not supported"),
    ({"adapter_path": "/etc"}, 400, "adapter_path", "not permitted"),
]


def test_what_cannot_be_answered_is_refused_by_name_and_harms_no_other(serve):
    with serve() as client:
        expected = client.complete("b", "zebra")[2]["choices"]
        with ThreadPoolExecutor(2) as pool:
            for change, status, param, said in REFUSED:
                beside = pool.submit(client.complete, "b", "zebra")
                found, _, body = client.complete(**change)
                assert (found, body["error"]["param"] if param else None) == (status, param), (change, body)
                assert re.search(said, body["error"]["message"]), (change, body)
                assert beside.result()[2]["choices"] == expected


@pytest.mark.parametrize(
    ("body", "status"),
    [(b"", 400), (b"{", 400), (b"\xff\xfe", 400), (b"[" * 100_000, 400), (b'"a"', 400), (b'{"model": "\\ud800"}', 400)],
)
def test_a_body_that_is_no_request_is_refused(serve, body, status):
    with serve() as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            found, _, told = client.send("POST", path, body)
            assert found == status
            assert told["error"]["type"] == "invalid_request_error"
            assert "Traceback" not in told["error"]["message"]


def test_other_refusals_have_the_same_shape(serve):
    with serve(template=None, body_bytes=1000) as client:
        chat = {"model": "a", "messages": [{"role": "user", "content": "abc"}]}
        answers = [
            (client.send("GET", "/v1/none"), 404),
            (client.send("GET", "/v1/completions"), 405),
            (client.send("GET", "/v1/models/aa"), 404),
            (client.complete(prompt="a" * 2000), 413),
            (client.send("POST", "/v1/completions", {"model": "a"}, **{"Content-Type": "text/plain"}), 415),
            (client.send("POST", "/v1/chat/completions", chat), 400),
        ]
        assert [(found[0], set(found[2]["error"])) for found, _ in answers] == [
            (status, {"message", "type", "param", "code"}) for _, status in answers
        ]
        assert str(client.hub.path) not in answers[2][0][2]["error"]["message"]
        assert client.send("GET", "/v1/models/0.5*a%20+%20b")[2]["id"] == "0.5*a + b"


def test_a_prompt_beyond_the_context_is_400_in_both_calls(serve):
    with serve() as client:
        for fields in ({"max_tokens": 9}, {"max_tokens": 1000}, {}):
            for count in (3000, 2040):
                chat = {"model": "a", "messages": [{"role": "user", "content": "a" * count}], **fields}
                asked = {"model": "a", "prompt": "a" * count, **fields}
                for path, body in (("/v1/chat/completions", chat), ("/v1/completions", asked)):
                    status, _, told = client.send("POST", path, body)
                    if status != 200:
                        assert (status, told["error"]["code"]) == (400, "context_length_exceeded"), told
                        assert told["error"]["param"] in {"max_tokens", *body}
                    assert (status == 200) == (count == 2040 and fields.get("max_tokens") is None)


def test_null_is_as_if_it_was_left_out_also_in_fields_that_are_not_known(serve):
    with serve() as client:
        expected = client.complete("b", "zebra")[2]["choices"]
        nothing = dict.fromkeys(("reasoning_effort", "n", "stop", "stream_options", "response_format", "verbosity"))
        assert client.complete("b", "zebra", **nothing)[2]["choices"] == expected
        neutral = {"frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "best_of": 1, "service_tier": "auto"}
        assert client.complete("b", "zebra", **neutral, user="me", max_tokens=9.0)[2]["choices"] == expected
        # an answer that a client sends back is a message
        chat = {"model": "b", "messages": [{"role": "user", "content": "zebra", "name": None}], "max_tokens": 9}
        message = client.send("POST", "/v1/chat/completions", chat)[2]["choices"][0]["message"]
        sent = {**message, "audio": None, "function_call": None, "tool_calls": None}
        chat["messages"] += [sent, {"role": "user", "content": "and?"}]
        assert client.send("POST", "/v1/chat/completions", chat)[0] == 200


def test_calls_of_the_api_that_are_not_there_say_what_is(serve):
    with serve() as client:
        for path, instead in (("/v1/responses", "/v1/chat/completions"), ("/v1/embeddings", "no embeddings")):
            status, _, body = client.send("POST", path, {"model": "a", "input": "abc"})
            assert (status, f"{path} is not served here" in body["error"]["message"]) == (404, True)
            assert instead in body["error"]["message"]


def test_a_chat_that_the_template_refuses_is_the_clients_fault(serve):
    with serve() as client:
        chat = {"model": "a", "messages": [{"role": "tool", "content": "abc"}]}
        status, _, body = client.send("POST", "/v1/chat/completions", chat)
        assert (status, body["error"]["param"]) == (400, "messages")
        assert "no tools" in body["error"]["message"]


def test_tools_are_shown_by_the_template_or_refused(serve):
    tools = [{"type": "function", "function": {"name": "abc", "parameters": {}}}]
    chat = {
        "model": "b",
        "messages": [{"role": "user", "content": "zebra"}],
        "tools": tools,
        "temperature": 0,
        "max_tokens": 9,
    }
    with serve() as client:
        status, _, body = client.send("POST", "/v1/chat/completions", chat)
        assert (status, body["error"]["param"]) == (400, "tools")
    with serve(template="{% if tools %}{{ tools[0].function.name }}: {% endif %}{{ messages[0].content }}") as client:
        for choice, prompt in ((None, "abc: zebra"), ("auto", "abc: zebra"), ("none", "zebra")):
            _, _, body = client.send("POST", "/v1/chat/completions", {**chat, "tool_choice": choice})
            assert body["choices"][0]["message"]["content"] == alone(client.engine, prompt, {"b": 1.0})[0]
        status, _, body = client.send("POST", "/v1/chat/completions", {**chat, "tool_choice": "required"})
        assert (status, body["error"]["param"]) == (400, "tool_choice")


# as the templates of Qwen and Hermes write them, which take a call's arguments as an object
WITH_TOOLS = (
    "{% for tool in tools or [] %}{{ tool | tojson }}\n{% endfor %}{% for m in messages %}{{ m.role }}:"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function.name }} {{ call.function.arguments.city }}</tool_call>"
    "{% endfor %}{{ m.content }}\n{% endfor %}"
)


def test_a_conversation_with_calls_of_tools_and_their_results_goes_through_a_template_that_knows_them(serve):
    called = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "zebra"}'}}
    chat = {
        "model": "b",
        "messages": [
            {"role": "user", "content": "abc"},
            {"role": "assistant", "content": None, "tool_calls": [called], "refusal": None},
            {"role": "tool", "tool_call_id": "call_1", "content": "12"},
        ],
        "temperature": 0,
        "max_tokens": 9,
    }
    with serve(template=WITH_TOOLS) as client:
        status, _, body = client.send("POST", "/v1/chat/completions", chat)
        assert status == 200, body
        prompt = "user:abc\nassistant:<tool_call>weather zebra</tool_call>\ntool:12\n"
        assert body["choices"][0]["message"]["content"] == alone(client.engine, prompt, {"b": 1.0})[0]


def test_without_its_key_a_server_tells_only_its_health(serve):
    with serve(api_key="secret") as client:
        paths = [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")]
        assert [client.send(*path)[0] for path in paths] == [401] * 4
        assert client.send("GET", "/v1/models", Authorization="Bearer other")[0] == 401
        assert client.send("GET", "/v1/models", Authorization="Bearer secret")[0] == 200
        assert client.send("GET", "/health")[::2] == (200, {"status": "ok"})


@pytest.mark.parametrize(("key", "status"), [(None, 400), ("secret", 200)])
def test_without_a_key_it_answers_under_a_loopback_name_alone(serve, key, status):
    with serve(api_key=key) as client:
        for host, expected in (("evil.example", status), ("localhost", 200), (f"127.0.0.1:{client.port}", 200)):
            connection = HTTPConnection("127.0.0.1", client.port, timeout=30)
            connection.request("GET", "/health", headers={"Host": host})
            answer = connection.getresponse()
            assert answer.status == expected
            assert ("error" in json.loads(answer.read())) == (expected == 400)
            assert answer.headers["X-Request-Id"]
            connection.close()


def test_a_server_that_others_reach_needs_a_key(make_model, tokenizer, tmp_path):
    with lw.Hub(tmp_path / "hub") as hub, pytest.raises(lw.CompositionError, match="give --api-key"):
        make_server(hub, make_model("llama"), tokenizer, host="0.0.0.0")


def test_a_full_queue_says_when_to_come_back(serve):
    with serve(rows=1, waiting=1) as client, ThreadPoolExecutor(2) as pool, gate_before(client.engine.model) as gate:
        running = pool.submit(client.complete, "b")
        assert gate.reached.wait(60)
        waiting = pool.submit(client.complete, "b")
        until(lambda: client.metric("waiting_rows") == 1)
        status, headers, body = client.complete("a")
        assert (status, headers["Retry-After"], body["error"]["type"]) == (429, "1", "rate_limit_error")
        gate.open()
        assert [running.result()[0], waiting.result()[0]] == [200, 200]


def test_a_request_is_over_at_its_deadline(serve, monkeypatch):
    with serve(seconds=5) as client:
        monkeypatch.setattr("loraweave.serving.app.time", SimpleNamespace(monotonic=lambda: time.monotonic() - 6))
        status, _, body = client.complete("b")
        assert (status, body["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_before_its_answer_stops_its_work_and_harms_no_other(serve, stream):
    with serve() as client, ThreadPoolExecutor(1) as pool, gate_before(client.engine.model) as gate:
        with raw_request(client, stream=stream):
            assert gate.reached.wait(60)
            beside = pool.submit(client.complete, "b", "zebra")
            until(lambda: client.metric("open_requests") == 2)
        until(lambda: client.metric("open_requests") == 1)
        gate.open()
        [choice] = beside.result()[2]["choices"]
        assert choice["text"] == alone(client.engine, "zebra", {"b": 1.0})[0]
        until(lambda: client.metric('rows_total{gone="true"}') == 1)
        # those of the turn in which it left, and those of the other
        assert client.metric("new_tokens_total") <= 2 + 9


def test_a_client_that_goes_just_as_a_step_of_its_request_ends_is_not_overlooked():
    async def leave():
        step = asyncio.get_running_loop().create_future()
        waiting = asyncio.create_task(Face._within(time.monotonic() + 60, step))
        await asyncio.sleep(0)
        step.set_result("read")
        waiting.cancel()
        await asyncio.wait([waiting])
        return waiting.cancelled()

    assert asyncio.run(leave())


def test_a_client_that_leaves_its_stream_stops_its_work(serve):
    with serve() as client, gate_before(client.engine.model) as gate:
        gate.open()
        with raw_request(client, stream=True) as reading:
            received = b""
            while b"data: " not in received:
                received += reading.recv(4096)
            gate.shut()
            assert gate.reached.wait(60)
        until(lambda: client.metric("open_requests") == 0)
        before = client.metric("new_tokens_total")
        gate.open()
        until(lambda: client.metric('rows_total{gone="true"}') == 1)
        assert client.metric("new_tokens_total") <= before + 1


@pytest.mark.parametrize("head", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Big: " + b"x" * 20_000])
def test_a_head_that_is_no_request_is_refused_in_openais_form(serve, head):
    with serve() as client, socket.create_connection(("127.0.0.1", client.port), timeout=60) as opened:
        opened.sendall(head)
        told, _, body = opened.makefile("rb").read().partition(b"\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 400 ")
    assert b"content-type: application/json" in told.lower()
    assert b"x-request-id: " in told.lower()
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_any_formatter_writes_an_unforeseen_error_and_its_cause_without_their_texts(serve, monkeypatch, caplog):
    said = "abc"

    def failing(*arguments):
        raise RuntimeError(said) from KeyError(said)

    monkeypatch.setattr("loraweave.serving.prompts.Prompts.read", failing)
    with serve() as client:
        assert client.complete("b", said)[0] == 500
    [record] = [record for record in caplog.records if record.name == "loraweave.serving.limits"]
    line = logging.Formatter().format(record)
    assert said not in line
    assert re.search(r", in failing\n(.|\n)*RuntimeError\nKeyError$", line)
