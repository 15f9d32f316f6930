"""mergekit's files, against its formula written out in float64, one dense update after the other."""

from __future__ import annotations

import pytest
import torch
from tiny_models import random_factors

from loraweave.errors import WeightingError
from loraweave.extensions.methods.merge_files import KIN, METHODS, OTHER_METHODS, Recipe, read
from loraweave.hub.adapter import Adapter
from loraweave.lowrank import algebra

LAYER = "model.layer"


@pytest.fixture(scope="module")
def adapters():
    draw = torch.Generator().manual_seed(0)
    ranks = {"x": 2, "y": 3, "z": 1}
    factors = {n: random_factors(draw, r, 7, 11, bias_O=torch.randn(7, generator=draw)) for n, r in ranks.items()}
    return {name: Adapter(name, "org/base", {LAYER: update}) for name, update in factors.items()}


def merged(tmp_path, adapters, said):
    layer = read(tmp_path / "recipe.yaml", said).merge(lambda name: adapters[name], seed=3, progress=False).layers[LAYER]
    return algebra.delta(layer).double(), layer.bias_O.double()


def magnitude(delta, density, extra):
    kept = delta.abs().flatten().argsort(descending=True)[: int(density * delta.numel())]
    return torch.zeros_like(delta.flatten()).index_fill(0, kept, 1.0).view_as(delta)


def outliers(delta, density, gamma):
    size = delta.numel()
    top, target = int(gamma * size), int(density * size)
    bottom = size - target - top
    top, bottom = (top + bottom, 0) if bottom < 0 else (top, bottom)
    kept = delta.abs().flatten().argsort()[bottom : size - top]
    return torch.zeros_like(delta.flatten()).index_fill(0, kept, 1.0).view_as(delta)


def by_formula(deltas, weights, masks, *, elects, normalize, rescale, scale):
    """What `GTATask.execute` and `rescaled_masked_tensor` of mergekit 0.1.5 calculate."""
    left = [delta * mask for delta, mask in zip(deltas, masks, strict=True)]
    if rescale:
        left = [tau * delta.abs().sum() / tau.abs().sum() for tau, delta in zip(left, deltas, strict=True)]
    weighted = torch.stack([weight * tau for weight, tau in zip(weights, left, strict=True)])
    w_E11 = torch.tensor(weights).view(-1, *[1] * deltas[0].dim())
    if elects:
        agrees = weighted.sign() == torch.where(weighted.sum(dim=0) >= 0, 1.0, -1.0)
        total, divisor = (weighted * agrees).sum(dim=0), (w_E11 * agrees).sum(dim=0)
    else:
        total, divisor = weighted.sum(dim=0), w_E11.sum(dim=0).expand_as(weighted[0])
    return scale * (total / torch.where(divisor == 0, 1.0, divisor) if normalize else total)


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "task_arithmetic"])
@pytest.mark.parametrize("rules", [{}, {"normalize": True, "lambda": 0.7}, {"normalize": False, "rescale": True}])
def test_methods_without_chance_are_mergekits_formula_with_each_adapters_own_parameters(tmp_path, adapters, method, rules):
    kin, weights = KIN[method], [0.7, -0.2, 1.1]
    own = (
        {"x": {"density": 0.5}, "y": {"density": 0.31}, "z": {}}
        if kin.thinning != "nothing"
        else {name: {} for name in "xyz"}
    )
    if kin.extra:
        own = {**own, "z": {"gamma": 0.1}}
    models = [
        {"model": f"org/base+{name}", "parameters": {"weight": weight, **own[name]}}
        for name, weight in zip("xyz", weights, strict=True)
    ]
    said = {"merge_method": method, "base_model": "org/base", "models": [{"model": "org/base"}, *models]}
    shared = {"density": 0.9} if kin.thinning != "nothing" else {}
    found = merged(tmp_path, adapters, {**said, "parameters": {**shared, **rules}})
    for place, part in enumerate(("delta", "bias")):
        deltas = [
            (algebra.delta(each.layers[LAYER]) if part == "delta" else each.layers[LAYER].bias_O).double()
            for each in adapters.values()
        ]
        thin = {"magnitude": magnitude, "outliers": outliers}.get(kin.thinning)
        masks = [
            torch.ones_like(delta)
            if thin is None
            else thin(delta, own[name].get("density", 0.9), own[name].get("gamma", 0.01))
            for name, delta in zip("xyz", deltas, strict=True)
        ]
        rescale = rules.get("rescale", kin.rescale)
        normalize = rules.get("normalize", kin.normalize)
        settings = {"elects": kin.elects, "normalize": normalize, "rescale": rescale, "scale": rules.get("lambda", 1.0)}
        torch.testing.assert_close(found[place], by_formula(deltas, weights, masks, **settings), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_methods_that_draw_keep_the_norm_of_each_update_and_drop_their_share(tmp_path, adapters, method):
    one = {
        "merge_method": method,
        "base_model": "b",
        "models": [{"model": "x", "parameters": {"weight": 1.0, "density": 0.6}}],
    }
    found, _ = merged(tmp_path, adapters, one)
    delta = algebra.delta(adapters["x"].layers[LAYER]).double()
    kept = found.abs() > 1e-5
    assert float(found.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-4)
    # what is left is multiplied by one number, and 77 entries kept with 0.6 are 46 +- 3 standard deviations of 4.3
    ratio = found[kept] / delta[kept]
    assert torch.allclose(ratio, ratio[0].expand_as(ratio), rtol=1e-3)
    assert 33 <= int(kept.sum()) <= 59
    whole = {**one, "models": [{"model": name, "parameters": {"weight": 0.5}} for name in "xy"]}
    if "ties" not in method and method != "della":
        both = sum(0.5 * algebra.delta(adapters[name].layers[LAYER]).double() for name in "xy")
        torch.testing.assert_close(merged(tmp_path, adapters, whole)[0], both, atol=1e-5, rtol=1e-4)


def test_linear_is_the_mean_of_models_the_base_among_them(tmp_path, adapters):
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("x", 1.0), ("y", 2.0), ("base", 1.0))]
    found, bias = merged(tmp_path, adapters, {"merge_method": "linear", "base_model": "base", "models": models})
    x, y = (adapters[name].layers[LAYER] for name in "xy")
    torch.testing.assert_close(found, (algebra.delta(x) + 2 * algebra.delta(y)).double() / 4, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(bias, (x.bias_O + 2 * y.bias_O).double() / 4)


def test_nuslerp_turns_updates_on_their_great_circle(tmp_path, adapters):
    models = [{"model": name, "parameters": {"weight": weight}} for name, weight in (("x", 1.0), ("y", 3.0))]
    said = {"merge_method": "nuslerp", "base_model": "base", "models": models}
    x, y = (algebra.delta(adapters[name].layers[LAYER]).double() for name in "xy")
    angle = torch.acos((x * y).sum() / x.norm() / y.norm())
    expected = (torch.sin(0.25 * angle) * x + torch.sin(0.75 * angle) * y) / torch.sin(angle)
    torch.testing.assert_close(merged(tmp_path, adapters, said)[0], expected, atol=1e-5, rtol=1e-4)
    rows = torch.acos((x * y).sum(dim=1, keepdim=True) / x.norm(dim=1, keepdim=True) / y.norm(dim=1, keepdim=True))
    expected = (torch.sin(0.25 * rows) * x + torch.sin(0.75 * rows) * y) / torch.sin(rows)
    by_row = {**said, "parameters": {"nuslerp_flatten": False}}
    torch.testing.assert_close(merged(tmp_path, adapters, by_row)[0], expected, atol=1e-5, rtol=1e-4)


def model(**parameters):
    return {
        "merge_method": "ties",
        "base_model": "b",
        "models": [{"model": "x", "parameters": {"weight": 1.0, **parameters}}],
    }


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({**model(), "slices": []}, "has 'slices', which puts a model together of layers"),
        ({**model(), "tokenizer_source": "union"}, "chooses a tokenizer"),
        ({**model(), "densify": True}, "has no key 'densify'"),
        ({**model(), "merge_method": "slerp"}, "'slerp' works on whole weights"),
        ({**model(), "merge_method": "tie"}, "did you mean 'ties'"),
        ({**model(), "dtype": "int8"}, "dtype 'int8'"),
        (model(density=[0.1, 0.9]), "changes over the layers"),
        (model(weight=[{"filter": "mlp", "value": 0.5}, {"value": 1}]), "changes over the layers"),
        (model(gamma=0.1), "has no parameter 'gamma'"),
        (model(density=0.0), "density is 0"),
        (model(weight="0.5"), "weight is '0.5'; it is a number"),
        ({**model(), "parameters": {"normalise": True}}, "did you mean 'normalize'"),
        ({**model(), "merge_method": "della", "parameters": {"density": 0.9}}, "epsilon less than its distance"),
        ({key: value for key, value in model().items() if key != "base_model"}, "has no base_model"),
        ({**model(), "models": [{"model": "b+x"}]}, "has no 'weight'"),
        (
            {**model(), "models": [{"model": "c+x", "parameters": {"weight": 1}}]},
            "is an adapter of 'c', and base_model is 'b'",
        ),
        ({**model(), "merge_method": "linear", "parameters": {"normalize": False, "weight": 2.0}}, None),
    ],
)
def test_what_means_something_else_for_adapters_is_refused_by_name(tmp_path, adapters, said, message):
    if message is None:
        said["models"][0]["parameters"], message = {}, "multiplies the base model by 2"
    with pytest.raises(WeightingError, match=message):
        merged(tmp_path, adapters, said)


def test_each_method_of_mergekit_is_read_or_refused_with_a_reason():
    listed = "linear slerp nuslerp passthrough model_stock arcee_fusion karcher task_arithmetic ties dare_ties dare_linear"
    listed += " breadcrumbs breadcrumbs_ties della della_linear multislerp nearswap ram sce"
    assert {*METHODS, *OTHER_METHODS} == set(listed.split())
    assert isinstance(Recipe.of("r", model()), Recipe)
