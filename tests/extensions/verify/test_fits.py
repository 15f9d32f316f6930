"""Wrong weights are named with their errors: each fault is put into requests on their way to a sound server."""

from __future__ import annotations

import re

import pytest
import server_clients
from server_proxy import proxy

import loraweave as lw
from loraweave.serving.limits import Limits


@pytest.fixture(scope="module")
def url(hub, small_model, tokenizer):
    with server_clients.running(hub, small_model, tokenizer, limits=Limits()) as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture(scope="module")
def small_hub(tmp_path_factory, folders):
    """The adapters that are verified, under one name each."""
    with lw.Hub(tmp_path_factory.mktemp("two")) as opened:
        for name in ("passive", "negation"):
            opened.add(folders[name], examples=["abc", "the judge thanked ", "zebra 12, 34. ", "b"])
        yield opened


def weights(verdict):
    """{adapter: (weight, its error)} of a verdict, as far as weights have errors."""
    found = re.findall(r"(-?[\d.]+) ± ([\d.e-]+) (?:of (\w+)|times its own)", verdict)
    return {name: (float(weight), float(error)) for weight, error, name in found}


# visits of {what is asked: (what answers instead, what the verdict begins with, the weights that answer)}; "" is the asked
VISITS = [
    {
        "0.7*passive + 0.3*negation": ("0.3*passive + 0.7*negation", "other weights: ", {"passive": 0.3, "negation": 0.7}),
        "0.7*passive": ("0.3*passive", "other weights: ", {"passive": 0.3}),
        "passive": ("1.01*passive", "scale ", {"": 1.01}),
        "negation": ("0.5*passive", "got ", {"passive": 0.5}),
        "0.5*passive - 0.25*negation": (
            "0.5*passive + 0.25*negation",
            "other weights: ",
            {"passive": 0.5, "negation": 0.25},
        ),
    },
    {
        "0.7*passive": ("passive", "weights of the sum not applied", {}),
        "passive": ("1.03*passive", "scale ", {"": 1.03}),
        "negation": ("0.9*negation + 0.5*passive", "got ", {"passive": 0.5, "negation": 0.9}),
        "base": ("0.3*passive", "the base with ", {"passive": 0.3}),
    },
]


@pytest.mark.parametrize("visit", VISITS)
def test_wrong_weights_are_named_with_their_errors(url, small_hub, look, visit):
    def before(body, in_flight):
        return {**body, "model": visit.get(body["model"], (body["model"],))[0]}

    with proxy(url, before=before) as front:
        report = look(front, small_hub, [name for name in visit if name != "base"])
    for asked, (_, begins, expected) in visit.items():
        (verdict,) = {finding.verdict for finding in report.findings if finding.asked == asked and finding.when == "alone"}
        assert verdict.startswith(begins), verdict
        found = weights(verdict)
        assert found.keys() == expected.keys(), verdict
        for name, weight in expected.items():
            assert found[name][0] == pytest.approx(weight, abs=max(2e-3, 4 * found[name][1])), verdict
            assert found[name][1] < 0.01
    if "base" not in visit:
        assert {finding.verdict for finding in report.findings if finding.asked == "base"} == {"as asked"}


def test_all_adapters_together_are_named(url, small_hub, look):
    def before(body, in_flight):
        return body if body["model"] == "base" else {**body, "model": "passive + negation"}

    with proxy(url, before=before) as front:
        report = look(front, small_hub, ["passive", "negation"])
    said = {finding.verdict for finding in report.faults}
    assert said
    assert all("added to it" in verdict or verdict.startswith("all adapters together") for verdict in said), said


def test_a_fault_that_no_weights_explain_is_said_as_before(url, small_hub, look):
    def before(body, in_flight):
        return {**body, "model": {"passive": "ties(passive,negation;density=0.3)"}.get(body["model"], body["model"])}

    with proxy(url, before=before) as front:
        report = look(front, small_hub, ["passive", "negation"])
    assert {finding.asked for finding in report.faults} == {"passive"}
    assert all(verdict.startswith("differs beyond rounding; nearest") for verdict in {f.verdict for f in report.faults})
