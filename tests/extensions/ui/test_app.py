"""What the page's server answers, and whom it refuses."""

from __future__ import annotations

import base64
import http.client
import io
import json
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import quote, urlencode

import numpy as np
import pytest
import torch
from server_clients import answering, until

import loraweave as lw
from loraweave.errors import CompositionError
from loraweave.extensions.ui import overview, workbench
from loraweave.extensions.ui.app import Left, make_ui_server
from loraweave.extensions.ui.catalogue import Catalogue
from loraweave.extensions.ui.overview import Entry, Overview, Snapshot, followed, sketched
from loraweave.extensions.ui.workbench import Found, Workbench
from loraweave.hub.embedders._embedder import embedder_of

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture
def ask(address):
    """ask(path, fields...): (status, body) as a browser on this machine gets them; `headers` are sent beside its own."""

    def get(path, *, method="GET", body=None, headers=None, **fields):
        host = address.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            query = f"?{urlencode(fields)}" if fields else ""
            connection.request(method, f"{path}{query}", body, {"Host": host, **(headers or {})})
            answer = connection.getresponse()
            text = answer.read().decode()
            get.headers = answer.headers
            return answer.status, json.loads(text) if text[:1] == "{" else text
        finally:
            connection.close()

    return get


def test_every_answer_has_a_policy_that_names_this_server_alone(ask):
    for path in ("/", "/main.js", "/ui.css", "/base.css", "/api/hub", "/nothing"):
        ask(path)
        policy = dict(part.split(" ", 1) for part in ask.headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "connect-src", "frame-src")} == {"'self'"}
        assert ask.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", ""])
def test_a_name_that_was_bent_to_this_machine_is_refused(ask, host):
    assert ask("/api/hub", headers={"Host": host})[0] == 400
    assert "Content-Security-Policy" in ask.headers


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_may_open_the_page_and_ask_nothing(ask, site):
    assert ask("/api/hub", headers={"Sec-Fetch-Site": site})[0] == 403
    assert ask("/", headers={"Sec-Fetch-Site": site})[0] == 200


def test_only_loopback_is_an_address_for_it(hub):
    with pytest.raises(CompositionError, match=r"ssh -L 8001:127\.0\.0\.1:8001"):
        make_ui_server(hub, lw.load_base, host="0.0.0.0")


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_the_address_is_told_once_the_server_answers_there(hub, host, shown):
    told = []
    with answering(make_ui_server(hub, pytest.fail, host=host, port=0, log_level="critical", ready=told.append)) as port:
        until(lambda: told)
    assert told == [f"http://{shown}:{port}/"]


@pytest.mark.parametrize("path", ["/../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/page_files"])
def test_nothing_beside_the_pages_files_is_given_out(ask, path):
    assert ask(path)[0] in (400, 404)


def test_a_page_of_the_table_is_what_the_hub_has_in_that_order(ask, hub):
    names = [record.name for record in hub.records()]
    _, newest = ask("/api/adapters", count=2)
    assert [row["name"] for row in newest["rows"]] == names[::-1][:2]
    assert newest["total"] == len(names)
    _, second = ask("/api/adapters", start=2, count=2, sort="added", descending="false")
    assert [row["name"] for row in second["rows"]] == names[2:4]
    _, held = ask("/api/adapters", quarantined="true")
    assert [row["name"] for row in held["rows"]] == ["held"]
    _, free = ask("/api/adapters", license="MIT")
    assert [row["name"] for row in free["rows"]] == ["past"]


def test_a_table_is_sorted_by_numbers_of_which_some_are_zero_and_by_licenses_of_which_some_are_missing():
    facts = [("a", "MIT", 2), ("b", None, 0), ("c", "Apache-2.0", 1), ("d", None, 0)]
    entries = {seq: Entry(name, license, rank, 10, "2026", -1, -1, -1) for seq, (name, license, rank) in enumerate(facts)}
    snapshot = Snapshot(entries=entries)
    assert list(snapshot.order("rank", False)) == [1, 3, 2, 0]
    assert list(snapshot.order("rank", True)) == [0, 2, 1, 3]
    assert list(snapshot.order("license", False)) == [1, 3, 2, 0]


def test_a_hit_has_the_score_and_the_evidence_of_the_hubs_search(ask, hub):
    _, found = ask("/api/search", q="plural of a noun", count=3)
    hits = hub.search("plural of a noun", k=3)
    assert [(row["name"], row["score"], row["evidence"]) for row in found["rows"]] == [
        (hit.name, hit.score, hit.evidence) for hit in hits
    ]
    _, sooner = ask("/api/search", q="plural of a noun", count=3, evidence="false")
    assert [(row["name"], row["score"]) for row in sooner["rows"]] == [(hit.name, hit.score) for hit in hits]


@pytest.fixture
def points(ask):
    while True:
        _, found = ask("/api/map")
        if not found["busy"] and "columns" in found:
            return found


def test_an_adapter_whose_name_has_the_query_in_it_comes_first(ask, points):
    _, found = ask("/api/search", q="INFLEC")
    assert found["rows"][0]["name"] == "inflected"
    assert found["rows"][0]["evidence"].startswith("its name; description 'Inflects a word.'")


def test_the_table_sorts_by_what_the_map_knows(ask, hub, points):
    _, found = ask("/api/adapters", sort="rank", descending="true")
    ranks = [row["rank"] for row in found["rows"]]
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 1


def test_the_map_is_the_plane_of_the_embeddings_first_two_components(ask, hub, points):

    vectors_ND = np.stack(
        [vector for name, (_, vector) in hub.vectors(embedder_of("sentence").id).items() if name != "held"]
    )
    centred_ND = (vectors_ND - vectors_ND.mean(axis=0)).astype(float)
    axes_2D = np.linalg.svd(centred_ND)[2][:2]
    expected_N2 = centred_ND @ axes_2D.T
    column = {
        name: np.frombuffer(base64.b64decode(text), kind)
        for (name, text), kind in zip(points["columns"].items(), ("<u4", "<u2", "<u2", "u1", "u1"), strict=True)
    }
    for axis, name in enumerate("xy"):
        # up to the sign of a component
        own = column[name] / 65535
        wanted = (expected_N2[:, axis] - expected_N2[:, axis].min()) / np.ptp(expected_N2[:, axis])
        assert min(abs(own - wanted).max(), abs(1 - own - wanted).max()) < 1e-4
    assert points["names"] == [record.name for record in hub.records()]
    licenses = [points["licenses"][number] for number in column["license"]]
    assert licenses == [record.license or "none stated" for record in hub.records()]


def test_of_many_adapters_a_sample_is_drawn_and_all_are_counted(hub, monkeypatch, points):
    monkeypatch.setattr(overview, "MAX_POINTS", 3)
    whole = followed(hub, Snapshot())
    found = whole.points()
    assert (found["count"], found["placed"], found["total"]) == (3, len(hub), len(hub))
    seqs = np.frombuffer(base64.b64decode(found["columns"]["seq"]), "<u4").tolist()
    assert seqs == sorted(set(seqs))
    assert set(seqs) < set(whole.entries)
    assert found["names"] == [whole.entries[seq].name for seq in seqs]


def test_the_map_follows_the_hub_without_being_fitted_again(hub, make_adapter, tiny, tmp_path):
    with lw.Hub(tmp_path / "hub") as own:
        for number in range(12):
            own.add(make_adapter(tiny, f"a{number}", seed=number), description=f"Adds {number} to it.", anomalies="off")
        own.search("a", k=1)
        before = followed(own, Snapshot())
        own.rename("a3", "renamed")
        own.search("a", k=1)
        after = followed(own, before)
    assert after.plane is before.plane
    assert after.entries[4].name == "renamed"
    assert [after.entries[seq] == before.entries[seq] for seq in before.entries] == [seq != 4 for seq in before.entries]


def test_a_first_map_by_words_is_there_before_the_search_has_embedded_a_text(hub, monkeypatch):
    let_go = threading.Event()
    search = hub.search

    def wait(*given, **options):
        assert let_go.wait(60)
        return search(*given, **options)

    monkeypatch.setattr(hub, "search", wait)
    # as in a hub that was never searched
    changes = hub.changes
    monkeypatch.setattr(hub, "changes", lambda *given, **options: without_vectors(changes(*given, **options)))
    made = Overview(hub)
    try:
        until(lambda: made.newest is not None)
        first = made.newest
        assert (first.is_sketch, first.points()["by_words"], made.busy) == (True, True, True)
        assert {entry.name for entry in first.entries.values()} == {record.name for record in hub.records()}
        assert all(entry.cluster >= 0 for entry in first.entries.values())
        assert sketched(hub).entries == first.entries
        monkeypatch.setattr(hub, "changes", changes)
    finally:
        let_go.set()
    until(lambda: not made.busy)
    assert (made.newest.is_sketch, made.error) == (False, "")
    assert made.newest.entries == followed(hub, Snapshot()).entries


def without_vectors(read):
    return replace(read, page=tuple(change._replace(vector=None) for change in read.page))


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_map_that_fails_is_an_error_in_the_log_unless_the_page_is_closed(hub, monkeypatch, caplog, is_closed):
    begun, end = threading.Event(), threading.Event()

    def fail(*_):
        begun.set()
        assert end.wait(60)
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(overview, "followed", fail)
    monkeypatch.setattr(overview, "CLOSING_S", 0.01)
    made = Overview(hub)
    assert made.newest is None
    assert begun.wait(60)
    if is_closed:
        made.close()
    end.set()
    until(lambda: not made.busy)
    assert ["the map was not made" in record.message for record in caplog.records] == [True] * (not is_closed)


def test_a_question_that_is_not_answered_when_the_server_stops_is_told_so(hub, monkeypatch, capfd):
    begun, end = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        assert end.wait(60)

    monkeypatch.setattr(Catalogue, "summary", wait)
    server = make_ui_server(hub, pytest.fail, port=0)
    server.config.timeout_graceful_shutdown = 0.01
    try:
        with ThreadPoolExecutor(1) as client, answering(server) as port:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/api/hub")
            asked = client.submit(connection.getresponse)
            assert begun.wait(60)
            server.should_exit = True
            answer = asked.result(60)
            assert (answer.status, "the server is stopping" in answer.read().decode()) == (503, True)
    finally:
        end.set()
    told = capfd.readouterr().err
    assert ("Finished server process" in told, "Traceback" in told) == (True, False)


def test_an_adapters_page_has_its_versions_parents_and_card(ask, hub):
    _, found = ask("/api/adapter", name="plural")
    assert [each["version"] for each in found["versions"]] == [2, 1]
    _, past = ask("/api/adapter", name="past")
    assert past["examples"][0] == {"input": "walk", "output": "walked"}
    _, merged = ask("/api/adapter", name="inflected")
    _, *parents = merged["family"]
    assert {(each["name"], each["weight"], each["known"]) for each in parents} == {
        ("plural", 0.75, True),
        ("past", 0.25, True),
    }


def test_the_norms_are_those_of_the_dense_updates(ask, hub):
    _, found = ask("/api/layers", name="past")
    adapter = hub["past"]
    for kind, row in zip(found["kinds"], found["values"], strict=True):
        for block, value in zip(found["blocks"], row, strict=True):
            layer = block if kind == block else f"{block}.{kind}"
            factors = adapter.layers.get(layer)
            expected = None if factors is None else float(torch.linalg.norm(factors.b_OR @ factors.a_RI))
            assert value == (None if expected is None else pytest.approx(expected, rel=1e-5))


def test_who_resembles_it_is_what_the_retriever_says(ask, hub):
    _, found = ask("/api/alike", name="inflected", by="weights")
    assert [(row["name"], row["score"]) for row in found["rows"]] == [
        (hit.name, hit.score) for hit in lw.Retriever(hub).like("inflected", k=8)
    ]
    assert found["rows"][0]["name"] == "plural"


@pytest.mark.parametrize(
    ("path", "fields", "status", "told"),
    [
        ("/api/adapter", {"name": "plurall"}, 404, "did you mean 'plural'?"),
        ("/api/adapter", {}, 400, "name: Field required"),
        ("/api/adapters", {"count": 1000}, 400, "less than or equal to 200"),
        ("/api/search", {"q": "  "}, 400, "is empty"),
        ("/api/layers", {"name": "x", "file": "/etc"}, 400, "file: Extra inputs are not permitted"),
        ("/api/nothing", {}, 404, "Not Found"),
    ],
)
def test_what_cannot_be_asked_is_said_in_words(ask, path, fields, status, told):
    found, body = ask(path, **fields)
    assert found == status
    assert told in body["error"]["message"]


def test_a_name_is_never_a_path(ask):
    assert ask(f"/api/adapter?name={quote('../../etc/passwd')}")[0] == 404


@pytest.fixture
def send(ask):
    """send(path, fields...): (status, what was told: the events of a long act, else the body)."""

    def post(path, **fields):
        status, text = ask(path, method="POST", body=json.dumps(fields), headers={"Content-Type": "application/json"})
        if isinstance(text, str) and text.startswith("data: "):
            return status, [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-1]]
        return status, text

    return post


BLOCKS = {"model.layers.0": 0.5, "model.layers.1": -1.0}
PARTS = [{"name": "plural", "weight": 0.75, "blocks": BLOCKS}, {"name": "past", "weight": 0.25}]


@pytest.fixture
def weights():
    """The weight of PARTS in a layer, written out."""
    return lambda layer: {"plural": BLOCKS.get(layer[:14], 0.75), "past": 0.25}


def test_both_answers_are_those_of_the_engine(send, hub, tiny, tokenizer, weights):
    _, events = send("/api/answer", parts=PARTS, text="abc", max_new_tokens=9)
    engine = lw.Composer(tiny, hub.pool(["plural", "past"]), tokenizer=tokenizer)
    layers = {layer: weights(layer) for layer in engine.pool.layer_names}
    mixture = lw.MixtureWeights.of_layers(layers, engine.pool.names)
    for key, by_hand in (("base", {}), ("composition", mixture)):
        said = "".join(event.get(key, "") for event in events)
        assert [said] == engine.generate(["abc"], mixture=by_hand, max_new_tokens=9, do_sample=False)


def test_an_instruction_makes_the_prompt_of_a_task(send, hub, tiny, tokenizer):
    part = [{"name": "past", "weight": 1}]
    _, events = send("/api/answer", parts=part, instruction="Do it.", text="abc", max_new_tokens=5)
    engine = lw.Composer(tiny, hub.pool(["past"]), tokenizer=tokenizer)
    prompt = lw.Task([], instruction="Do it.").prompt("abc")
    said = "".join(event.get("composition", "") for event in events)
    assert [said] == engine.generate([prompt], mixture={"past": 1.0}, max_new_tokens=5, do_sample=False)


def test_a_chat_is_asked_in_the_tokenizers_template(send, hub, tiny, tokenizer, monkeypatch):
    template = "{% for turn in messages %}{{ turn.role[0] }}:{{ turn.content }} {% endfor %}a:"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    part = [{"name": "past", "weight": 1}]
    _, events = send("/api/answer", parts=part, text="abc", chat=True, max_new_tokens=5)
    engine = lw.Composer(tiny, hub.pool(["past"]), tokenizer=tokenizer)
    said = "".join(event.get("composition", "") for event in events)
    messages = [{"role": "user", "content": "abc"}]
    assert [said] == engine.generate([messages], mixture={"past": 1.0}, max_new_tokens=5, do_sample=False)


def test_interference_is_that_of_the_dense_updates(send, hub, weights):
    _, found = send("/api/mixed", parts=PARTS)
    left, right = hub["plural"].layers, hub["past"].layers
    dense = {}
    for name, layers in (("plural", left), ("past", right)):
        for layer in {*left, *right}:
            factors = layers.get(layer)
            update = torch.zeros(()) if factors is None else (factors.b_OR.double() @ factors.a_RI.double())
            dense[name, layer] = weights(layer)[name] * update
    inner = sum(float((dense["plural", layer] * dense["past", layer]).sum()) for layer in {*left, *right})
    norms = [sum(float((dense[name, layer] ** 2).sum()) for layer in {*left, *right}) ** 0.5 for name in ("plural", "past")]
    assert found["norms"] == pytest.approx(norms, rel=1e-5)
    assert found["cosines"][0][1] == pytest.approx(inner / norms[0] / norms[1], abs=1e-6)
    conflict = found["conflict"]
    for kind, row in zip(conflict["kinds"], conflict["values"], strict=True):
        for block, value in zip(conflict["blocks"], row, strict=True):
            if value is None:
                continue
            layer = block if kind == block else f"{block}.{kind}"
            one, other = dense["plural", layer], dense["past", layer]
            expected = float((one * other < 0).sum() / ((one != 0) | (other != 0)).sum().clamp(min=1))
            assert value == pytest.approx(expected, abs=1e-3)
    # no formula has weights by block
    assert found["formula"] == ""
    assert send("/api/mixed", parts=PARTS[1:])[1]["formula"] == "0.25*past"


EXAMPLES = [["ab", "c"], ["bc", "d"], ["cd", "e"]]


@pytest.mark.parametrize("per", ["adapter", "block"])
def test_the_weights_found_are_those_of_compose(send, hub, tiny, tokenizer, per):
    names = ["plural", "past"]
    _, events = send("/api/find", names=names, examples=EXAMPLES, per=per, budget=8)
    told, found = [event for event in events if "done" in event], events[-1]
    assert told[-1]["done"] > told[0]["done"]
    pool = hub.pool(names)
    blocks = {block: [layer for layer in pool.layer_names if layer.startswith(block)] for block in (*BLOCKS, "lm_head")}
    options = {"by_layer": False} if per == "adapter" else {"groups": {key: value for key, value in blocks.items() if value}}
    task = lw.Task([tuple(pair) for pair in EXAMPLES])
    expected = lw.compose(tiny, tokenizer, pool, task, method="gradient", budget=8, folds=0, progress=False, **options)
    for part in found["parts"]:
        assert part["weight"] == pytest.approx(expected.all_weights[part["name"]], abs=1e-6)
        for block, weight in part["blocks"].items():
            layer = blocks[block][0]
            assert weight == pytest.approx(expected.by_layer[layer].get(part["name"], 0.0), abs=1e-6)
    assert bool(found["parts"][0]["blocks"]) == (per == "block")
    assert {row["name"]: row["loss"] for row in found["rows"]}["base"] == pytest.approx(expected.report["base"].loss)


def test_a_search_ends_where_nobody_listens(hub, tiny, tokenizer):
    heard = []

    def tell(event):
        heard.append(event)
        if event.get("done", 0) >= 4:
            raise Left

    asked = Found(names=["plural", "past"], examples=[("ab", "c"), ("bc", "d")], budget=400)
    with pytest.raises(Left):
        Workbench(hub, lambda: (tiny, tokenizer)).find(asked, tell)
    assert heard[-1]["done"] < 10
    # and the model is free
    engine = lw.Composer(tiny, hub.pool(["past"]), tokenizer=tokenizer)
    with engine.activate({"past": 1.0}):
        pass


def test_a_mixture_is_kept_as_a_formula_and_one_by_block_as_a_composition(send, hub, tiny, tokenizer, weights):
    plain = [{"name": "plural", "weight": 0.5}, {"name": "past", "weight": -0.25}]
    _, events = send("/api/save", parts=plain, name="mixed")
    assert events[-1]["formula"] == "@mixed"
    assert hub.composition("mixed").formula == "0.5*plural - 0.25*past"
    # the licenses are Apache-2.0 and MIT, which go together
    _, events = send("/api/save", parts=PARTS, name="by block")
    with hub.composition("by block").unpacked() as folder:
        merged = lw.Composition.from_pretrained(folder, tiny, tokenizer).adapter
    for layer, factors in merged.layers.items():
        parts = [(weight, hub[name].layers.get(layer)) for name, weight in weights(layer).items()]
        expected = sum(weight * part.b_OR @ part.a_RI for weight, part in parts if part is not None)
        torch.testing.assert_close(factors.b_OR @ factors.a_RI, expected)
    _, events = send("/api/save", parts=plain[:1], name="mixed")
    assert "another composition" in events[-1]["error"]["message"]


def test_an_export_is_a_zip_of_what_the_library_writes(address, hub, tmp_path):
    body = json.dumps({"parts": [{"name": "past", "weight": 1.0}], "target": "peft"})
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    connection.request("POST", "/api/export", body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status == 200
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        archive.extractall(tmp_path / "export")
    read = lw.Adapter.from_pretrained(tmp_path / "export")
    for layer, factors in hub["past"].layers.items():
        torch.testing.assert_close(read.delta(layer), factors.b_OR @ factors.a_RI)


@pytest.mark.parametrize("num_tokens", [0, 4])
def test_a_routed_answer_has_the_shares_with_which_each_of_its_tokens_was_read(send, hub, tiny, tokenizer, num_tokens):
    pytest.importorskip("loraweave.extensions.explain")
    names = ["plural", "past"]
    _, events = send("/api/route", names=names, router="arrow", text="abc", max_new_tokens=num_tokens)
    answer = events[-1]["answer"]
    engine = lw.Composer(tiny, hub.pool(names), tokenizer=tokenizer)
    options = {"mixture": lw.router("arrow", engine.bound_pool), "max_new_tokens": num_tokens, "do_sample": False}
    assert "".join(piece["token"] for piece in answer) == (engine.generate(["abc"], **options)[0] if num_tokens else "")
    for piece in answer:
        assert set(piece["shares"]) == set(names)
        assert sum(piece["shares"].values()) == pytest.approx(1)
    assert events[-1]["formula"] == "arrow(past, plural)"


def test_the_shares_of_a_router_are_those_of_explain(send, ask, hub, tiny, tokenizer):
    explain = pytest.importorskip("loraweave.extensions.explain").explain
    names = ["plural", "past", "capital"]
    _, events = send("/api/route", names=names, router="arrow", text="abc abd")
    engine = lw.Composer(tiny, hub.pool(names), tokenizer=tokenizer)
    expected = explain(engine, "abc abd", lw.router("arrow", engine.bound_pool)).total.share_E
    assert [each["share"] for each in events[-1]["shares"]] == pytest.approx(expected.tolist())
    status, page = ask(f"/explanation/{events[-1]['page']}")
    assert (status, "Which expert counts where" in page) == (200, True)
    assert "frame-ancestors 'self'" in ask.headers["Content-Security-Policy"]
    assert ask("/explanation/none")[0] == 404


def test_without_an_extension_that_shows_weights_no_router_is_offered_and_the_rest_is_there(send, ask, monkeypatch):
    monkeypatch.setattr(workbench, "brought", lambda part: {})
    _, told = ask("/api/choices")
    assert (told["routers"], "peft" in told["targets"]) == ([], True)
    _, events = send("/api/route", names=["plural"], router="arrow", text="a")
    assert "no extension that is installed shows" in events[-1]["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "told"),
    [
        ("/api/answer", {"parts": [{"name": "nobody", "weight": 1}], "text": "a"}, "no adapter 'nobody'"),
        ("/api/save", {"parts": [{"name": "past", "weight": 0}], "name": "x"}, "all weights are zero"),
        ("/api/find", {"names": ["plural", "past"], "examples": [["", ""]]}, "example 1"),
        ("/api/route", {"names": ["plural"], "router": "arow", "text": "a"}, "did you mean 'arrow'"),
    ],
)
def test_a_failure_of_a_long_act_is_told_as_its_last_event(send, path, fields, told):
    _, events = send(path, **fields)
    assert told in events[-1]["error"]["message"]


@pytest.mark.parametrize(
    "parts", [[], PARTS * 2, [{"name": "past", "weight": 1e9}], [{"name": f"a{n}", "weight": 1} for n in range(9)]]
)
def test_a_mixture_that_cannot_be_meant_is_refused(send, parts):
    assert send("/api/mixed", parts=parts)[0] == 400


def test_a_question_that_changes_something_is_json_alone(ask):
    for path in ("save", "answer", "find", "route", "export", "mixed"):
        assert ask(f"/api/{path}", method="POST", body="{}", headers={"Content-Type": "text/plain"})[0] == 415
        assert ask(f"/api/{path}")[0] in (404, 405)
