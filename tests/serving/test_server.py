"""The server on loopback, as a client sees it: OpenAI's calls with formulas as model names, beside the engine alone."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from urllib.parse import unquote

import pytest
import torch
from served_rows import PROMPTS, alone, averaged
from server_clients import gate_before, raw_request, until

import loraweave as lw
from loraweave.serving.names import Names

# (model name, the weights that it stands for)
FORMULAS = [
    ("a", {"a": 1.0}),
    ("base", {}),
    ("0.7*b - 0.4*c", {"b": 0.7, "c": -0.4}),
    ("@kept", {"a": 0.5, "c": 0.5}),
    ("0.5*(a + b) + .5*c", {"a": 0.5, "b": 0.5, "c": 0.5}),
]


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


def test_a_request_has_an_id_which_is_the_clients_or_a_new_one(serve):
    with serve() as client:
        asked = {"model": "a", "prompt": "abc", "max_tokens": 2}
        for path, status in (("/v1/completions", 200), ("/v1/chat/completions", 400), ("/v1/responses", 404)):
            ids = []
            for sent in ("mine-1", "two words", "x" * 200):
                found, headers, _ = client.send("POST", path, asked, **{"X-Request-Id": sent})
                assert found == status
                ids.append(headers["X-Request-Id"])
            assert ids[0] == "mine-1"
            assert len({*ids, "two words", "x" * 200}) == 5
        assert client.send("POST", "/v1/completions", {**asked, "stream": True})[1]["X-Request-Id"]


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


def test_a_stored_average_of_a_chat_asks_in_the_turns_of_its_task(serve):
    with serve() as client:
        engine, tokenizer = client.engine, client.engine.tokenizer
        task = lw.Task([("a", "ab"), ("b", "ba")], chat=True, system="swap", demonstrations=[("x", "y")])
        compose = partial(lw.compose, engine.model, tokenizer, engine.pool, task, progress=False)
        members = {name: compose(method=name) for name in ("uniform", "base")}
        average = replace(members["uniform"], members=members, pool=None, all_weights={})
        client.hub.save_composition("both", average)
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "abc"}]
        said = average.predict(["abc", turns])
        fields = {"model": "@both", "temperature": 0, "max_tokens": 48}
        status, _, body = client.complete("@both", "abc", max_tokens=48)
        assert (status, body["choices"][0]["text"].strip()) == (200, said[0])
        prompt = "s: swap\nu: x\na: y\nu: abc\na: "
        assert body["usage"]["prompt_tokens"] == 2 * len(tokenizer(prompt)["input_ids"])
        for messages, expected in ((turns[2:], said[0]), (turns, said[1])):
            _, _, body = client.send("POST", "/v1/chat/completions", {**fields, "messages": messages})
            assert body["choices"][0]["message"]["content"].strip() == expected
        messages = [{"role": "system", "content": "other"}, *turns]
        status, _, body = client.send("POST", "/v1/chat/completions", {**fields, "messages": messages})
        assert (status, "without a system's" in body["error"]["message"]) == (400, True)


def test_a_chat_of_the_tasks_turns_is_asked_as_predict_asks(serve):
    with serve() as client:
        task = lw.Task([("a", "ab"), ("b", "ba")], chat=True, system="swap")
        kept = lw.compose(client.engine.model, client.engine.tokenizer, client.engine.pool, task, method="uniform")
        client.hub.save_composition("kept-chat", kept)
        fields = {"model": "@kept-chat", "temperature": 0, "max_tokens": 48, "stop": "\n"}
        _, _, body = client.send("POST", "/v1/chat/completions", {**fields, "messages": task.prompt("abc").messages})
        assert body["choices"][0]["message"]["content"].strip() == kept.predict(["abc"])[0]


def test_a_stored_average_asks_each_member_in_prompts_of_its_own(serve):
    with serve() as client:
        engine, tokenizer = client.engine, client.engine.tokenizer
        task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")
        compose = partial(lw.compose, engine.model, tokenizer, engine.pool, progress=False)
        shown = replace(task, demonstrations=task.examples, orders=2)
        members = {"one": compose(task, method="uniform"), "other": replace(compose(task, method="base"), task=shown)}
        members["other"] = replace(members["other"], share=3.0)
        average = replace(members["one"], members=members, pool=None, all_weights={})
        client.hub.save_composition("both", average)
        merged = members["one"].adapter
        client.engine.load("one", merged)
        prompts = [task.prompt("abc"), *(each.prompt("abc") for each in shown.in_orders())]
        text = averaged(client.engine, prompts, [{"one": 1.0}, {}, {}], [0.25, 0.375, 0.375], 48).partition("\n")[0]
        status, headers, body = client.complete("@both", "abc", max_tokens=48)
        assert (status, body["choices"][0]["text"]) == (200, text)
        assert body["usage"]["prompt_tokens"] == sum(len(tokenizer(prompt)["input_ids"]) for prompt in prompts)
        assert average.predict(["abc"]) == [text.strip()]
        assert headers["X-Loraweave-Identity"] == lw.parse("@both").identity(client.hub)
        chat = {"model": "@both", "messages": [{"role": "user", "content": "abc"}], "temperature": 0, "max_tokens": 48}
        assert client.send("POST", "/v1/chat/completions", chat)[2]["choices"][0]["message"]["content"] == text
        for fields in ({"prompt": [5, 6]}, {"prompt": ["abc", "b"], "model": "@both", "n": 9}):
            assert client.complete(**{"model": "@both", **fields})[0] == 400


def test_a_stored_program_answers_step_by_step_alone_and_among_members(serve):
    with serve() as client:
        model, tokenizer, pool = client.engine.model, client.engine.tokenizer, client.engine.pool
        task = lw.Task([("a", "ab"), ("b", "ba"), ("cc", "c")], instruction="swap")
        one = lw.compose(model, tokenizer, pool, task, method="uniform")
        other = replace(one, task=replace(task, instruction="again"), all_weights={"a": 1.0})
        base = replace(one, task=replace(task, instruction="say it"), pool=None, all_weights={})
        program = replace(base, task=task, steps={"first": other, "then": base, "last": one})
        both = replace(program, steps={}, members={"one": one, "program": program})
        # what is asked is not what the last step is asked
        assert program._between(["abc", "ba b"]) != ["abc", "ba b"]
        for name, composition in (("steps", program), ("both", both)):
            client.hub.save_composition(name, composition)
            status, _, body = client.complete(f"@{name}", ["abc", "ba b"], max_tokens=48)
            assert status == 200
            said = [each["text"].strip() for each in body["choices"]]
            assert said == composition.predict(["abc", "ba b"], max_new_tokens=48)
            assert client.complete(f"@{name}", [5, 6])[0] == 400


def test_a_program_whose_first_step_ranks_labels_is_refused(serve):
    with serve() as client:
        task = lw.Task([("a", "ab"), ("b", "ba")], instruction="swap")
        one = lw.compose(client.engine.model, client.engine.tokenizer, client.engine.pool, task, method="uniform")
        ranked = replace(one, task=replace(task, labels=["ab", "ba"]))
        client.hub.save_composition("steps", replace(one, steps={"which": ranked, "last": one}, pool=None, all_weights={}))
        status, _, body = client.complete("@steps", "abc")
        assert status == 400
        assert "step 'which' answers by a label" in body["error"]["message"]


def test_an_ensemble_averages_what_its_members_answer_also_without_a_chat_template(serve):
    name = "ensemble(3*(a + 0.5*b), 1*base, 2*ties(a, c; density=0.5))"
    with serve(template=None) as client:
        client.engine.load("merged", lw.parse("ties(a, c; density=0.5)").merge(client.hub, progress=False))
        mixtures = [{"a": 1.0, "b": 0.5}, {}, {"merged": 1.0}]
        for prompt in ("zebra", "abc"):
            expected = averaged(client.engine, [prompt] * 3, mixtures, [3 / 6, 1 / 6, 2 / 6])
            status, headers, body = client.complete(name, prompt)
            assert (status, body["choices"][0]["text"]) == (200, expected)
            assert expected not in {alone(client.engine, prompt, mixture)[0] for mixture in mixtures}
        assert headers["X-Loraweave-Identity"] == lw.parse(name).identity(client.hub)
        chat = {"model": name, "messages": [{"role": "user", "content": "abc"}]}
        status, _, body = client.send("POST", "/v1/chat/completions", chat)
        assert (status, body["error"]["param"]) == (400, "messages")
        assert "has no chat template: use /v1/completions" in body["error"]["message"]


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


def test_auto_takes_what_retrieval_finds_for_the_prompts_input_and_says_so(serve, monkeypatch):
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
        seqs = lw.Hub.seqs

        def of_a_base(hub, filters):
            assert not filters.pass_all, "the places of all are read only after a change"
            return seqs(hub, filters)

        monkeypatch.setattr(lw.Hub, "seqs", of_a_base)
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
