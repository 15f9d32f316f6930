"""The server beside OpenAI's published schema: requests that schemathesis makes of it, and answers that have to fit it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

schemathesis = pytest.importorskip("schemathesis")

import jsonschema  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import core as hypothesis_core  # noqa: E402

SCHEMA = json.loads((Path(__file__).parent / "openai.json").read_text())
CALLS = {"/completions": "Completion", "/chat/completions": "ChatCompletion"}
# what a generator would hardly guess, and what takes a tiny model long
KNOWN = {"model": {"enum": ["a", "base", "0.7*b - 0.4*c", "@kept"]}, "n": {"type": "integer", "minimum": 1, "maximum": 2}}
FEW = {"type": "integer", "minimum": 1, "maximum": 3}


@pytest.fixture(scope="module", autouse=True)
def _printed_values():
    """Gives hypothesis its printer back, in whose place schemathesis puts one that leaves out all values."""
    printer = hypothesis_core.RepresentationPrinter
    yield
    hypothesis_core.RepresentationPrinter = printer


def narrowed():
    """The schema with the models that are there and few tokens; the rest as published."""
    schema = json.loads(json.dumps(SCHEMA))
    for name in CALLS.values():
        request = schema["components"]["schemas"][f"Create{name}Request"]
        own = request if "properties" in request else next(part for part in request["allOf"] if "properties" in part)
        own["properties"] |= {**KNOWN, "max_tokens": FEW}
        own["required"] = [*own.get("required", ()), "max_tokens", "model"]
    return schema


def fitting(answer, name):
    where = {"components": SCHEMA["components"], "$ref": f"#/components/schemas/{name}"}
    jsonschema.Draft202012Validator(where).validate(answer)


def require_refusal(status, body):
    assert 400 <= status < 500, body
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]


def examined(path, mode, count):
    """Return a decorator: the test gets what schemathesis makes of a call's body in this mode, `count` times."""
    case = schemathesis.openapi.from_dict(narrowed())[path]["POST"].as_strategy(generation_mode=mode)
    phases = settings(max_examples=count, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    return lambda test: settings(phases, suppress_health_check=list(HealthCheck))(given(case=case)(test))


@pytest.mark.parametrize("path", CALLS)
def test_what_the_schema_allows_is_answered_as_it_says_or_refused_by_the_name_of_a_field(serve, path):
    statuses = []
    with serve(new_tokens=8) as client:

        @examined(path, schemathesis.GenerationMode.POSITIVE, 40)
        def send(case):
            asked = json.loads(json.dumps(case.body))
            status, _, body = client.send("POST", f"/v1{path}", asked)
            statuses.append(status)
            if status != 200:
                require_refusal(status, body)
                assert body["error"]["param"] in {*asked, None}
            elif asked.get("stream"):
                *events, last, _ = body.split("\n\n")
                assert last == "data: [DONE]"
                name = "CreateChatCompletionStreamResponse" if "chat" in path else "CreateCompletionResponse"
                for event in events:
                    said = json.loads(event.removeprefix("data: "))
                    for choice in said["choices"]:
                        # of a completion's parts the published schema knows the last alone
                        choice["finish_reason"] = choice["finish_reason"] or "stop"
                    fitting(said, name)
            else:
                fitting(body, f"Create{CALLS[path]}Response")

        send()
    assert set(statuses) == {200, 400}


@pytest.mark.parametrize("path", CALLS)
def test_what_the_schema_forbids_is_never_an_error_of_the_server(serve, path):
    with serve(new_tokens=8) as client:

        @examined(path, schemathesis.GenerationMode.NEGATIVE, 40)
        def send(case):
            try:
                data = json.dumps(case.body).encode()
            except TypeError:
                return
            status, _, body = client.send("POST", f"/v1{path}", data)
            if status != 200:
                require_refusal(status, body)

        send()


@pytest.mark.parametrize(
    ("path", "fields", "name"),
    [
        ("/completions", {"prompt": "abc"}, "CreateCompletionResponse"),
        ("/completions", {"prompt": ["abc", "b"], "logprobs": 2, "n": 2}, "CreateCompletionResponse"),
        ("/chat/completions", {"messages": [{"role": "user", "content": "abc"}]}, "CreateChatCompletionResponse"),
        (
            "/chat/completions",
            {"messages": [{"role": "user", "content": "abc"}], "logprobs": True, "top_logprobs": 2},
            "CreateChatCompletionResponse",
        ),
    ],
)
def test_answers_fit_the_schema(serve, path, fields, name):
    with serve() as client:
        status, _, body = client.send("POST", f"/v1{path}", {"model": "0.7*b - 0.4*c", "max_tokens": 5, **fields})
        assert status == 200
        fitting(body, name)
        fitting(client.send("GET", "/v1/models")[2], "ListModelsResponse")
        fitting(client.send("GET", "/v1/models/a")[2], "Model")
