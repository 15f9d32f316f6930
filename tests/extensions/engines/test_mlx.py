"""mlx-lm computes what the live mixture says, for every model type that is exported, and this package reads it back."""

import json
from pathlib import Path

import engines
import pytest
import torch
from exported_mixtures import FAMILIES, MIXTURES, tiny_mixture
from transformers import GPT2Config

import loraweave as lw
from loraweave.errors import AdapterUnsupported
from loraweave.extensions.engines.targets.mlx import EXPERTS, SAME_NAMES

SCRIPT = Path(__file__).parents[2] / "engine_scripts" / "mlx_lm_answers.py"
CASES = [*sorted(FAMILIES | MIXTURES), "llama, embeddings too"]


def save(model, folder):
    """A folder with the names of settings from before transformers 5, which some of mlx-lm's models read alone."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    rotary = config["rope_parameters"]
    old = {name: rotary[name] for name in ("rope_theta", "partial_rotary_factor") if name in rotary}
    old |= {"num_experts": config["num_local_experts"]} if "num_local_experts" in config else {}
    (folder / "config.json").write_text(json.dumps({**config, **old}))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """{case: (mixture, mlx-lm's log-probabilities without the adapter, with it)}; one process runs them all."""
    folder = tmp_path_factory.mktemp("mlx")
    mixtures, jobs = {}, []
    for case in CASES:
        family, _, more = case.partition(", ")
        # mlx-lm's mixtral has heads of hidden size / number of heads
        sizes = {"head_dim": 16} if family == "mixtral" else {}
        mixture = mixtures[case] = tiny_mixture(family, everywhere=bool(more), **sizes)
        save(mixture.model, folder / case)
        report = mixture.merged.export(folder / f"{case} adapter", target="mlx", base=folder / case)
        asked = {"model": str(folder / case), "prompts": mixture.prompts}
        jobs += [{**asked, "adapter": None}, {**asked, "adapter": str(report.folder)}]
    said = [[torch.tensor(each) for each in job] for job in engines.run("mlx", SCRIPT, jobs)]
    return {case: (mixtures[case], said[2 * number], said[2 * number + 1]) for number, case in enumerate(CASES)}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_computes_the_live_mixture(answers, case):
    mixture, base, said = answers[case]
    for ours, theirs in zip(mixture.base(), base, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
    for ours, theirs, without in zip(mixture.live(), said, base, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
        assert (theirs - without).abs().max() > 0.3


def test_every_model_type_that_is_exported_is_run():
    assert (set(FAMILIES), set(MIXTURES)) == (set(SAME_NAMES), set(EXPERTS))


def test_the_folder_is_read_back_as_it_was(tmp_path):
    mixture = tiny_mixture("qwen3")
    merged = mixture.merged
    report = merged.export(tmp_path / "out", target="mlx", base=mixture.model)
    again = lw.Adapter.from_pretrained(report.folder)
    assert set(again.layers) == set(merged.layers)
    for layer in merged.layers:
        torch.testing.assert_close(again.delta(layer), merged.delta(layer), rtol=1e-6, atol=1e-7)
    config = json.loads((report.folder / "adapter_config.json").read_text())
    assert config["lora_parameters"] == {"rank": 5, "scale": 1.0, "dropout": 0.0, "keys": sorted(merged.layers)}
    assert config["num_layers"] == 2


def test_another_model_type_is_refused_by_name(tmp_path):
    merged = tiny_mixture("llama").merged
    with pytest.raises(AdapterUnsupported, match="of type 'gpt2', whose modules mlx-lm may name otherwise"):
        merged.export(tmp_path / "out", target="mlx", base=GPT2Config())
    assert list(tmp_path.iterdir()) == []
