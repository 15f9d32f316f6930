"""OpenVINO GenAI says the texts of the live mixture; what it would not apply, or twice, is refused."""

from dataclasses import replace
from pathlib import Path

import engines
import pytest
import torch
from exported_mixtures import tiny_mixture

import loraweave as lw
from loraweave.errors import AdapterUnsupported
from loraweave.types import Factors

SCRIPT = Path(__file__).parents[2] / "engine_scripts" / "openvino_texts.py"
# optimum exports no gemma2 by a transformers above 5.0
CASES = ["llama", "qwen2", "qwen3"]
TEXTS = ["The capital of France is", "one two three"]
TOKENS = 12


def texts(mixture, tokenizer):
    """Greedy continuations by the model as it is."""
    found = []
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = mixture.model.generate(ids, max_new_tokens=TOKENS, do_sample=False)
        found.append(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
    return found


@pytest.mark.slow
def test_openvino_says_the_texts_of_the_live_mixture(tmp_path):
    # one test for all, so that one process exports and runs all of them
    tokenizer = lw.load_base()[1]
    mixtures, jobs = {}, []
    for case in CASES:
        mixture = mixtures[case] = tiny_mixture(case, vocab_size=len(tokenizer))
        mixture.model.generation_config.eos_token_id = None
        mixture.model.save_pretrained(tmp_path / case)
        tokenizer.save_pretrained(tmp_path / case)
        report = mixture.merged.export(tmp_path / f"{case} adapter", target="openvino")
        weights = str(report.folder / "adapter_model.safetensors")
        jobs.append({"model": str(tmp_path / case), "adapter": weights, "prompts": TEXTS, "tokens": TOKENS})
    said = engines.run("openvino", SCRIPT, jobs, timeout=500)
    for (case, mixture), (base, mixed) in zip(mixtures.items(), said, strict=True):
        assert (case, base) == (case, texts(mixture, tokenizer))
        with lw.Composer(mixture.model, lw.ExpertPool(mixture.adapters)).activate(mixture.weights):
            assert (case, mixed) == (case, texts(mixture, tokenizer))
        assert all(one != other for one, other in zip(base, mixed, strict=True))


def given(**layers):
    factors = {layer: Factors(torch.ones(2, 6), torch.ones(6, 2)) for layer in layers}
    return lw.Adapter("a", "org/base", factors)


def test_a_name_inside_a_name_is_refused(tmp_path):
    adapter = given(**{"mlp.gate": 1, "mlp.gate_proj": 1})
    with pytest.raises(AdapterUnsupported, match=r"'mlp.gate' of adapter 'a' has a name that is part of 'mlp.gate_proj'"):
        adapter.export(tmp_path / "out", target="openvino")
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_which_openvino_passes_over_is_refused(tmp_path):
    adapter = given(embed_tokens=1)
    adapter = replace(adapter, layers={"embed_tokens": replace(adapter.layers["embed_tokens"], kind="embedding")})
    with pytest.raises(AdapterUnsupported, match="is an embedding, which OpenVINO GenAI has no LoRA for"):
        adapter.export(tmp_path / "out", target="openvino")
