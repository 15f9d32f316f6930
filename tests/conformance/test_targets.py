"""What must hold for every export target, one of another package too: whole folders, stated errors, named refusals."""

from dataclasses import replace

import pytest
import torch
from properties import Properties
from transformers import LlamaConfig

import loraweave as lw
from loraweave import registry
from loraweave.errors import AdapterExists, AdapterUnsupported
from loraweave.extensions.engines.export import Target
from loraweave.types import Factors

TARGETS = registry.names("targets")
PROPERTIES = Properties(TARGETS)
SIZES = {"hidden_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
BASE = LlamaConfig(**SIZES, tie_word_embeddings=False)
LANGUAGE = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"]
IMAGES = [f"unet.mid_block.attentions.0.transformer_blocks.0.attn{number}.to_q" for number in (1, 2)]


def adapter(target, ranks=(3, 2)):
    images = "images" in registry.traits_of(registry.get("targets", target))
    layers = {}
    for layer, rank in zip(IMAGES if images else LANGUAGE, ranks, strict=True):
        layers[layer] = Factors(torch.randn(rank, 24), torch.randn(24, rank))
    return lw.Adapter("an adapter", "org/base", layers)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_keeps_all_properties(target, request):
    PROPERTIES.walk(request, target, target=target)


@PROPERTIES.add()
def a_target_is_one(target):
    assert issubclass(registry.get("targets", target), Target)


@PROPERTIES.add()
def an_export_is_exact_and_takes_the_place_of_an_earlier_one(target, tmp_path):
    given = adapter(target)
    for _ in range(2):
        report = given.export(tmp_path / "out", target=target, base=BASE)
        assert (report.target, report.rank, report.relative_error) == (target, 3, 0.0)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert "base_model: org/base" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / registry.get("targets", target).file).is_file()


@PROPERTIES.add()
def an_export_is_read_back_as_it_was(target, tmp_path):
    if "unread" in registry.traits_of(registry.get("targets", target)):
        pytest.skip("this package does not read the layout; its engine does in tests/extensions/engines")
    given = adapter(target)
    again = lw.Adapter.from_pretrained(given.export(tmp_path / "out", target=target, base=BASE).folder)
    assert set(again.layers) == set(given.layers)
    for layer in given.layers:
        torch.testing.assert_close(again.delta(layer), given.delta(layer), rtol=1e-6, atol=1e-6)


@PROPERTIES.add()
def a_cut_is_reported(target, tmp_path):
    given = adapter(target)
    report = given.export(tmp_path / "out", target=target, base=BASE, max_rank=2)
    first, second = given.layers
    sigma = torch.linalg.svdvals(given.delta(first).double())
    assert report.errors[first] == pytest.approx(float(sigma[2] / sigma.norm()), rel=1e-4)
    assert report.errors[second] == 0.0
    assert report.rank == 2


@PROPERTIES.add()
def a_folder_with_other_files_is_left_alone(target, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterExists, match=r"thesis\.txt"):
        adapter(target).export(tmp_path, target=target, base=BASE)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


CHANGES = {
    "a gain": lambda factors: replace(factors, gain_O=torch.ones(24)),
    "no effect": lambda factors: replace(factors, b_OR=torch.zeros_like(factors.b_OR)),
    "infinity": lambda factors: replace(factors, a_RI=torch.full_like(factors.a_RI, torch.inf)),
}


@PROPERTIES.add(change=CHANGES)
def what_no_program_can_compute_is_refused_and_nothing_is_written(target, change, tmp_path):
    given = adapter(target)
    given = replace(given, layers={layer: CHANGES[change](factors) for layer, factors in given.layers.items()})
    with pytest.raises(AdapterUnsupported):
        given.export(tmp_path / "out", target=target, base=BASE)
    assert list(tmp_path.iterdir()) == []
