from __future__ import annotations

import pytest
import torch
from torch import nn

from loraweave.hub.base import NUM_TENSORS, SAMPLES_PER_TENSOR, fingerprint


def model(vocabulary=61, seed=0, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **{**settings, **changes}))


BASE = fingerprint(model())


def test_the_same_checkpoint_has_the_same_fingerprint():
    assert fingerprint(model()) == BASE


def test_a_figure_is_taken_from_each_of_several_matrices():
    assert 0 < len(BASE.samples) <= NUM_TENSORS * SAMPLES_PER_TENSOR
    assert len(BASE.samples) % SAMPLES_PER_TENSOR == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_loaded_in_bf16_or_float64_it_is_the_same_to_the_bit(dtype):
    assert fingerprint(model().to(dtype)) == BASE


def test_loaded_in_fp16_it_does_not_differ():
    assert BASE.differs(fingerprint(model().to(torch.float16))) == ""


def test_a_copy_saved_and_loaded_does_not_differ(tmp_path):
    from transformers import AutoModelForCausalLM

    model().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)) == BASE


def test_a_fine_tuned_copy_differs_by_sampled_weights():
    tuned = model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    found = fingerprint(tuned)
    assert found.shapes == BASE.shapes
    assert "sampled weights differ" in BASE.differs(found)


def test_another_seed_differs():
    assert "sampled weights differ" in BASE.differs(fingerprint(model(seed=1)))


@pytest.mark.parametrize(
    "changes", [{"vocabulary": 62}, {"hidden_size": 24}, {"num_hidden_layers": 3}, {"tie_word_embeddings": True}]
)
def test_another_vocabulary_size_or_depth_differs_by_shapes(changes):
    assert "parameter names and shapes" in BASE.differs(fingerprint(model(**changes)))


def test_buffers_modes_and_gradients_do_not_enter():
    same = model().train()
    same.register_buffer("extra", torch.ones(3))
    for parameter in same.parameters():
        parameter.requires_grad_(False)
    assert fingerprint(same) == BASE


def test_weights_on_the_meta_device_give_the_shapes_alone():
    with torch.device("meta"):
        empty = model()
    assert fingerprint(empty).shapes == BASE.shapes
    assert fingerprint(empty).samples == ()
    assert BASE.differs(fingerprint(empty)) == ""


def test_integer_weights_give_the_shapes_alone():
    quantised = nn.Module()
    quantised.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.int8), requires_grad=False)
    assert fingerprint(quantised).samples == ()


def test_a_model_without_matrices_has_a_fingerprint():
    assert fingerprint(nn.LayerNorm(7)).samples == ()


def test_a_matrix_smaller_than_the_number_of_samples_is_sampled_again_and_again():
    assert len(fingerprint(nn.Linear(1, 1)).samples) == SAMPLES_PER_TENSOR


def test_weights_that_are_not_contiguous_give_the_same_figures():
    plain = nn.Linear(5, 3)
    turned = nn.Linear(5, 3)
    turned.weight = nn.Parameter(plain.weight.detach().T.contiguous().T)
    assert fingerprint(turned) == fingerprint(plain)
