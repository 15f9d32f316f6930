"""Servers of other engines, whose adapters are damaged on disk: every fault has to be named there, too."""

from __future__ import annotations

import engines
import gguf_models
import pytest

import loraweave as lw
from benchmarks._served import llama_cpp, vllm
from benchmarks.vllm_formulas import post
from loraweave.extensions.verify.verify import CACHED

# a busy machine takes minutes to start the server
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def verdicts(report, name):
    return {finding.verdict for finding in report.findings if finding.asked == name}


@pytest.fixture(scope="module")
def in_vllm(tmp_path_factory, small_model, tokenizer, folders, damaged):
    """vLLM on CPU with slots for all adapters, one, and four that are loaded again: it keeps the old one's slot at first."""
    base = tmp_path_factory.mktemp("base")
    small_model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    served = {**damaged[0], "passive": folders["passive"], "negation": folders["negation"]}
    with vllm(str(engines.interpreter("vllm")), base, served, slots=len(served) + 5, max_rank=16) as server:
        yield server


@pytest.fixture(scope="module")
def of_vllm(in_vllm, hub, look):
    return look(in_vllm.url, hub)


def test_vllm_has_every_seeded_fault_named(of_vllm, damaged):
    found = {name: verdicts(of_vllm, name) for name in damaged[1]}
    assert {name: said for name, said in found.items() if not all(damaged[1][name] in each for each in said)} == {}


def test_vllm_is_sound_where_nothing_was_done_to_it(of_vllm):
    assert of_vllm.basis == "log-probabilities"
    sound = ("passive", "negation", "org/base")
    assert {name: verdicts(of_vllm, name) for name in sound} == {name: {"as asked"} for name in sound}


def test_what_vllm_loads_under_a_name_while_it_runs_is_what_is_said(of_vllm, in_vllm, hub, look, folders):
    for folder, said in ((folders["older"], "an older version: passive@1"), (folders["passive"], "as asked")):
        post(f"{in_vllm.url}/v1/unload_lora_adapter", {"lora_name": "passive"})
        post(f"{in_vllm.url}/v1/load_lora_adapter", {"lora_name": "passive", "lora_path": str(folder)})
        report = look(in_vllm.url, hub, ["passive"], reload=True)
        assert verdicts(report, "passive") == {said}
        asked = {finding.when for finding in report.findings if finding.asked == "passive"}
        assert asked == {"alone", "mixed", "after a reload"}
        assert verdicts(report, "org/base") == {"as asked"}


@pytest.fixture(scope="module")
def files_of_llama(tmp_path_factory, small_model, tokenizer, folders):
    """The base for llama.cpp, and passive and negation."""
    pytest.importorskip("xllamacpp")
    root = tmp_path_factory.mktemp("gguf")
    # as GPT-2's tokenizer writes bytes
    texts = [
        word.translate({ord(" "): "\u0120", ord("\n"): "\u010a"}) for word in tokenizer.convert_ids_to_tokens(range(58))
    ]
    gguf_models.write_model(root / "base.gguf", small_model, "llama", texts)
    for name in ("passive", "negation"):
        lw.Adapter.from_pretrained(folders[name]).export(root / name, target="gguf", base=small_model)
    return str(root / "base.gguf"), [root / name / "adapter.gguf" for name in ("passive", "negation")]


@pytest.mark.parametrize(("cache_mib", "expected"), [(0, {"as asked"}), (64, {"as asked", CACHED})])
def test_a_prompt_that_llama_cpp_keeps_of_another_adapter_is_named(files_of_llama, hub, look, cache_mib, expected):
    """Its cache beside the slots knows prompts by their tokens alone."""
    prompts = ["country 12", "the judge thanked", "zebra 34.", "up: down", "passive: b", "0123456789"]
    with llama_cpp(*files_of_llama, slots=1, cache_mib=cache_mib) as server:
        report = look(server.url, hub, ["passive", "negation"], prompts=prompts)
    assert {finding.verdict for finding in report.findings} == expected
    assert report.requests <= 20 * 3
