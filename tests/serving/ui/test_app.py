"""What the page's server answers, and whom it refuses."""

from __future__ import annotations

import base64
import http.client
import json
from urllib.parse import quote, urlencode

import numpy as np
import pytest
import torch

import loraweave as lw
from loraweave.errors import CompositionError
from loraweave.hub.embedders._embedder import embedder_of
from loraweave.serving.ui.app import make_ui_server
from loraweave.serving.ui.overview import Snapshot, followed

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


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_may_open_the_page_and_ask_nothing(ask, site):
    assert ask("/api/hub", headers={"Sec-Fetch-Site": site})[0] == 403
    assert ask("/", headers={"Sec-Fetch-Site": site})[0] == 200


def test_only_loopback_is_an_address_for_it(hub):
    with pytest.raises(CompositionError, match=r"ssh -L 8001:127\.0\.0\.1:8001"):
        make_ui_server(hub, host="0.0.0.0")


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


def test_a_hit_has_the_score_and_the_evidence_of_the_hubs_search(ask, hub):
    _, found = ask("/api/search", q="plural of a noun", count=3)
    hits = hub.search("plural of a noun", k=3)
    assert [(row["name"], row["score"], row["evidence"]) for row in found["rows"]] == [
        (hit.name, hit.score, hit.evidence) for hit in hits
    ]


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
