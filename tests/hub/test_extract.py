"""LoRAs from full fine-tunes: what was planted comes out, the rest is named, and the error is the one on the card."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch
from loraweave.hub.conversion import extract
from loraweave.lowrank import algebra


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(13, 7)
        self.up = nn.Linear(7, 11)
        self.norm = nn.LayerNorm(11)
        self.down = Conv1D(5, 11)
        self.register_buffer("steps", torch.zeros(3))


@pytest.fixture
def base():
    return Base()


def tuned(base, **changes):
    """A copy whose parameters differ by the given tensors; a dot in a name is written as two underscores."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_parameter(name.replace("__", ".")).add_(change)
    return model


def low_rank(num_out, num_in, rank, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_out, rank, generator=generator) @ torch.randn(rank, num_in, generator=generator)


def test_a_planted_low_rank_change_comes_out_with_its_rank(base):
    up, down, bias = low_rank(11, 7, 2), low_rank(11, 5, 3), torch.randn(11)
    adapter = extract(base, tuned(base, up__weight=up, down__weight=down, up__bias=bias), max_error=1e-4)
    assert {name: part.rank for name, part in adapter.layers.items()} == {"up": 2, "down": 3}
    torch.testing.assert_close(adapter.delta("up"), up, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapter.delta("down"), down.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(adapter.layers["up"].bias_O, bias, atol=1e-6, rtol=1e-5)


def test_with_a_rank_alone_the_best_of_that_rank_is_taken_and_its_error_reported(base):
    change = torch.randn(11, 7)
    adapter = extract(base, tuned(base, up__weight=change), rank=3)
    u, sigma, vh = torch.linalg.svd(change.double())
    wanted = (u[:, :3] * sigma[:3]) @ vh[:3]
    torch.testing.assert_close(adapter.delta("up").double(), wanted, atol=1e-5, rtol=1e-4)
    note = adapter.card["conversion"]["up"]
    assert note["rank"] == 3
    assert note["relative_error"] == pytest.approx(float((sigma[3:].square().sum() / sigma.square().sum()).sqrt()), abs=1e-5)


def test_an_error_bound_gives_the_smallest_rank_within_it(base):
    change = torch.randn(11, 7)
    adapter = extract(base, tuned(base, up__weight=change), max_error=0.5)
    sigma = torch.linalg.svdvals(change.double()).square()
    tails = [float((sigma[rank:].sum() / sigma.sum()).sqrt()) for rank in range(8)]
    assert adapter.rank == next(rank for rank, tail in enumerate(tails) if tail <= 0.5)


def test_a_rank_and_an_error_that_contradict_are_both_named(base):
    with pytest.raises(AdapterUnsupported, match=r"'up': rank 1 leaves.*max_error=0\.1"):
        extract(base, tuned(base, up__weight=torch.randn(11, 7)), rank=1, max_error=0.1)


def test_changes_outside_the_linear_layers_are_named(base):
    other = tuned(base, up__weight=low_rank(11, 7, 1), norm__weight=1.0, emb__weight=0.5)
    with pytest.raises(AdapterUnsupported, match=r"2 parameters outside the linear layers.*emb\.weight, norm\.weight"):
        extract(base, other)


def test_changes_outside_can_go_to_the_card_or_become_heads(base):
    other = tuned(base, up__weight=low_rank(11, 7, 1), norm__weight=0.1)
    on_card = extract(base, other, others="card")
    assert on_card.card["not_extracted"] == {"norm.weight": pytest.approx(0.1)}
    assert not on_card.heads
    stored = extract(base, other, others="heads")
    assert torch.equal(stored.heads["norm.weight"], other.norm.weight.detach())


def test_layers_restrict_what_is_taken(base):
    other = tuned(base, up__weight=low_rank(11, 7, 1), down__weight=low_rank(11, 5, 1))
    with pytest.raises(AdapterUnsupported, match=r"outside the layers \['down'\].*up\.weight"):
        extract(base, other, layers=["down"])
    assert set(extract(base, other, layers=["down"], others="card").layers) == {"down"}
    with pytest.raises(LayerMismatch, match="'sideways'"):
        extract(base, other, layers=["sideways"])


def test_a_bias_alone_is_an_update_of_rank_zero(base):
    adapter = extract(base, tuned(base, up__bias=torch.ones(11)))
    assert adapter.layers["up"].rank == 0
    assert adapter.layers["up"].a_RI.shape == (0, 7)
    torch.testing.assert_close(adapter.layers["up"].bias_O, torch.ones(11))


def test_equal_models_have_nothing_to_extract(base):
    with pytest.raises(AdapterUnsupported, match="no parameter differs"):
        extract(base, copy.deepcopy(base))


def test_a_folder_and_a_state_dict_give_what_the_model_gives(base, tmp_path):
    other = tuned(base, up__weight=low_rank(11, 7, 2), down__bias=torch.randn(5))
    save_file(other.state_dict(), tmp_path / "model.safetensors")
    wanted = extract(base, other).hash
    assert extract(base, tmp_path).hash == wanted
    assert extract(base, other.state_dict()).hash == wanted


def test_progress_is_told_after_every_parameter(base):
    seen = []
    extract(base, tuned(base, up__bias=1.0), progress=lambda *step: seen.append(step))
    assert [step[:2] for step in seen] == [(number, 7) for number in range(1, 8)]
    assert {step[2] for step in seen} == {name for name, _ in base.named_parameters()}


def test_half_precision_models_are_compared_exactly(base):
    half = base.to(torch.bfloat16)
    other = tuned(half, up__weight=low_rank(11, 7, 7).to(torch.bfloat16))
    adapter = extract(half, other, max_error=0.0)
    wanted = other.up.weight.double() - half.up.weight.double()
    torch.testing.assert_close(adapter.delta("up").double(), wanted.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda state: {key: value for key, value in state.items() if key != "up.bias"},
            LayerMismatch,
            "lacks 1.*'up.bias'",
        ),
        (lambda state: {**state, "extra.weight": torch.ones(2)}, LayerMismatch, "'extra.weight'"),
        (lambda state: {**state, "emb.weight": torch.ones(14, 7)}, LayerMismatch, r"\(13, 7\).*\(14, 7\)"),
        (lambda state: {**state, "up.bias": torch.full((11,), torch.nan)}, AdapterCorrupt, "'up.bias': 11 of 11"),
        (
            lambda state: {**state, "up.bias": torch.ones(11, dtype=torch.int8)},
            AdapterUnsupported,
            "tuned model is torch.int8",
        ),
    ],
)
def test_what_does_not_fit_the_base_is_refused_by_name(base, change, error, words):
    with pytest.raises(error, match=words):
        extract(base, change(base.state_dict()))


def test_a_folder_without_weights_is_refused(base, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(AdapterCorrupt, match=r"notes\.txt"):
        extract(base, tmp_path)


def test_a_head_that_shares_its_weight_with_the_embedding_is_no_linear_layer_of_its_own(make_model):
    base = make_model("llama", tie_word_embeddings=True)
    other = copy.deepcopy(base)
    other.tie_weights()
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += low_rank(24, 16, 2)
        other.lm_head.weight += 0.1
    with pytest.raises(AdapterUnsupported, match=r"1 parameters outside.*embed_tokens"):
        extract(base, other)
    adapter = extract(base, other, others="heads")
    assert set(adapter.heads) == {"model.embed_tokens.weight"}
    assert {name: part.rank for name, part in adapter.layers.items()} == {"model.layers.1.mlp.up_proj": 2}


def test_the_extracted_adapter_turns_the_base_into_the_fine_tune(base):
    other = tuned(base, up__weight=torch.randn(11, 7), up__bias=torch.randn(11), down__weight=torch.randn(11, 5))
    adapter = extract(base, other, max_error=0.0)
    for name in ("up", "down"):
        layer, wanted = base.get_submodule(name), other.get_submodule(name)
        dense = algebra.delta(adapter.layers[name])
        torch.testing.assert_close(
            layer.weight + (dense.T if name == "down" else dense), wanted.weight, atol=1e-6, rtol=1e-5
        )


def test_lte_s_heads_come_out_as_one_lora_whether_they_were_merged_once_or_twice(base):
    """LTE as released (github.com/minyoungg/LTE) adds the mean over heads of s (B A - B' A'), B' A' merged before."""
    heads, scale = 3, 4096 / 32
    torch.manual_seed(1)
    first, last = ([(0.01 * torch.randn(11, 1), 0.1 * torch.randn(1, 7)) for _ in range(heads)] for _ in range(2))

    def mean(found):
        return scale * sum(b @ a for b, a in found) / heads

    other = tuned(base, up__weight=mean(first))
    with torch.no_grad():
        other.up.weight += mean(last) - mean(first)
    adapter = extract(base, other, max_error=1e-4)
    assert adapter.layers["up"].rank == heads
    torch.testing.assert_close(adapter.delta("up"), mean(last), atol=1e-5, rtol=1e-4)
