"""Servers of other engines, whose adapters are damaged on disk: every fault has to be named there, too."""

from __future__ import annotations

import engines
import pytest

from benchmarks._served import vllm

# a busy machine takes minutes to start the server
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def verdicts(report, name):
    return {finding.verdict for finding in report.findings if finding.asked == name}


@pytest.fixture(scope="module")
def of_vllm(tmp_path_factory, small_model, tokenizer, folders, damaged, hub, look):
    """What vLLM on CPU says with slots for all adapters and one."""
    base = tmp_path_factory.mktemp("base")
    small_model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    served = {**damaged[0], "passive": folders["passive"], "negation": folders["negation"]}
    with vllm(str(engines.interpreter("vllm")), base, served, slots=len(served) + 1, max_rank=16) as server:
        return look(server.url, hub)


def test_vllm_has_every_seeded_fault_named(of_vllm, damaged):
    found = {name: verdicts(of_vllm, name) for name in damaged[1]}
    assert {name: said for name, said in found.items() if not all(damaged[1][name] in each for each in said)} == {}


def test_vllm_is_sound_where_nothing_was_done_to_it(of_vllm):
    assert of_vllm.basis == "log-probabilities"
    sound = ("passive", "negation", "org/base")
    assert {name: verdicts(of_vllm, name) for name in sound} == {name: {"as asked"} for name in sound}
