"""Arrow: prototypes from the factors alone, and peft's own under its name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rounding import assert_near, num_terms

from loraweave.composer.composer import Composer
from loraweave.routers.tokens._saved import router
from loraweave.routers.tokens._scores import power_iteration, top_direction

LAYER = "q"


@pytest.fixture
def pool(random_pool):
    return random_pool(*({LAYER: (rank, 32, 24)} for rank in (4, 2, 6, 1, 3)))


def dense_directions(pool):
    """The top right singular vectors of the dense updates."""
    deltas = [a.layers[LAYER].b_OR.double() @ a.layers[LAYER].a_RI.double() for a in pool.adapters.values()]
    return torch.stack([torch.linalg.svd(delta).Vh[0] for delta in deltas])


def test_weights_are_the_formula_with_the_dense_singular_vectors(pool):
    x_BTI = torch.randn(2, 7, 32)
    found_BTE = router("arrow", pool, top_k=3, temperature=0.7).weights(x_BTI, LAYER)
    scores_BTE = (x_BTI.double() @ dense_directions(pool).T).abs()
    for b in range(2):
        for t in range(7):
            best = scores_BTE[b, t].argsort(descending=True)[:3]
            powers = (scores_BTE[b, t, best] / 0.7).exp()
            expected_E = torch.zeros(5, dtype=torch.float64)
            expected_E[best] = powers / powers.sum()
            assert torch.allclose(found_BTE[b, t].double(), expected_E, atol=1e-5)


def test_the_sign_of_an_input_and_the_scale_of_an_update_do_not_matter(pool):
    layers = [
        {layer: replace(part, b_OR=-3 * part.b_OR) for layer, part in a.layers.items()} for a in pool.adapters.values()
    ]
    scaled = [replace(a, layers=own) for a, own in zip(pool.adapters.values(), layers, strict=True)]
    x_BTI = torch.randn(1, 9, 32)
    expected = router("arrow", pool).weights(x_BTI, LAYER)
    assert torch.allclose(router("arrow", scaled).weights(-x_BTI, LAYER), expected, atol=1e-5)


def test_of_one_expert_a_token_it_is_the_largest_projection(pool):
    x_BTI = torch.randn(1, 20, 32)
    w_BTE = router("arrow", pool, top_k=1).weights(x_BTI, LAYER)
    best_BT = (x_BTI.double() @ dense_directions(pool).T).abs().argmax(dim=-1)
    assert torch.equal(w_BTE, torch.nn.functional.one_hot(best_BT, 5).float())


def test_ten_times_the_input_is_a_tenth_of_the_temperature_unless_inputs_are_made_unit(pool):
    x_BTI = torch.randn(1, 5, 32)
    long = router("arrow", pool).weights(10 * x_BTI, LAYER)
    assert torch.allclose(long, router("arrow", pool, temperature=0.1).weights(x_BTI, LAYER), atol=1e-5)
    unit = router("arrow", pool, input_norm="unit", temperature=0.1)
    assert torch.allclose(unit.weights(10 * x_BTI, LAYER), unit.weights(x_BTI, LAYER), atol=1e-5)
    scores = unit.scores(x_BTI, LAYER)
    expected = (x_BTI.double() @ dense_directions(pool).T).abs() / x_BTI.double().norm(dim=-1, keepdim=True)
    assert torch.allclose(scores.double(), expected, atol=1e-5)
    assert bool(torch.isfinite(unit.weights(torch.zeros(1, 1, 32), LAYER)).all())


def test_power_iteration_converges_to_the_exact_direction_where_values_are_apart():
    draw = torch.Generator().manual_seed(2)
    u, _ = torch.linalg.qr(torch.randn(24, 3, generator=draw))
    v, _ = torch.linalg.qr(torch.randn(32, 3, generator=draw))
    start_I = torch.randn(32, generator=draw)
    apart, tied = torch.tensor([3.0, 1.0, 0.5]), torch.tensor([1.001, 1.0, 0.5])
    close = [
        power_iteration((s[:, None] * v.T).float(), u, start_I, 15) @ top_direction(v.T * s[:, None], u)
        for s in (apart, tied)
    ]
    assert abs(float(close[0])) == pytest.approx(1.0, abs=1e-5)
    assert abs(float(close[1])) < 0.999


@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
def test_the_named_mode_is_the_installed_peft(make_model, make_adapter, tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.arrow import create_arrow_model

    targets = ("q_proj", "down_proj")
    adapters = [make_adapter(make_model("llama"), f"e{n}", rank=3, targets=targets, seed=n) for n in range(4)]
    folders = [str(a.save_pretrained(tmp_path / a.name)) for a in adapters]
    config = peft.ArrowConfig(top_k=3, router_temperature=0.6, rng_seed=5)
    ids_BT = torch.tensor([[5, 9, 11, 2, 30], [7, 8, 3, 30, 1]])
    with torch.no_grad():
        expected = create_arrow_model(make_model("llama"), folders, config).eval()(ids_BT).logits
        model = make_model("llama")
        settings = {"top_k": 3, "temperature": 0.6}
        with Composer(model, adapters).activate(router("arrow", adapters, direction="power_iteration", seed=5, **settings)):
            assert_near(model(ids_BT).logits, expected, num_terms(model))
        with Composer(model, adapters).activate(router("arrow", adapters, **settings)):
            assert not torch.allclose(model(ids_BT).logits, expected, atol=1e-5)
