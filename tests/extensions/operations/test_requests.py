"""What a server tells of a request: a record in its log, never a word of a prompt, and spans under the client's trace."""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
import time
import warnings
from itertools import pairwise

import pytest
from server_clients import Client, answering, gate_before, running, until

import loraweave as lw
from loraweave.errors import CompositionError
from loraweave.extensions.operations import spans
from loraweave.extensions.operations.logs import FORMATS, JsonLines, TextLines, log_config
from loraweave.serving.app import make_server
from loraweave.serving.limits import Limits

SECRET = "zebra"
ASKED = {"model": "0.5*b + a", "prompt": "abc", "max_tokens": 3, "temperature": 0}
KEY = "k" * 16


@pytest.fixture
def hub(tmp_path, make_model, make_adapters):
    with lw.Hub(tmp_path / "hub") as opened:
        for adapter in make_adapters(make_model("llama"), "llama"):
            opened.add(adapter)
        yield opened


@pytest.fixture
def told(hub, make_model, tokenizer, caplog, tmp_path):
    """The client of a server with keys, whose log `client.told(count)` returns once it has as many requests' records."""
    keys = tmp_path / "keys.json"
    keys.write_text(json.dumps({"anna": {"key": KEY}}))
    model = make_model("llama")
    caplog.set_level(logging.DEBUG)
    with running(hub, model, tokenizer, limits=Limits(seconds=60), key_file=keys) as port:
        client = Client(port, hub, None)
        client.model = model

        def records(count):
            until(lambda: len([each for each in caplog.records if each.name == "loraweave.requests"]) >= count)
            return [each for each in caplog.records if each.name == "loraweave.requests"]

        client.told = records
        yield client


def send(client, path, body, **headers):
    return client.send("POST", path, body, **{"Authorization": f"Bearer {KEY}", **headers})


def test_an_answer_is_told_by_its_composition_its_key_its_tokens_and_its_times(told):
    headers = send(told, "/v1/completions", ASKED, **{"X-Request-Id": "mine-1"})[1]
    status, _, text = send(told, "/v1/completions", {**ASKED, "stream": True, "n": 2})
    assert (status, "[DONE]" in text) == (200, True)
    whole, streamed = (record.fields for record in told.told(2))
    assert whole["request_id"] == "mine-1"
    assert whole["formula"] == streamed["formula"] == headers["X-Loraweave-Formula"]
    assert whole["identity"] == streamed["identity"] == headers["X-Loraweave-Identity"]
    for fields, count in ((whole, 1), (streamed, 2)):
        assert (fields["key"], fields["status"], fields["path"]) == ("anna", 200, "/v1/completions")
        assert fields["prompt_tokens"] > 0
        assert 1 <= fields["new_tokens"] <= 3 * count
        assert set(fields["end"].split("+")) <= {"stop", "length"}
        assert 0 <= fields["queue_s"] <= fields["whole_s"]
        assert fields["first_token_s"] <= fields["whole_s"] < 60


def test_a_refusal_is_told_by_its_code_and_probes_are_not_told(told):
    for path in ("/health", "/ready"):
        assert told.send("GET", path)[0] == 200
    assert send(told, "/v1/completions", {**ASKED, "model": "nobody"})[0] == 404
    assert send(told, "/v1/completions", ASKED, Authorization="Bearer wrong")[0] == 401
    assert send(told, "/v1/nowhere", ASKED)[0] == 404
    unknown, keyless, nowhere = (record.fields for record in told.told(3))
    assert (unknown["end"], unknown["formula"], unknown["key"]) == ("model_not_found", "nobody", "anna")
    assert (keyless["end"], "key" in keyless, "formula" in keyless) == ("invalid_api_key", False, False)
    assert (nowhere["status"], nowhere["end"]) == (404, "refused")
    assert all(fields["request_id"] for fields in (unknown, keyless, nowhere))


def test_a_client_that_leaves_is_told(told):
    with gate_before(told.model) as gate:
        fields = json.dumps({**ASKED, "stream": True, "max_tokens": 40}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(fields)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", told.port), timeout=60) as leaving:
            leaving.sendall(head.encode() + fields)
            assert gate.reached.wait(60)
        gate.open()
        [gone] = told.told(1)
    assert gone.fields["end"] == "gone"


def failing(*arguments):
    try:
        raise KeyError(SECRET)
    except KeyError:
        raise RuntimeError(f"cannot read {SECRET}") from ValueError(SECRET)


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_an_unforeseen_error_is_told_by_type_place_and_request_without_its_text(told, kind, monkeypatch, caplog):
    monkeypatch.setattr("loraweave.serving.prompts.Prompts.read", failing)
    status, headers, body = send(told, "/v1/completions", {**ASKED, "prompt": SECRET}, **{"X-Request-Id": "mine-2"})
    assert (status, headers["X-Request-Id"], SECRET in str(body)) == (500, "mine-2", False)
    [record] = [each for each in caplog.records if each.name == "loraweave.serving.limits"]
    line = FORMATS[kind]().format(record)
    assert SECRET not in line
    assert "\n" not in line
    for word in ("RuntimeError", "ValueError", "test_requests.py:", " failing", "mine-2"):
        assert word in line


@pytest.mark.parametrize("kind", sorted(FORMATS))
def test_no_word_of_a_prompt_is_in_the_log(told, kind):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(FORMATS[kind]())
    logging.getLogger().addHandler(handler)
    try:
        chat = {"model": "a", "messages": [{"role": "user", "content": SECRET}], "max_tokens": 2}
        bodies = [
            {**ASKED, "prompt": SECRET},
            {**ASKED, "prompt": SECRET, "stream": True},
            {**ASKED, "prompt": [SECRET, "ab"], "logprobs": 2},
            {**ASKED, "prompt": SECRET, "model": "nobody"},
            {**ASKED, "prompt": SECRET * 100_000},
            {**ASKED, "prompt": {"text": SECRET}},
            {**ASKED, "prompt": "ab", "stop": SECRET, "user": SECRET, SECRET: 1},
            {**ASKED, "prompt": SECRET, "model": "ties(a,b)", "suffix": SECRET},
            f'{{"model": "a", "prompt": "{SECRET}'.encode(),
        ]
        statuses = [send(told, "/v1/completions", body)[0] for body in bodies]
        statuses += [send(told, "/v1/chat/completions", body)[0] for body in (chat, {**chat, "tools": [SECRET]})]
        assert {200, 400, 404} <= set(statuses)
        told.told(len(statuses))
    finally:
        logging.getLogger().removeHandler(handler)
    lines = stream.getvalue()
    assert "/v1/chat/completions" in lines
    assert SECRET not in lines
    assert KEY not in lines


def test_a_line_is_one_json_object_or_one_line_of_names_and_values():
    record = logging.LogRecord("loraweave.x", logging.WARNING, "", 0, "two\nlines %d", (2,), None)
    record.fields = {"formula": 'a "b"\nlevel=x', "whole_s": 0.5}
    read = json.loads(JsonLines().format(record))
    assert (read["level"], read["message"], read["formula"], read["whole_s"]) == (
        "warning",
        "two\nlines 2",
        'a "b"\nlevel=x',
        0.5,
    )
    assert TextLines().format(record).endswith(' formula="a \\"b\\"\\nlevel=x" whole_s=0.5')
    with pytest.raises(CompositionError, match="no log format 'xml'"):
        log_config("xml", "info")


def test_a_server_that_logs_json_writes_nothing_else(hub, make_model, tokenizer, capsys):
    root, uvicorns = logging.getLogger(), logging.getLogger("uvicorn")
    before = root.handlers[:], uvicorns.handlers[:], uvicorns.level, uvicorns.propagate
    try:
        server = make_server(hub, make_model("llama"), tokenizer, port=0, log_format="json")
        with answering(server) as port:
            assert Client(port, hub, None).complete()[0] == 200
            time.sleep(0.05)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    finally:
        root.handlers, uvicorns.handlers, uvicorns.level, uvicorns.propagate = before
    requests = [line for line in lines if line["logger"] == "loraweave.requests"]
    assert [line["path"] for line in requests] == ["/v1/completions"]
    assert any("Uvicorn running on" in line["message"] for line in lines)
    assert not any(line["logger"] == "uvicorn.access" for line in lines)


def test_spans_continue_the_clients_trace(told, monkeypatch):
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from opentelemetry import trace
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    exporter, provider = InMemorySpanExporter(), sdk.TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # the server asked for its tracer before, of the process's provider
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    assert send(told, "/v1/completions", ASKED, traceparent=parent)[0] == 200
    until(lambda: len(exporter.get_finished_spans()) == 4)
    *parts, whole = exporter.get_finished_spans()
    assert [part.name for part in parts] == ["queue", "prompt", "tokens"]
    assert f"{whole.context.trace_id:032x}" == parent.split("-")[1]
    assert f"{whole.parent.span_id:016x}" == parent.split("-")[2]
    assert all(part.parent.span_id == whole.context.span_id for part in parts)
    times = [whole.start_time, *(time for part in parts for time in (part.start_time, part.end_time)), whole.end_time]
    # rounded to the log's tenths of a millisecond
    assert all(first <= second + 100_000 for first, second in pairwise(times))
    assert whole.attributes["http.response.status_code"] == 200
    assert whole.attributes["gen_ai.usage.output_tokens"] >= 1
    assert SECRET not in str(whole.attributes)


def test_without_opentelemetry_there_are_no_spans(monkeypatch):
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    assert spans.open_tracer() is None
