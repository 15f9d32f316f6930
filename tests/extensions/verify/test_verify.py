"""A server of ours over a hub whose files are damaged, beside the hub as it should be: every fault has to be named."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import server_clients
import torch
from server_proxy import Refuse, proxy

import loraweave as lw
from benchmarks._faults import FAULTS
from loraweave.errors import FormulaError, ScopeError, SourceUnavailable
from loraweave.extensions.verify import verify_server
from loraweave.extensions.verify.answers import Answer, distance, top_of
from loraweave.serving.limits import Limits


@contextmanager
def running(hub, model, tokenizer, **options):
    """The URL of a server that ends with the block."""
    with server_clients.running(hub, model, tokenizer, limits=Limits(), **options) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, folders, damaged, hub, small_model, tokenizer, look):
    """(what a server says whose every adapter but two has a fault, what has to be said of each)."""
    with lw.Hub(tmp_path_factory.mktemp("faulty")) as served:
        for name in ("passive", "negation"):
            served.add(folders[name])
        for name, folder in damaged[0].items():
            served.add(folder, name=name)
        with running(served, small_model, tokenizer) as url:
            return look(url, hub), damaged[1]


def verdicts(report, name):
    return {finding.verdict for finding in report.findings if finding.asked == name}


def test_a_sound_server_has_no_fault_alone_and_mixed_and_is_asked_twenty_times_for_each_name_at_most(
    hub, small_model, tokenizer, look
):
    with running(hub, small_model, tokenizer) as url:
        report = look(url, hub, ["passive", "negation"])
    assert report.ok, str(report)
    asked = {(finding.asked, finding.when) for finding in report.findings}
    assert asked >= {(name, when) for name in ("passive", "negation", "base") for when in ("alone", "mixed")}
    assert ("base", "between others") in asked
    assert report.rounding < 1e-4
    assert report.requests <= 20 * 3
    assert not any(finding.weak for finding in report.findings)


@pytest.mark.parametrize("name", FAULTS)
def test_a_seeded_fault_is_named(name, faulty):
    report, expected = faulty
    found = verdicts(report, name)
    assert found
    assert all(expected[name] in verdict for verdict in found), found
    assert not any(" / " in verdict or verdict.startswith("differs") for verdict in found), found


def test_what_is_sound_beside_faults_is_as_asked(faulty):
    report, _ = faulty
    assert verdicts(report, "passive") | verdicts(report, "negation") | verdicts(report, "base") == {"as asked"}


@pytest.fixture(scope="module")
def url(hub, small_model, tokenizer):
    """A sound server of ours."""
    with running(hub, small_model, tokenizer) as found:
        yield found


def renamed(names):
    def before(body, in_flight):
        return {**body, "model": names.get(body["model"], body["model"])}

    return before


def text_only(body, in_flight):
    if "logprobs" in body:
        raise Refuse(400, "logprobs are not there")
    return {**body, "model": {"negation": "base"}.get(body["model"], body["model"])}


def test_where_a_server_gives_no_log_probabilities_texts_tell(url, hub, look):
    with proxy(url, before=text_only) as front:
        report = look(front, hub, ["passive", "negation"])
    assert report.basis == "texts"
    assert verdicts(report, "passive") | verdicts(report, "base") == {"as asked"}
    assert verdicts(report, "negation") == {"got the base"}


def test_a_base_that_an_adapter_answers_for_beside_others_is_seen_only_there(url, hub, look):
    """vLLM's base row in a batch with all slots taken."""

    def before(body, in_flight):
        return {**body, "model": "negation"} if in_flight > 2 and body["model"] == "base" else body

    with proxy(url, before=before) as front:
        report = look(front, hub, ["passive", "negation"])
    found = {finding.when: finding.verdict for finding in report.findings if finding.asked == "base"}
    assert found == {"alone": "as asked", "between others": "as asked", "mixed": "got negation"}


def test_a_batch_that_gives_rows_what_no_weights_explain_is_told_apart_from_a_wrong_adapter(url, hub, look):
    def before(body, in_flight):
        return {**body, "model": "ties(passive,negation;density=0.3)"} if in_flight > 2 and body["model"] == "base" else body

    with proxy(url, before=before) as front:
        report = look(front, hub, ["passive", "negation"])
    (fault,) = report.faults
    assert (fault.asked, fault.when) == ("base", "mixed")
    assert "beside others only" in fault.verdict


def test_an_adapter_that_answers_for_the_base_is_named_and_the_tolerance_is_still_that_of_the_engine(url, hub, look):
    with proxy(url, before=renamed({"base": "passive"})) as front:
        report = look(front, hub, ["passive", "negation"])
    assert verdicts(report, "base") == {"got passive"}
    assert verdicts(report, "passive") | verdicts(report, "negation") == {"as asked"}
    assert report.tolerance < 0.01


def test_a_base_of_rounded_weights_differs_beyond_rounding(folders, hub, make_model, small_shape, tokenizer, look):
    rounded = make_model("llama", **small_shape)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_((parameter * 6).round() / 6)
    with lw.Hub(hub.path.parent / "rounded") as served:
        served.add(folders["passive"])
        with running(served, rounded, tokenizer) as found:
            report = look(found, hub, ["passive"])
    assert "differs beyond rounding: quantised base?" in verdicts(report, "base")


def test_what_an_engine_keeps_of_an_adapter_that_was_loaded_again_is_an_older_version(url, hub, look):
    """vLLM's way to load and unload, by a server that has the old weights after it."""
    old = []
    listed = [{"id": "base", "parent": None}] + [
        {"id": name, "root": f"/adapters/{name}", "parent": "base"} for name in ("passive", "negation")
    ]
    routes = {
        ("GET", "/v1/models"): lambda body: {"data": listed},
        ("POST", "/v1/unload_lora_adapter"): lambda body: {},
        ("POST", "/v1/load_lora_adapter"): lambda body: old.append((body["lora_name"], body["lora_path"])) or {},
    }

    def before(body, in_flight):
        return {**body, "model": "passive@1"} if old and body["model"] == "passive" else body

    with proxy(url, before=before, routes=routes) as front:
        report = look(front, hub, reload=True)
    assert old == [("passive", "/adapters/passive"), ("negation", "/adapters/negation")]
    found = {(finding.asked, finding.when): finding.verdict for finding in report.findings}
    assert found["passive", "mixed"] == "as asked"
    assert found["passive", "after a reload"] == "an older version: passive@1"
    assert found["negation", "after a reload"] == "as asked"


def test_formulas_are_told_from_their_parts_and_from_weights_that_do_not_count(url, hub, look):
    changed = {"0.5*passive + 0.25*negation": "passive + negation", "passive - negation": "passive"}
    with proxy(url, before=renamed(changed)) as front:
        report = look(front, hub, [*changed, "0.25*passive + 0.5*negation"])
    sum_, difference, sound = dict.fromkeys(finding.asked for finding in report.findings if finding.asked != "base")
    assert verdicts(report, sum_) == {"weights of the sum not applied"}
    assert verdicts(report, difference) == {"got passive"}
    assert verdicts(report, sound) == {"as asked"}


def test_names_that_cannot_be_asked_are_refused_or_noted(url, hub, look):
    with pytest.raises(FormulaError, match="nothing"):
        look(url, hub, ["nothing"])
    with pytest.raises(ScopeError, match="auto"):
        look(url, hub, ["auto"])
    listed = [{"id": name} for name in ("base", "passive", "other/model")]
    with proxy(url, routes={("GET", "/v1/models"): lambda body: {"data": listed}}) as front:
        report = look(front, hub)
    assert report.ok
    assert [note for note in report.notes if note.startswith("not verified: other/model")]


def test_a_name_that_the_server_refuses_is_a_fault_and_a_server_that_is_not_there_an_error(url, hub, look):
    with proxy(url, before=renamed({"negation": "unknown"})) as front:
        report = look(front, hub, ["negation"])
    assert all(verdict.startswith("refused: 404: ") for verdict in verdicts(report, "negation"))
    for place in (front, "adapters", "file:///etc/passwd"):
        with pytest.raises(SourceUnavailable):
            look(place, hub)


def test_probes_are_kept_so_that_a_second_visit_to_a_sound_server_loads_no_model(
    url, hub, small_model, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setenv("LORAWEAVE_CACHE", str(tmp_path))
    loads = []

    def load(base):
        loads.append(base)
        return small_model, tokenizer

    monkeypatch.setattr("loraweave.extensions.verify.verify.load_base", load)
    first, second = (verify_server(url, hub, ["passive"], base="tiny", progress=False) for _ in range(2))
    assert loads == ["tiny"]
    assert first.ok
    assert second.ok
    for path in (tmp_path / "verify").iterdir():
        path.write_text("[]damaged")
    assert verify_server(url, hub, ["passive"], base="tiny", progress=False).ok
    assert loads == ["tiny"] * 2


def test_a_report_is_json_and_a_table(faulty, monkeypatch):
    # in 80 columns a verdict takes two lines
    monkeypatch.setenv("COLUMNS", "160")
    report, _ = faulty
    told = json.loads(json.dumps(report.to_json()))
    assert told["ok"] is False
    assert {"asked", "when", "verdict", "distance", "ok"} <= set(told["findings"][0])
    assert "got negation" in str(report)


KNOWN = Answer(
    "ab",
    ("a", "b", "</s>"),
    ({"a": -0.5, "b": -1.0, "c": -3.0}, {"b": -0.1, "a": -2.5}, {"</s>": -0.2, "a": -1.9}),
    end="</s>",
    ended=True,
)


def test_log_probabilities_are_compared_by_their_root_mean_square_as_far_as_the_texts_agree():
    served = Answer("ac", ("a", "c"), ({"a": -0.8, "b": -0.6}, {"b": -0.1, "c": -3.0}))
    # 0.3 and 0.4 of the first token, 0 of b in the second, c is below what is known there; c in place of b costs 2.4
    assert distance(served, KNOWN) == pytest.approx(((0.09 + 0.16 + 0 + 2.4**2) / 4) ** 0.5)


def test_a_token_that_is_not_among_the_known_has_at_most_their_least():
    served = Answer("d", ("a",), ({"d": -1.0},))
    assert distance(served, KNOWN) == pytest.approx(2.0)


def test_an_end_that_an_engine_writes_without_text_is_no_difference():
    tops = ({"a": -0.5, "b": -1.0}, {"b": -0.1}, {"a": -1.9})
    assert distance(Answer("ab", ("a", "b", ""), tops, ended=True), KNOWN) == pytest.approx(0.0)
    assert distance(Answer("aba", ("a", "b", "a"), tops), KNOWN) == pytest.approx((1.7**2 / 5) ** 0.5)


def test_texts_are_apart_by_what_the_known_model_prefers_its_own_word_by():
    assert distance(Answer("ab", ended=True), KNOWN) == 0.0
    assert distance(Answer("a"), KNOWN) == 0.0
    assert distance(Answer("a", ended=True), KNOWN) == pytest.approx(2.4)
    assert distance(Answer("bb"), KNOWN) == pytest.approx(0.5)
    assert distance(Answer("zz"), KNOWN) == pytest.approx(2.5)


def test_of_tokens_that_are_the_same_text_the_likeliest_counts_and_spaces_before_it_do_not():
    assert top_of([("a", -2.0), (" a", -1.0), ("", -0.1), ("b", -3.0)]) == {"a": -1.0, "b": -3.0}
