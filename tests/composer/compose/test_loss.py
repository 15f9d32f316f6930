"""The loss of candidates: views, populations, terms, failures; and searches by gradients on weights written out densely."""

from __future__ import annotations

import math

import pytest
import torch
from written_out import adapters as adapters
from written_out import model as model
from written_out import written_out as written_out

import loraweave as lw
from loraweave.composer.compose import population
from loraweave.composer.compose.loss import ExampleLoss, Penalty, together, together_with_gradients
from loraweave.errors import SearchFailed, WeightingError
from loraweave.routers.searches.gradient import Gradient
from loraweave.routers.searches.lorahub import Lorahub

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe")]
TASK = lw.Task(EXAMPLES, instruction="swap")
FAMILIES = ("llama", "gpt2", "t5")
# llama and t5 normalise in fp32 whatever their dtype, so that small differences drown
STEPS = {"llama": (3e-3, 3e-3), "gpt2": (1e-5, 1e-6), "t5": (1e-4, 1e-2)}


@pytest.fixture
def objective(make_model, make_adapters, tokenizer):
    """objective(kind, **options): on a model in float64 with the adapters "a", "b" and "c"."""

    def make(family="llama", **options):
        model = make_model(family, dtype=torch.float64)
        return ExampleLoss(lw.Composer(model, make_adapters(model, family)), tokenizer, TASK, **options)

    return make


def candidate(seed, layers=(), size=0.3):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, 1, max(1, len(layers)), 3, generator=generator, dtype=torch.float64) * size
    return lw.MixtureWeights(values, ("a", "b", "c"), tuple(layers))


def by_differences(objective, mixture, step):
    slopes = torch.zeros_like(mixture.values_BTLE)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in slopes.shape[2:])).tolist():
        losses = []
        for sign in (1, -1):
            values = mixture.values_BTLE.clone()
            values[0, 0, place[0], place[1]] += sign * step
            losses += objective([lw.MixtureWeights(values, mixture.experts, mixture.layers)])
        slopes[0, 0, place[0], place[1]] = (losses[0] - losses[1]) / (2 * step)
    return slopes


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_slopes_of_the_loss(family, objective):
    loss = objective(family, l2=0.1)
    step, tolerance = STEPS[family]
    candidates = [candidate(1), candidate(2)]
    losses, gradients = loss.gradients(candidates)
    assert losses == pytest.approx(loss(candidates), rel=1e-9)
    for gradient, each in zip(gradients, candidates, strict=True):
        assert gradient.shape == each.values_BTLE.shape
        assert torch.allclose(gradient, by_differences(loss, each, step), rtol=tolerance, atol=tolerance)


def test_gradients_of_weights_by_layer_are_the_slopes_of_the_loss(objective):
    loss = objective("gpt2")
    layers = list(loss.engine.target_layers)[:3]
    each = candidate(3, layers)
    _, (gradient,) = loss.gradients([each])
    assert gradient.shape == (1, 1, 3, 3)
    assert torch.allclose(gradient, by_differences(loss, each, 1e-5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_many_examples_are_scored_in_parts_to_the_same_losses_and_gradients(family, objective, monkeypatch):
    loss, candidates = objective(family, l2=0.1), [candidate(1), candidate(2)]
    expected, hits = loss.scores(candidates)
    whole, gradients = loss.gradients(candidates)
    monkeypatch.setattr(population, "MAX_TOKENS", 60)
    monkeypatch.setattr(population, "MAX_TOKENS_WITH_GRADIENTS", 60)
    passes = []
    loss.engine.model.register_forward_hook(lambda *_: passes.append(1))
    found, found_hits = loss.scores(candidates)
    assert len(passes) > len(candidates)
    assert found == pytest.approx(expected, rel=1e-9)
    assert (found_hits == hits).all()
    losses, in_parts = loss.gradients(candidates)
    assert losses == pytest.approx(whole, rel=1e-9)
    assert torch.allclose(torch.cat(in_parts), torch.cat(gradients), rtol=1e-6, atol=1e-9)


def test_gradients_leave_the_model_as_it_was(objective):
    loss = objective()
    model = loss.engine.model.train()
    before = {name: (each.clone(), each.requires_grad) for name, each in model.named_parameters()}
    with torch.inference_mode():
        loss.gradients([candidate(1)])
    assert model.training
    assert not loss.engine.active
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0])
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None


def test_merges_that_are_no_sum_have_no_gradients(objective):
    loss = objective(merge_method="ties")
    assert not loss.differentiable
    with pytest.raises(WeightingError, match=r"no gradients.*'ties'"):
        loss.gradients([candidate(1)])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_a_view_has_the_loss_of_its_examples_alone(method, family, objective, tokenizer):
    whole = objective(family, merge_method=method)
    view = whole.view([3, 1])
    alone = ExampleLoss(
        whole.engine, tokenizer, lw.Task([EXAMPLES[3], EXAMPLES[1]], instruction="swap"), merge_method=method
    )
    assert view([candidate(1)]) == pytest.approx(alone([candidate(1)]), rel=1e-9)
    losses, hits = whole.scores([candidate(1)])
    own_losses, own_hits = view.scores([candidate(1)])
    assert own_losses[0] == pytest.approx(losses[0, [3, 1]], rel=1e-9)
    assert (own_hits[0] == hits[0, [3, 1]]).all()


def test_a_view_tokenises_nothing_again(objective, monkeypatch):
    whole = objective()
    whole([candidate(0)])
    monkeypatch.setattr("loraweave.composer.compose.examples.encode", None)
    assert math.isfinite(whole.view([2])([candidate(1)])[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_views_together_have_the_losses_and_gradients_of_each_alone(family, objective):
    whole = objective(family)
    views = [whole.view(only) for only in ([0, 1, 2], [3], [0, 1, 2, 3, 4])]
    candidates = [[candidate(1), candidate(2)], [candidate(3)], []]
    found = together(views, candidates)
    expected = [view(own) if own else [] for view, own in zip(views, candidates, strict=True)]
    assert [len(own) for own in found] == [2, 1, 0]
    for own, alone in zip(found, expected, strict=True):
        assert own == pytest.approx(alone, rel=1e-9)
    for (losses, gradients), view, own in zip(together_with_gradients(views, candidates), views, candidates, strict=True):
        for loss, gradient, each in zip(losses, gradients, own, strict=True):
            (alone,), (gradient_alone,) = view.gradients([each])
            assert loss == pytest.approx(alone, rel=1e-9)
            assert torch.allclose(gradient, gradient_alone, rtol=1e-6, atol=1e-9)


def test_views_together_share_one_forward_pass(objective):
    whole = objective()
    whole([candidate(0)])
    calls = []
    whole.engine.model.register_forward_hook(lambda *_: calls.append(1))
    together([whole.view([0, 1, 2]), whole.view([2, 3, 4])], [[candidate(1), candidate(2)], [candidate(3)]])
    assert len(calls) == 1


def test_the_terms_are_added_as_defined(objective):
    values = torch.tensor([[[[0.5, -0.01, -1.5]]]], dtype=torch.float64)
    mixture = lw.MixtureWeights(values, ("a", "b", "c"))
    (plain,) = objective(l1=0.0)([mixture])
    (found,) = objective(l2=0.3, sparsity=0.2)([mixture])
    terms = 0.05 * (0.5 + 0.01 + 1.5) / 3 + 0.3 * (0.25 + 0.0001 + 2.25) / 3 + 0.2 * 2
    assert found - plain == pytest.approx(terms, rel=1e-9)
    (bare,) = objective(l1=0.05, l2=0.3, sparsity=0.2).penalised(Penalty(0.0))([mixture])
    assert bare == pytest.approx(plain, rel=1e-12)


def test_a_loss_has_the_l1_term_that_lorahub_published_by_default():
    assert Penalty() == Penalty(Lorahub.l1, 0.0, 0.0) == Penalty(0.05)


@pytest.mark.parametrize("term", ["l1", "l2", "sparsity"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_terms_that_cannot_be_used_are_refused(value, term, objective):
    with pytest.raises(WeightingError, match=f"the loss got {term}={value}; it takes a finite number of at least 0"):
        objective(**{term: value})


def broken(mixture):
    return lw.MixtureWeights(mixture.values_BTLE * 1e300, mixture.experts)


def test_a_candidate_without_a_finite_loss_is_nan_and_counted(objective):
    loss = objective(l1=0.0)
    found = loss([candidate(1), broken(candidate(2)), candidate(3)])
    assert math.isnan(found[1])
    assert found[::2] == pytest.approx(loss([candidate(1), candidate(3)]), rel=1e-9)
    assert loss.failures.count == 1
    assert "its loss is" in loss.failures.first


def test_a_candidate_that_raises_is_nan_and_the_first_error_is_kept(objective):
    loss = objective()
    rows = lw.MixtureWeights(torch.zeros(2, 1, 1, 3), ("a", "b", "c"))
    unknown = lw.MixtureWeights(torch.ones(1, 1, 1, 1), ("z",))
    candidates = [candidate(1), rows, candidate(2), unknown]
    found = loss(candidates)
    assert [math.isnan(each) for each in found] == [False, True, False, True]
    assert loss.failures.count == 2
    assert loss.failures.first.startswith("ScopeError: a candidate has one mixture")
    losses, gradients = loss.gradients(candidates)
    assert [math.isnan(each) for each in losses] == [False, True, False, True]
    assert [bool(torch.isfinite(each).all()) for each in gradients] == [True, False, True, False]
    assert gradients[1].shape == (2, 1, 1, 3)


def test_views_count_their_own_failures(objective):
    whole = objective(l1=0.0)
    views = [whole.view([0, 1]), whole.view([2])]
    together(views, [[candidate(1)], [broken(candidate(2))]])
    assert [view.failures.count for view in views] == [0, 1]
    assert whole.failures.count == 0


def test_an_interruption_passes_through(objective, monkeypatch):
    loss = objective()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    loss([candidate(1)])
    monkeypatch.setattr(loss.engine.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loss([candidate(1)])
    assert not loss.engine.active
    assert loss.failures.count == 0


NAMES = ("a", "b", "c")


@pytest.fixture
def gpt2_loss(model, adapters, tokenizer):
    return ExampleLoss(lw.Composer(model, adapters), tokenizer, TASK, l1=0.0)


FORMULAS = {"softmax": lambda p_LE: torch.softmax(p_LE, dim=1), "free": lambda p_LE: p_LE + 1 / 3}


@pytest.mark.parametrize("form", FORMULAS)
@pytest.mark.parametrize("by_layer", [True, False])
def test_learning_goes_as_in_a_model_whose_weights_are_written_out(form, by_layer, gpt2_loss, written_out):
    layers = list(gpt2_loss.engine.target_layers)
    result = Gradient(NAMES, budget=12, form=form, layers=layers, by_layer=by_layer, lr=0.1, schedule="constant").solve(
        gpt2_loss
    )
    dense = written_out([TASK.prompt(text) for text, _ in TASK.examples], [target for _, target in TASK.examples])
    p_LE = torch.zeros(len(layers) if by_layer else 1, 3, dtype=torch.float64, requires_grad=True)
    adam, losses = torch.optim.Adam([p_LE], lr=0.1), []
    for _ in range(6):
        adam.zero_grad()
        loss_BK = dense(FORMULAS[form](p_LE).expand(len(layers), 3), layers)
        loss = (loss_BK.sum(dim=1) / (loss_BK != 0).sum(dim=1)).mean()
        loss.backward()
        losses.append(loss.item())
        adam.step()
    # the weights that a search asks for are in fp32
    assert result.losses == pytest.approx(losses, rel=1e-5)


def test_learned_weights_by_layer_have_a_lower_loss_than_every_adapter_alone(gpt2_loss):
    singles = gpt2_loss([lw.MixtureWeights.of({name: 1.0}, NAMES) for name in NAMES])
    layers = list(gpt2_loss.engine.target_layers)
    for solver in (
        Gradient(NAMES, layers=layers, form="softmax"),
        Gradient(NAMES, layers=layers, form="free"),
        Gradient(NAMES, form="softmax_bias"),
    ):
        assert solver.solve(gpt2_loss).loss < min(singles)


def test_a_layer_that_the_pool_does_not_have_fails_the_search_and_is_named_by_the_objective(gpt2_loss):
    with pytest.raises(SearchFailed, match="none of 1 candidates"):
        Gradient(NAMES, layers=["transformer.h.7.mlp.c_fc"]).solve(gpt2_loss)
    assert "transformer.h.7.mlp.c_fc" in str(gpt2_loss.failures.first)
