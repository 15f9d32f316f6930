"""Keys of clients: one, or those of a file with limits for each; what is refused before a request is looked at."""

import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import pytest
from server_clients import gate_before, until

import loraweave as lw
from loraweave.serving import limits
from loraweave.serving.app import make_server
from loraweave.serving.limits import Keys, Rate, Refusal, read_keys
from loraweave.serving.names import Names
from loraweave.serving.scheduler import Scheduler

ANNA, BERT = "anna-has-this-key-1", "bert-has-this-key-22"


@pytest.fixture
def key_file(tmp_path):
    def write(**holders):
        path = tmp_path / "keys.json"
        path.write_text(json.dumps(holders))
        return path

    return write


def bearer(key, scheme="Bearer"):
    return {"Authorization": f"{scheme} {key}"}


@pytest.mark.parametrize("key", ["", "  "])
def test_an_empty_key_is_refused_on_loopback_too(make_model, tokenizer, tmp_path, key):
    with lw.Hub(tmp_path / "hub") as hub, pytest.raises(lw.CompositionError, match="the key is empty"):
        make_server(hub, make_model("llama"), tokenizer, api_key=key)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_scheme_is_read_in_any_case(scheme):
    assert Keys("secret").holder(f"{scheme} secret").name == "key"


@pytest.mark.parametrize("header", ["", "secret", "Basic secret", "Bearer", "Bearer secret2", "Bearer s\xe9"])
def test_another_key_is_refused_and_says_how_to_come_in(header):
    with pytest.raises(Refusal, match="wants its key") as refused:
        Keys("secret").holder(header)
    assert (refused.value.status, refused.value.headers) == (401, {"WWW-Authenticate": "Bearer"})


def test_a_server_with_a_file_of_keys_knows_its_clients(serve, key_file):
    with serve(key_file=key_file(anna={"key": ANNA}, bert={"key": BERT, "rows": 1})) as client:
        assert client.send("GET", "/v1/models")[0] == 401
        assert [client.send("GET", "/v1/models", **bearer(key))[0] for key in (ANNA, BERT)] == [200, 200]
        asked = {"model": "a", "prompt": ["x", "y"], "max_tokens": 1}
        status, headers, body = client.send("POST", "/v1/completions", asked, **bearer(BERT))
        assert (status, headers["Retry-After"]) == (429, "1")
        assert body["error"]["message"] == "this key may have 1 answers at once: 0 run or wait, 2 are new"
        assert client.send("POST", "/v1/completions", asked, **bearer(ANNA))[0] == 200


def test_rows_of_a_key_are_counted_while_they_run_and_others_are_not_held_back(serve, key_file):
    asked = {"model": "b", "prompt": "x", "max_tokens": 1}
    path = key_file(anna={"key": ANNA, "rows": 1}, bert={"key": BERT})
    with serve(key_file=path) as client, ThreadPoolExecutor(2) as pool, gate_before(client.engine.model) as gate:
        running = pool.submit(client.send, "POST", "/v1/completions", asked, **bearer(ANNA))
        assert gate.reached.wait(60)
        assert client.send("POST", "/v1/completions", asked, **bearer(ANNA))[0] == 429
        beside = pool.submit(client.send, "POST", "/v1/completions", asked, **bearer(BERT))
        until(lambda: client.send("GET", "/metrics", **bearer(BERT))[2].count("open_requests 2") == 1)
        gate.open()
        assert [running.result()[0], beside.result()[0]] == [200, 200]
        assert client.send("POST", "/v1/completions", asked, **bearer(ANNA))[0] == 200


def test_each_step_of_a_program_counts_as_a_request_and_its_rows_among_those_of_the_key(serve, key_file, monkeypatch):
    path, most, submit = key_file(anna={"key": ANNA, "rows": 1, "requests_per_minute": 4}), [], Scheduler.submit

    def counted(self, rows):
        most.append((len(rows), sum(exchange.holder.num_rows for exchange in client.face._open)))
        submit(self, rows)

    monkeypatch.setattr(Scheduler, "submit", counted)
    with serve(key_file=path) as client:
        task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")
        one = lw.compose(client.engine.model, client.engine.tokenizer, client.engine.pool, task, method="uniform")
        client.hub.save_composition("steps", replace(one, steps={"first": one, "then": one, "last": one}))
        asked = {"model": "@steps", "prompt": "abc", "max_tokens": 2}
        # a request and two steps, one more, and nothing for its steps
        assert client.send("POST", "/v1/completions", asked, **bearer(ANNA))[0] == 200
        assert most == [(1, 1)] * 3
        status, _, body = client.send("POST", "/v1/completions", asked, **bearer(ANNA))
        assert (status, body["error"]["code"]) == (429, "rate_limit_exceeded")
        assert len(most) == 3


def test_a_request_counts_among_the_answers_of_its_key_before_its_composition_is_made(serve, key_file, monkeypatch):
    free, begun, make = threading.Event(), threading.Event(), Names.make

    def slow(self, wanted):
        begun.set()
        assert free.wait(60)
        return make(self, wanted)

    monkeypatch.setattr(Names, "make", slow)
    path = key_file(anna={"key": ANNA, "rows": 2}, bert={"key": BERT})
    # more than the server lets be open in all
    with serve(key_file=path, rows=1, waiting=2) as client, ThreadPoolExecutor(8) as pool, ExitStack() as stack:
        stack.callback(free.set)
        asked = [{"model": f"ties(a, b; density=0.{n})", "prompt": "x", "max_tokens": 1} for n in range(1, 9)]
        sent = [pool.submit(client.send, "POST", "/v1/completions", each, **bearer(ANNA)) for each in asked]
        until(lambda: sum(each.done() for each in sent) == 6)
        assert begun.wait(60)
        base = {"model": "base", "prompt": "x", "max_tokens": 1}
        assert client.send("POST", "/v1/completions", base, **bearer(BERT))[0] == 200
        free.set()
        answers = [each.result() for each in sent]
        assert sorted(status for status, _, _ in answers) == [200] * 2 + [429] * 6
        refused = {body["error"]["message"] for status, _, body in answers if status == 429}
        assert refused == {"this key may have 2 answers at once: 2 run or wait, 1 are new"}


def test_a_key_loads_so_many_formulas_a_minute_and_uses_loaded_ones_freely(serve, key_file):
    with serve(key_file=key_file(anna={"key": ANNA, "formulas_per_minute": 2})) as client:

        def status(formula):
            asked = {"model": formula, "prompt": "x", "max_tokens": 1}
            return client.send("POST", "/v1/completions", asked, **bearer(ANNA))[0]

        assert [status(formula) for formula in ("a", "0.5*a", "0.4*a", "0.5*a", "a")] == [200, 200, 429, 200, 200]


def test_a_rate_refills_evenly(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    rate = Rate(2)
    rate.take("requests")
    rate.take("requests")
    with pytest.raises(Refusal, match="2 requests a minute; ask again in 30 s") as refused:
        rate.take("requests")
    assert (refused.value.status, refused.value.headers) == (429, {"Retry-After": "30"})
    now[0] = 29.9
    with pytest.raises(Refusal, match="again in 1 s"):
        rate.take("requests")
    now[0] = 30.0
    rate.take("requests")
    now[0] = 1e6
    for _ in range(2):
        rate.take("requests")
    with pytest.raises(Refusal):
        rate.take("requests")


FAULTY = {
    "not JSON": ("{", "the file: Invalid JSON"),
    "no key": ("{}", "has no key"),
    "a short key": ('{"anna": {"key": "short"}}', "anna.key: String should have at least 16 characters"),
    "a key with a space": ('{"anna": {"key": "anna has this key 1"}}', "anna.key: String should match"),
    "an unknown limit": (f'{{"anna": {{"key": "{ANNA}", "row": 1}}}}', "anna.row: Extra inputs"),
    "a limit of none": (f'{{"anna": {{"key": "{ANNA}", "rows": 0}}}}', "anna.rows: Input should be greater"),
    "one key twice": (f'{{"anna": {{"key": "{ANNA}"}}, "bert": {{"key": "{ANNA}"}}}}', "two names have the same key"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_file_is_refused_by_field_and_no_key_is_said(case, tmp_path):
    text, message = FAULTY[case]
    (tmp_path / "keys.json").write_text(text)
    with pytest.raises(lw.CompositionError, match=message) as refused:
        read_keys(tmp_path / "keys.json")
    assert ANNA not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(lw.CompositionError, match=r"none\.json' cannot be read: No such file"):
        read_keys(tmp_path / "none.json")


def test_a_body_that_is_declared_too_long_is_refused_before_it_is_sent(serve):
    with serve() as client, socket.create_connection(("127.0.0.1", client.port), timeout=30) as connection:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 99999999999\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
