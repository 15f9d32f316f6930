"""The server on loopback, as a client sees it: OpenAI's calls with formulas as model names, beside the engine alone."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from urllib.parse import unquote

import pytest
import torch
from served_rows import PROMPTS, alone, averaged

import loraweave as lw
from loraweave.serving.limits import Limits
from loraweave.serving.names import Names
from loraweave.serving.run import make_server

TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ message.role[0] }}: {{ message.content }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
# (model name, the weights that it stands for)
FORMULAS = [
    ("a", {"a": 1.0}),
    ("base", {}),
    ("0.7*b - 0.4*c", {"b": 0.7, "c": -0.4}),
    ("@kept", {"a": 0.5, "c": 0.5}),
    ("0.5*(a + b) + .5*c", {"a": 0.5, "b": 0.5, "c": 0.5}),
]


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


@pytest.fixture
def serve(tmp_path, make_model, make_adapters, tokenizer):
    """serve(limits..., api_key=...): a client of a running server over a hub of the adapters a, b, c and @kept."""

    @contextmanager
    def run(template=TEMPLATE, api_key=None, **limits):
        model = make_model("llama", dtype=torch.float64)
        adapters = make_adapters(model, "llama")
        with lw.Hub(tmp_path / "hub") as hub:
            for adapter in adapters:
                hub.add(adapter)
            hub.save_composition("kept", lw.parse("0.5*a + 0.5*c"))
            tokenizer.chat_template = template
            server = make_server(
                hub, model, tokenizer, port=0, limits=Limits(**limits), api_key=api_key, log_level="critical"
            )
            thread = threading.Thread(target=server.run)
            thread.start()
            try:
                while not server.started:
                    assert thread.is_alive()
                    time.sleep(0.01)
                port = server.servers[0].sockets[0].getsockname()[1]
                yield Client(port, hub, lw.Composer(model, adapters, tokenizer=tokenizer))
            finally:
                server.should_exit = True
                thread.join(60)
                tokenizer.chat_template = None
                assert not thread.is_alive()

    return run


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


def test_many_clients_with_different_formulas_each_get_the_answer_of_the_engine_alone(serve):
    asked = [(name, weights, prompt) for name, weights in FORMULAS for prompt in PROMPTS]
    with serve() as client:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda each: client.complete(each[0], each[2], logprobs=0), asked))
        for (_, weights, prompt), (status, _, body) in zip(asked, found, strict=True):
            text, logprobs = alone(client.engine, prompt, weights)
            assert status == 200
            [choice] = body["choices"]
            assert choice["text"] == text
            assert choice["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-5)
        assert client.metric("new_tokens_total") == sum(body["usage"]["completion_tokens"] for _, _, body in found)


def test_an_answer_says_which_composition_it_is_of(serve):
    with serve() as client:
        _, headers, body = client.complete(".5*(b + a)")
        formula = lw.parse("0.5*a + 0.5*b")
        assert body["system_fingerprint"] == unquote(headers["X-Loraweave-Formula"]) == formula.canonical
        assert headers["X-Loraweave-Identity"] == formula.identity(client.hub)
        assert body["model"] == ".5*(b + a)"
        assert client.complete("@kept")[2]["system_fingerprint"] == lw.parse("0.5*a + 0.5*c").canonical


def test_a_merge_by_a_method_is_served_as_its_adapter(serve):
    with serve() as client:
        name = "b + 0.5*ties(a, c; density=0.5)"
        client.engine.load("merged", lw.parse(name).merge(client.hub, progress=False))
        expected = alone(client.engine, "zebra", {"merged": 1.0})[0]
        assert expected != alone(client.engine, "zebra", {"b": 1.0})[0]
        assert [client.complete(name, "zebra")[2]["choices"][0]["text"] for _ in range(2)] == [expected] * 2
    with serve(merges=False) as client:
        status, _, body = client.complete(name)
        assert (status, body["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("name", ["arrow(a, b, c; top_k=1)", "@routed"])
def test_a_router_is_served_beside_weighted_sums(serve, name):
    with serve() as client:
        router = lw.router("arrow", client.engine.pool, top_k=1)
        client.hub.save_composition("routed", lw.parse("arrow(a, b, c; top_k=1)"))
        with ThreadPoolExecutor(6) as pool:
            sums = [pool.submit(client.complete, "0.7*b - 0.4*c", prompt) for prompt in PROMPTS[:3]]
            routed = [pool.submit(client.complete, name, prompt) for prompt in PROMPTS[:3]]
        for prompt, one, other in zip(PROMPTS, routed, sums, strict=False):
            assert one.result()[2]["choices"][0]["text"] == alone(client.engine, prompt, router)[0]
            assert other.result()[2]["choices"][0]["text"] == alone(client.engine, prompt, {"b": 0.7, "c": -0.4})[0]
        assert one.result()[2]["system_fingerprint"] == "arrow(a, b, c; top_k=1)"


def test_a_stored_average_asks_each_member_in_prompts_of_its_own(serve):
    with serve() as client:
        engine, tokenizer = client.engine, client.engine.tokenizer
        task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")
        compose = partial(lw.compose, engine.model, tokenizer, engine.pool, progress=False)
        shown = replace(task, demonstrations=task.examples, orders=2)
        members = {"one": compose(task, method="uniform"), "other": replace(compose(task, method="base"), task=shown)}
        average = replace(members["one"], members=members, pool=None, all_weights={})
        client.hub.save_composition("both", average)
        merged = members["one"].adapter
        client.engine.load("one", merged)
        prompts = [task.prompt("abc"), *(each.prompt("abc") for each in shown.in_orders())]
        text = averaged(client.engine, prompts, [{"one": 1.0}, {}, {}], [0.5, 0.25, 0.25], 48).partition("\n")[0]
        status, headers, body = client.complete("@both", "abc", max_tokens=48)
        assert (status, body["choices"][0]["text"]) == (200, text)
        assert body["usage"]["prompt_tokens"] == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        assert average.predict(["abc"]) == [text.strip()]
        assert headers["X-Loraweave-Identity"] == lw.parse("@both").identity(client.hub)
        chat = {"model": "@both", "messages": [{"role": "user", "content": "abc"}], "temperature": 0, "max_tokens": 48}
        assert client.send("POST", "/v1/chat/completions", chat)[2]["choices"][0]["message"]["content"] == text
        for fields in ({"prompt": [5, 6]}, {"prompt": ["abc", "b"], "model": "@both", "n": 9}):
            assert client.complete(**{"model": "@both", **fields})[0] == 400


def test_a_slow_merge_keeps_no_other_request_waiting_and_is_left_by_its_client(serve, monkeypatch):
    begun, free, made = threading.Event(), threading.Event(), []
    own = Names.make

    def make(self, wanted):
        if wanted.merges:
            begun.set()
            assert free.wait(60)
            made.append(wanted.formula.canonical)
        return own(self, wanted)

    monkeypatch.setattr(Names, "make", make)
    name = "ties(a, c; density=0.5)"
    with serve() as client, ThreadPoolExecutor(2) as pool:
        merging = [pool.submit(client.complete, name, "zebra") for _ in range(2)]
        assert begun.wait(60)
        # one that was never used, and one that waits for another merge and goes
        assert client.complete("b", "zebra")[2]["choices"][0]["text"] == alone(client.engine, "zebra", {"b": 1.0})[0]
        with raw_request(client, model="ties(a, b)"):
            until(lambda: client.metric("open_requests") == 3)
        until(lambda: client.metric("open_requests") == 2)
        free.set()
        texts = {each.result()[2]["choices"][0]["text"] for each in merging}
        assert len(texts) == 1
        assert made == [lw.parse(name).canonical]


def test_several_prompts_and_answers_are_numbered_prompt_by_prompt(serve):
    with serve() as client:
        status, _, body = client.complete("b", PROMPTS[:2], n=2, temperature=0.9, seed=5)
        assert status == 200
        assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
        drawn = [
            client.engine.generate(
                [prompt], mixture={"b": 1.0}, seeds=[seed], do_sample=True, temperature=0.9, top_k=0, max_new_tokens=9
            )[0]
            for prompt in PROMPTS[:2]
            for seed in (5, 6)
        ]
        assert [choice["text"] for choice in body["choices"]] == drawn
        assert body["usage"]["prompt_tokens"] == sum(len(client.engine.tokenizer(p)["input_ids"]) for p in PROMPTS[:2])


def test_token_ids_are_a_prompt_too(serve):
    with serve() as client:
        ids = client.engine.tokenizer("abc")["input_ids"]
        assert client.complete(prompt=ids)[2]["choices"] == client.complete(prompt="abc")[2]["choices"]
        assert client.complete(prompt=[ids, ids])[2]["choices"][1]["text"] == client.complete()[2]["choices"][0]["text"]


def test_a_stream_has_the_same_text_and_log_probabilities(serve):
    with serve() as client:
        whole = client.complete("b", "zebra", logprobs=2, n=1)[2]
        events = client.events(
            model="b", prompt="zebra", max_tokens=9, temperature=0, logprobs=2, stream_options={"include_usage": True}
        )
        *pieces, usage = events
        choices = [event["choices"][0] for event in pieces]
        [expected] = whole["choices"]
        assert "".join(choice["text"] for choice in choices) == expected["text"]
        for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert [value for choice in choices for value in choice["logprobs"][key]] == expected["logprobs"][key]
        assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [expected["finish_reason"]]
        assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
        assert len({event["id"] for event in events}) == 1


def test_a_chat_is_the_completion_of_its_template(serve):
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": [{"type": "text", "text": "abc"}]}]
    with serve() as client:
        fields = {"model": "0.7*b - 0.4*c", "messages": messages, "temperature": 0, "max_completion_tokens": 9}
        status, _, body = client.send("POST", "/v1/chat/completions", {**fields, "logprobs": True, "top_logprobs": 1})
        assert status == 200
        text, logprobs = alone(client.engine, "s: be\nu: abc\na: ", {"b": 0.7, "c": -0.4})
        [choice] = body["choices"]
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert [entry["logprob"] for entry in choice["logprobs"]["content"]] == pytest.approx(logprobs, abs=1e-5)
        assert all(entry["top_logprobs"][0]["token"] == entry["token"] for entry in choice["logprobs"]["content"])
        first, *rest = [event["choices"][0]["delta"] for event in client.events("/v1/chat/completions", **fields)]
        assert first == {"role": "assistant", "content": ""}
        assert "".join(delta["content"] for delta in rest) == text


def test_a_stop_string_ends_the_text_before_it(serve):
    with serve() as client:
        text = client.complete("b", "zebra")[2]["choices"][0]["text"]
        assert len(text) > 4
        [choice] = client.complete("b", "zebra", stop=["never", text[2:4]])[2]["choices"]
        assert (choice["text"], choice["finish_reason"]) == (text[: text.index(text[2:4])], "stop")


def test_auto_takes_what_retrieval_finds_for_the_prompts_input_and_says_so(serve):
    inputs = {
        "a": ["17 + 25", "3 + 48", "91 + 6", "12 + 12", "7 + 65"],
        "b": ["the judge thanked the doctor.", "a cat saw the dog.", "the man ate an apple.", "she wrote a letter."],
        "c": ["Wie spät ist es?", "Das Haus ist groß.", "Ich trinke Wasser.", "Wo ist der Bahnhof?"],
    }
    with serve() as client:
        for name, examples in inputs.items():
            adapter = client.hub[name]
            client.hub.remove(name)
            client.hub.add(adapter, examples=examples, description=f"task {name}")
        retriever = lw.Retriever(client.hub)
        threshold = retriever.calibrate(false_accept=0.5).threshold
        retriever.abstention = None
        for instruction, text in [("Add the numbers.", "8 + 31"), ("", "the nurse saw the king."), ("", "0xA0; // int")]:
            prompt = f"{instruction}\nInput: {text}\nOutput:"
            _, _, body = client.complete("auto", prompt)
            found = retriever.for_task([text], description=instruction, k=3)
            shares = torch.tensor([each.score / 0.1 for each in found]).softmax(0)
            shares = shares[shares >= 0.1] / shares[shares >= 0.1].sum()
            terms = [f"{share:.2f}*{each.name}" for share, each in zip(shares.tolist(), found, strict=False)]
            expected = lw.parse(" + ".join(terms) if found[0].score >= threshold else "base")
            assert body["system_fingerprint"] == expected.canonical
            assert body["choices"][0]["text"] == alone(client.engine, prompt, expected.mixture() or {})[0]
        assert client.complete("auto", "8 + 31")[2]["system_fingerprint"].endswith("a")


def test_adapters_come_and_go_while_it_runs(serve, make_adapter):
    with serve() as client:
        new = make_adapter(client.engine.model, "'new one", rank=2, targets=("q_proj",), seed=9)
        assert client.complete(r"'\'new one'")[0] == 404
        client.hub.add(new)
        client.engine.load("new", new)
        listed = {each["id"] for each in client.send("GET", "/v1/models")[2]["data"]}
        assert listed == {"base", "a", "b", "c", "@kept", r"'\'new one'"}
        assert client.complete(r"'\'new one'")[2]["choices"][0]["text"] == alone(client.engine, "abc", {"new": 1.0})[0]
        client.hub.remove("b")
        status, _, body = client.complete("0.5*a + b")
        assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
        # another content under the same name is another adapter
        client.hub.add(make_adapter(client.engine.model, "a", rank=2, targets=("q_proj",), seed=9), replace=True)
        assert client.complete("a")[2]["choices"][0]["text"] == alone(client.engine, "abc", {"new": 1.0})[0]
        assert client.complete("a@1")[2]["choices"][0]["text"] == alone(client.engine, "abc", {"a": 1.0})[0]


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"model": "aa"}, {"prompt": []}, {"model": "1e300*a"}])
def test_a_request_that_is_over_holds_no_place(serve, fields):
    with serve(rows=1, waiting=1) as client:
        for _ in range(5):
            assert client.complete(**fields)[0] != 429
            until(lambda: client.metric("open_requests") == 0)
        assert client.complete()[0] == 200


def test_a_row_keeps_the_adapter_that_it_began_with(serve):
    with serve() as client, gate_before(client.engine.model) as gate, ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.complete, "b")
        assert gate.reached.wait(60)
        client.hub.remove("b")
        client.hub.gc()
        gate.open()
        status, _, body = running.result()
        assert status == 200
        assert body["choices"][0]["text"] == alone(client.engine, "abc", {"b": 1.0})[0]


REFUSED = [
    ({"model": "aa"}, 404, "model", "did you mean 'a'"),
    ({"model": "@kep"}, 404, "model", "did you mean 'kept'"),
    ({"model": "a@7"}, 404, "model", "no version 7"),
    ({"model": "0.5*a +"}, 400, "model", r"\^"),
    ({"model": "@kept + arrow(a, b)"}, 400, "model", "stands alone"),
    ({"model": "mole(a, b)"}, 400, "model", "."),
    ({"model": "1e300*a"}, 400, "model", "fp32"),
    ({"model": "'" + "a" * 2000 + "'"}, 400, "model", "2002 characters, above the limit of 1024"),
    ({"model": " + ".join(f"a@{n}" for n in range(1, 18))}, 400, "model", "17 adapters, above the limit of 16"),
    ({"model": "../../etc/passwd"}, 400, "model", "."),
    ({"model": "https://example.org/x"}, 400, "model", "."),
    ({"model": 3}, 400, "model", "string"),
    ({"prompt": []}, 400, None, "."),
    ({"prompt": [70]}, 400, "prompt", "token id 70 is outside the vocabulary of 61"),
    ({"prompt": "a" * 3000}, 413, "prompt", "the model's context is 2048"),
    ({"prompt": "a" * 2040}, 400, "max_tokens", "beyond the context"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5000}, 400, "max_tokens", "at most 1024"),
    ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
    ({"temperature": float("nan")}, 400, "temperature", "."),
    ({"n": 17}, 400, "n", "17 answers are asked for, above the limit of 16"),
    ({"stop": [""]}, 400, None, "at least 1 character"),
    ({"logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    ({"logit_bias": {"3": 5}}, 400, None, "logit_bias=.* is not there yet"),
    ({"echo": True}, 400, None, "echo=True is not there yet"),
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
        text = client.send("POST", "/v1/chat/completions", chat)[2]["choices"][0]["message"]["content"]
        assert text == alone(client.engine, "abc: zebra", {"b": 1.0})[0]


def test_without_its_key_a_server_tells_only_its_health(serve):
    with serve(api_key="secret") as client:
        paths = [("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions")]
        assert [client.send(*path)[0] for path in paths] == [401] * 4
        assert client.send("GET", "/v1/models", Authorization="Bearer other")[0] == 401
        assert client.send("GET", "/v1/models", Authorization="Bearer secret")[0] == 200
        assert client.send("GET", "/health")[::2] == (200, {"status": "ok"})


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


@contextmanager
def raw_request(client, **fields):
    """The socket of a client that asks for 1000 tokens, and leaves at the block's end."""
    asked = {"model": "c", "prompt": "abc", "max_tokens": 1000, "temperature": 0, **fields}
    data = json.dumps(asked).encode()
    head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(data)}"]
    with socket.create_connection(("127.0.0.1", client.port), timeout=60) as opened:
        opened.sendall("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        yield opened


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
