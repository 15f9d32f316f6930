"""llama.cpp computes what the live mixture says, for every architecture that is exported; what it cannot hold is refused."""

from dataclasses import replace
from pathlib import Path

import engines
import gguf
import gguf_models
import pytest
import torch
from exported_mixtures import FAMILIES, MIXTURES, pool_mixture, tiny_mixture
from transformers import GPT2Config, LlamaConfig, MixtralConfig

import loraweave as lw
from loraweave.errors import AdapterUnsupported, BaseModelMismatch
from loraweave.extensions.engines.targets.gguf import ARCHITECTURES
from loraweave.types import Factors

SCRIPT = Path(__file__).parents[2] / "engine_scripts" / "llama_cpp.py"
SIZES = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
TIED, UNTIED = (LlamaConfig(**SIZES, tie_word_embeddings=tied) for tied in (True, False))
CASES = [*sorted(FAMILIES | MIXTURES), "llama, embeddings too"]


def ask(jobs):
    return [[torch.tensor(each) for each in job] for job in engines.run("here", SCRIPT, jobs, timeout=500)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: (mixture, llama.cpp's log-probabilities without the adapter, with it)}; one process runs them all."""
    folder = tmp_path_factory.mktemp("gguf")
    mixtures, jobs = {}, []
    for case in CASES:
        family, _, more = case.partition(", ")
        mixture = mixtures[case] = tiny_mixture(family, everywhere=bool(more))
        base = folder / f"{case}.gguf"
        gguf_models.write_model(base, mixture.model, ARCHITECTURES[family])
        report = mixture.merged.export(folder / case, target="gguf", base=mixture.model)
        requests = [[prompt, [strength]] for strength in (0.0, 1.0) for prompt in mixture.prompts]
        adapters = [str(report.folder / "adapter.gguf")]
        jobs.append({"model": str(base), "adapters": adapters, "vocabulary": 64, "requests": requests})
    count = len(tiny_mixture("llama").prompts)
    return {case: (mixtures[case], said[:count], said[count:]) for case, said in zip(CASES, ask(jobs), strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_llama_cpp_computes_the_live_mixture(answers, case):
    mixture, base, said = answers[case]
    for ours, theirs in zip(mixture.base(), base, strict=True):
        # the base is converted as llama.cpp converts it
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-3)
    for ours, theirs, without in zip(mixture.live(), said, base, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)
        assert theirs.argmax() == ours.argmax()
        # it was applied, and is no small matter
        assert (theirs - without).abs().max() > 0.3


@pytest.mark.slow
def test_llama_cpp_computes_the_live_mixture_of_the_pool_on_the_real_base(tmp_path):
    mixture = pool_mixture()
    gguf_models.write_embedded(tmp_path / "base.gguf")
    report = mixture.merged.export(tmp_path / "out", target="gguf")
    requests = [[prompt, [strength]] for strength in (0.0, 1.0) for prompt in mixture.prompts]
    adapters, size = [str(report.folder / "adapter.gguf")], mixture.model.config.vocab_size
    job = {"model": str(tmp_path / "base.gguf"), "adapters": adapters, "vocabulary": size, "requests": requests}
    [said] = ask([job])
    for ours, theirs, without in zip(mixture.live(), said[2:], said[:2], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-2)
        assert theirs.argmax() == ours.argmax()
        assert (theirs - without).abs().max() > 0.3


def test_every_architecture_that_is_exported_is_run():
    assert set(FAMILIES | MIXTURES) == set(ARCHITECTURES)


REFUSED = {
    "another architecture": (lambda given: given, GPT2Config(), "of type 'gpt2', whose tensors.*convert_lora_to_gguf"),
    "a tied head": (
        lambda given: with_layer(given, "lm_head"),
        TIED,
        "'lm_head'.*embeddings that the base.*ties",
    ),
    "a tied embedding": (lambda given: with_layer(given, "model.embed_tokens", "embedding"), TIED, "embed_tokens.*ties"),
    "a layer of another model": (
        lambda given: with_layer(given, "transformer.h.0.attn"),
        UNTIED,
        "not a tensor of llama",
    ),
    "heads of another size": (
        lambda given: with_layer(given, "model.layers.0.self_attn.k_proj"),
        UNTIED,
        "k_proj' .* has 6 outputs, but the base model has 2 heads of 16",
    ),
    "an expert beyond the last": (
        lambda given: with_layer(given, "model.layers.0.mlp.experts.down_proj.8", "expert"),
        MixtralConfig(**SIZES, num_local_experts=8),
        "updates expert 8 of 'model.layers.0.mlp.experts.down_proj', and the base model has 8",
    ),
    "a convolution": (
        lambda given: with_layer(given, "model.layers.0.mlp.up_proj", "conv"),
        UNTIED,
        "is a convolution",
    ),
    "a head": (
        lambda given: replace(given, heads={"lm_head.weight": torch.ones(2, 2)}),
        UNTIED,
        "loads no trained",
    ),
}


def with_layer(given, layer, kind="linear"):
    return replace(given, layers={layer: Factors(torch.ones(2, 6), torch.ones(6, 2), kind=kind)})


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_is_written(case, tmp_path):
    change, base, message = REFUSED[case]
    given = change(lw.Adapter("a", "org/base", {"model.layers.0.mlp.up_proj": Factors(torch.ones(2, 6), torch.ones(6, 2))}))
    with pytest.raises(AdapterUnsupported, match=message):
        given.export(tmp_path / "out", target="gguf", base=base)
    assert list(tmp_path.iterdir()) == []


def test_a_base_whose_architecture_is_not_known_is_asked_for(tmp_path):
    given = lw.Adapter("a", str(tmp_path / "missing"), {"q_proj": Factors(torch.ones(2, 6), torch.ones(6, 2))})
    with pytest.raises(BaseModelMismatch, match=r"architecture of the base model .*missing.* give base="):
        given.export(tmp_path / "out", target="gguf")


def test_the_file_names_its_base_and_its_license_and_the_modelfile_names_the_merged_base(tmp_path):
    mixture = tiny_mixture("llama")
    given = replace(mixture.merged, card={"license": "mit"}, base_model="org/base")
    report = given.export(tmp_path / "out", target="gguf", base=mixture.model)
    fields = gguf.GGUFReader(report.folder / "adapter.gguf").fields
    said = {name: fields[name].contents() for name in fields if name.startswith(("general.", "adapter."))}
    assert said["general.type"] == "adapter"
    assert (said["adapter.type"], said["adapter.lora.alpha"]) == ("lora", 5.0)
    assert (said["general.base_model.0.name"], said["general.license"]) == ("org/base", "MIT")
    lines = (report.folder / "Modelfile").read_text().splitlines()
    # from 0.34.1 on Ollama refuses every Modelfile with ADAPTER
    assert lines[1:] == ["FROM ./merged.gguf"]
    merging = f"llama-export-lora -m BASE.gguf --lora {report.folder}/adapter.gguf -o {report.folder}/merged.gguf"
    assert merging in str(report)
    assert f"ollama create NAME -f {report.folder}/Modelfile" in str(report)
    assert (report.folder / "adapter.gguf").is_file()
