"""A stock vLLM beside the live mixtures: one server on CPUs in fp32, with room for three adapters, all of them taken."""

from __future__ import annotations

import json
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import engines
import pytest
import torch

import loraweave as lw
from benchmarks.vllm_formulas import BASE, PROMPT, logprobs, post, started
from loraweave.extensions.engines.vllm import GROUP

ROOT = Path(__file__).parents[3]
POOL = ROOT / "examples" / "pool"
NAMES = ("passive", "negation", "antonym", "plural")
SLOTS = 3
FORMULAS = [
    "0.7*passive + 0.7*negation",
    "antonym",
    "plural - 0.3*passive",
    "@both",
    "0.9*negation",
    "ties(passive, plural; rank=8)",
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    hub = lw.Hub(tmp_path_factory.mktemp("hub"))
    for name in NAMES:
        hub.add(POOL / name)
    hub.save_composition("both", lw.parse("0.5*antonym + 0.5*negation"))
    first = hub["passive"]
    magnitude = {name: replace(each, magnitude_O=torch.ones(each.b_OR.shape[0])) for name, each in first.layers.items()}
    hub.add(replace(first, name="dora", layers=magnitude))
    elsewhere = {name.replace("self_attn", "attention"): factors for name, factors in first.layers.items()}
    hub.add(replace(first, name="elsewhere", layers=elsewhere, fingerprint=None))
    return hub


@pytest.fixture(scope="module")
def base():
    return lw.load_base()


@pytest.fixture(scope="module")
def server(hub, base, tmp_path_factory):
    """The URL of the server, whose environment finds loraweave here and the plugin by the declared entry point."""
    python = engines.interpreter("vllm")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    plugin = tmp_path_factory.mktemp("plugin")
    (plugin / "loraweave-0.dist-info").mkdir()
    (plugin / "loraweave-0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: loraweave\nVersion: 0\n")
    lines = [f"[{GROUP}]", *(f"{name} = {value}" for name, value in declared.items())]
    (plugin / "loraweave-0.dist-info" / "entry_points.txt").write_text("\n".join(lines))
    with started(python, hub, *base, SLOTS, PYTHONPATH=f"{plugin}:{ROOT}") as url:
        yield url


def live(hub, base, names):
    """[rows, vocabulary] of the first token; what is no weighted sum is merged first."""
    merged = {name: lw.parse(name).merge(hub, progress=False) for name in names if name != BASE}
    engine = lw.Composer(base[0], list(merged.values()), tokenizer=base[1])
    inputs = base[1]([PROMPT] * len(names), return_tensors="pt")
    with torch.no_grad(), engine.activate([{} if name == BASE else {merged[name].name: 1.0} for name in names]):
        return engine.model(**inputs).logits[:, -1].log_softmax(-1)


def worst(served, live_V):
    return max(abs(live_V[token].item() - value) for token, value in served.items())


@pytest.mark.slow
def test_formulas_and_the_base_in_one_batch_answer_as_live(server, hub, base):
    together = [name for formula in FORMULAS for name in (formula, BASE)]
    with ThreadPoolExecutor(len(together)) as threads:
        for _ in range(2):
            found = list(threads.map(lambda name: logprobs(server, name), together))
            for name, served, live_V in zip(together, found, live(hub, base, together), strict=True):
                assert worst(served, live_V) < 1e-4, name


@pytest.mark.slow
def test_the_whole_vocabulary_answers_as_live(server, hub, base):
    formula = FORMULAS[0]
    served = logprobs(server, formula, number=base[0].config.vocab_size)
    assert len(served) == base[0].config.vocab_size
    assert worst(served, live(hub, base, [formula])[0]) < 1e-4


@pytest.mark.slow
def test_the_answer_names_its_composition_which_is_gone_when_an_adapter_changes(server, hub, base):
    hub.add(hub["antonym"], name="changing")
    before = logprobs(server, "changing")
    answer = json.loads(post(f"{server}/v1/completions", {"model": "1.0*changing", "prompt": "a", "max_tokens": 1}))
    assert answer["model"].startswith("changing#")
    assert logprobs(server, answer["model"]) == pytest.approx(before, abs=1e-5)
    hub.add(hub["plural"], name="changing", replace=True)
    after = logprobs(server, "changing")
    assert worst(before, live(hub, base, ["antonym"])[0]) < 1e-4
    assert worst(after, live(hub, base, ["plural"])[0]) < 1e-4
    with pytest.raises(RuntimeError, match=r"404.*its adapters have changed"):
        logprobs(server, answer["model"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pasive", r"404.*no adapter 'pasive'.*did you mean 'passive'.*\^~~~~~"),
        ("@nobody", r"404.*no composition 'nobody'"),
        ("0.7*", r"400.*should be an adapter.*\^"),
        ("auto", "400.*retrieval"),
        ("base", "400.*ask for the model by the server's name"),
        ("arrow(passive, negation)", "400.*router 'arrow'"),
        ("dora", "400.*DoRA.*to_lora"),
        ("ties(passive, negation)", r"400.*rank 576 above the server's 32.*above the limit of 0\.001"),
        ("elsewhere", r"400.*'elsewhere' updates 'model\.layers\.\d+\.attention\..*no such layer"),
    ],
)
def test_a_client_hears_why_it_is_refused(server, name, said):
    with pytest.raises(RuntimeError, match=f"(?s){said}"):
        logprobs(server, name)


@pytest.mark.slow
def test_folders_beyond_the_limit_are_made_again(server, hub, base):
    for weight in range(1, 8):
        logprobs(server, f"0.{weight}*plural + 0.2*negation")
    names = FORMULAS[:2]
    for name, live_V in zip(names, live(hub, base, names), strict=True):
        assert worst(logprobs(server, name), live_V) < 1e-4
