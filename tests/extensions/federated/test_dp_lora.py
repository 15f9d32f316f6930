"""DP-LoRA: a client's steps written out, what they spend by opacus and by the formula, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import functional_call

import loraweave as lw
from loraweave.common.descent import seeded
from loraweave.composer.train.jobs import LoraJob
from loraweave.composer.train.rows import Texts
from loraweave.errors import TrainingError
from loraweave.extensions.federated.strategies._privacy import ORDERS
from loraweave.extensions.federated.strategies._strategy import Order, layers_of, start_of
from loraweave.extensions.federated.strategies.dp_lora import clipped, drawn

pytest.importorskip("opacus")

BUDGET = {"epsilon": 6.0, "delta": 1e-3}


def state_of(course, seed=0):
    """What a server might send: factors of which neither is zero."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer, (num_outputs, num_inputs) in course.layers.items():
        state[f"{layer}.a_RI"] = torch.randn(course.rank, num_inputs, generator=generator) * 0.3
        state[f"{layer}.b_OR"] = torch.randn(num_outputs, course.rank, generator=generator) * 0.3
    return state


def gradients_of(found, rows, factors):
    """The gradients of the mean loss of the rows' target tokens by all a and by all b, the weights being W + s b a."""
    model, scale = found.course.model, found.course.scale
    named = {
        f"{layer}.weight": model.get_submodule(layer).weight + scale * b_OR @ a_RI for layer, (a_RI, b_OR) in factors.items()
    }
    total, count = torch.zeros(()), sum(len(row.target) for row in rows)
    for row in rows:
        ids = torch.tensor([[*row.prompt, *row.target]])
        labels = torch.tensor([[*[-100] * len(row.prompt), *row.target]])
        mean = functional_call(model, named, kwargs={"input_ids": ids, "labels": labels}).loss
        total = total + mean * len(row.target) / count
    return [torch.autograd.grad(total, [pair[kind] for pair in factors.values()], retain_graph=True) for kind in (0, 1)]


def clip(gradients, limit):
    size = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
    return [each / max(1.0, size / limit) for each in gradients], size


@pytest.mark.parametrize("clip_by", ["batch", "example"])
def test_a_clients_steps_are_those_of_the_formula(federate, clip_by):
    limit, lr, batch_size = 0.05, 0.1, 2
    options = {**BUDGET, "clip": limit, "clip_by": clip_by}
    settings = {"rounds": 1, "steps": 2, "batch_size": batch_size, "lr": lr, "warmup": 0, "seed": 3}
    found = federate("dp_lora", options=options, **settings)
    course, sigma = found.course, found.figures["noise_multiplier"]
    state, rows = state_of(course), course.clients["upper"].rows
    got = found.strategy.train(course, Order("upper", 7, state, {})).update

    # what all steps do is in units in which the update is s b a
    factors = {layer: (f.a_RI.clone(), f.b_OR / course.scale) for layer, f in layers_of(state).items()}
    # a clipped gradient of a, and one of b, may be turned round by one of the batch; or have one part of length C more
    bound = math.sqrt((2 * limit) ** 2 + (2 * limit) ** 2) if clip_by == "batch" else math.sqrt(limit**2 + limit**2)
    lengths, seen = [], []
    for step, rate in enumerate((lr, lr * 0.5 * (1 + math.cos(math.pi / 2)))):
        chance = torch.rand(4, generator=seeded(3, "rows", "upper", 7, step), dtype=torch.float64)
        batch = [row for row, value in zip(rows, chance.tolist(), strict=True) if value < batch_size / 4]
        seen.append(len(batch))
        factors = {layer: tuple(part.detach().requires_grad_() for part in pair) for layer, pair in factors.items()}
        moves = [[torch.zeros_like(pair[kind]) for pair in factors.values()] for kind in (0, 1)]
        for part in [batch] if clip_by == "batch" else [[row] for row in batch]:
            for kind, gradients in enumerate(gradients_of(found, part, factors)):
                short, size = clip(gradients, limit)
                lengths.append(size)
                moves[kind] = [move + each for move, each in zip(moves[kind], short, strict=True)]
        share = 1.0 if clip_by == "batch" else 1 / batch_size
        generator = seeded(3, "noise", "upper", 7, step)
        for place, (layer, pair) in enumerate(factors.items()):
            noise = [torch.randn(part.shape, generator=generator) * sigma * bound for part in pair]
            factors[layer] = tuple(pair[kind] - rate * share * (moves[kind][place] + noise[kind]) for kind in (0, 1))
    assert min(lengths) > limit
    assert min(seen) > 0
    for layer, (a_RI, b_OR) in factors.items():
        for name, expected in ((f"{layer}.a_RI", a_RI), (f"{layer}.b_OR", b_OR * course.scale)):
            moved = expected.detach() - state[name]
            # fp32 sums of a few hundred terms
            torch.testing.assert_close(got[name] - state[name], moved, rtol=1e-3, atol=1e-4 * float(moved.abs().max()))


@pytest.mark.parametrize("clip_by", ["batch", "example"])
def test_no_example_changes_what_noise_is_added_to_by_more_than_the_sensitivity(federate, clip_by):
    found = federate("dp_lora", rounds=1, steps=1, options={**BUDGET, "clip": 0.05, "clip_by": clip_by})
    strategy, course = found.strategy, found.course
    job, rows = LoraJob("upper", start_of(course, state_of(course)), course.scale), course.clients["upper"].rows
    whole = strategy.gradients(course, job, rows)
    for left in range(len(rows)):
        without = strategy.gradients(course, job, [*rows[:left], *rows[left + 1 :]])
        moved = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(whole, without, strict=True)))
        assert 0 < moved <= strategy.sensitivity * (1 + 1e-6)
    # of the batch it is twice as much as of one more part of the sum
    assert strategy.sensitivity == pytest.approx(0.05 * math.sqrt(2) * (2 if clip_by == "batch" else 1))


def test_a_gradient_turned_round_reaches_the_sensitivity_of_a_batch():
    ahead, back = ([sign * torch.full((4,), 3.0)] for sign in (1, -1))
    moved = torch.stack(clipped(ahead, 0.5)) - torch.stack(clipped(back, 0.5))
    assert float(moved.norm()) == pytest.approx(2 * 0.5)


@pytest.mark.parametrize("broken", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_counts_as_zero(broken):
    found = clipped([torch.tensor([1.0, broken]), torch.ones(3)], 1.0)
    assert all(torch.equal(each, torch.zeros_like(each)) for each in found)
    assert torch.equal(clipped([torch.tensor([0.3, 0.4])], 1.0)[0], torch.tensor([0.3, 0.4]))


def test_a_step_that_draws_no_example_is_noise_alone(federate):
    found = federate("dp_lora", rounds=1, steps=1, batch_size=1, lr=0.1, warmup=0, options=BUDGET)
    course, state = found.course, state_of(found.course)
    number = next(number for number in range(100) if not drawn(course, Order("upper", number, state, {}), 0))
    got = found.strategy.train(course, Order("upper", number, state, {})).update
    generator = seeded(0, "noise", "upper", number, 0)
    for layer in layers_of(state):
        for name, unit in ((f"{layer}.a_RI", 1.0), (f"{layer}.b_OR", course.scale)):
            noise = torch.randn(state[name].shape, generator=generator)
            moved = -0.1 * unit * found.figures["noise_multiplier"] * found.strategy.sensitivity * noise
            torch.testing.assert_close(got[name] - state[name], moved, rtol=1e-4, atol=1e-6)


def integer_epsilon(sigma, rate, steps, delta):
    """The least of integer orders: Mironov et al. 2019 for the sampled Gaussian mechanism, then Balle et al. 2020."""

    def of(order):
        terms = [
            math.log(math.comb(order, k))
            + (order - k) * math.log1p(-rate)
            + k * math.log(rate)
            + (k * k - k) / (2 * sigma**2)
            for k in range(order + 1)
        ]
        highest = max(terms)
        renyi = steps * (highest + math.log(sum(math.exp(term - highest) for term in terms))) / (order - 1)
        return renyi + math.log((order - 1) / order) - (math.log(delta) + math.log(order)) / (order - 1)

    return min(of(order) for order in range(2, 64))


def test_what_is_spent_is_opacus_count_of_the_smallest_clients_steps(federate, clients):
    from opacus.accountants import RDPAccountant

    given = {**clients, "count": [(str(number), str(number)) for number in range(20)]}
    settings = {"clients": given, "rounds": 3, "steps": 2, "batch_size": 1, "participation": 0.67}
    found = federate("dp_lora", options={"epsilon": 1.0, "delta": 1e-3}, **settings)
    figures, accountant = found.figures, RDPAccountant()
    # batches of one of three examples, of the client "double"
    assert figures["sample_rate"] == pytest.approx(1 / 3)
    for _ in range(3 * 2):
        accountant.step(noise_multiplier=figures["noise_multiplier"], sample_rate=1 / 3)
    assert figures["epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-3, alphas=ORDERS), rel=1e-9)
    assert figures["epsilon"] == pytest.approx(integer_epsilon(figures["noise_multiplier"], 1 / 3, 6, 1e-3), rel=0.02)
    assert 0.95 <= figures["epsilon"] <= 1.0
    assert figures["delta"] == 1e-3


def test_clients_of_different_sizes_count_alike(federate):
    found = federate("dp_lora", rounds=1, options=BUDGET)
    course, strategy = found.course, found.strategy
    first = strategy.first(course)
    updates = [strategy.train(course, Order(name, 1, first, {})).update for name in course.clients]
    for name, value in found.state.server.items():
        mean = sum(update[name].double() for update in updates) / 3
        torch.testing.assert_close(value.double(), mean, rtol=1e-6, atol=1e-7)


def test_the_seed_alone_determines_draws_and_noise(federate):
    first, again, other = (federate("dp_lora", rounds=1, options=BUDGET, seed=seed).adapter for seed in (1, 1, 2))
    assert first.hash == again.hash != other.hash


def test_nothing_is_told_but_updates(federate):
    found = federate("dp_lora", rounds=1, steps=1, seed=12345, options=BUDGET)
    assert found.rounds[0].losses == {"upper": None, "double": None, "count": None}
    assert "3 clients, 0.00 MB down" in str(found)
    card = found.adapter.card
    assert set(card["federation"]) == {"epsilon", "delta", "noise_multiplier", "sample_rate"}
    assert not any(said in str(card) for said in ("12345", "upper", "double", "count", "losses"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"clip": 0.0}, "clip=0.0; it takes a finite number above 0"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"delta": 1.0}, "delta=1.0"),
        ({"clip_by": "row"}, "clip_by='row'; it takes one of 'batch', 'example'"),
        ({"noise": 1.0}, "no option 'noise'"),
        ({"epsilon": 1e-12}, "no noise gives strategy 'dp_lora' epsilon=1e-12 at delta=1e-05 in 6 noisy steps"),
    ],
)
def test_options_out_of_range_are_refused_by_name(federate, options, says):
    with pytest.raises(TrainingError, match=says):
        federate("dp_lora", options=options)


@pytest.mark.parametrize(
    "given", [Texts(["one and two", "three"]), lw.Task([("a", "A"), ("b", "B"), ("c", "C")], demonstrations=True)]
)
def test_rows_of_several_examples_are_refused_before_the_first_round(federate, clients, given, tmp_path):
    with pytest.raises(TrainingError, match="protects single examples, and rows of client 'count' have several"):
        federate("dp_lora", clients={**clients, "count": given}, checkpoint=tmp_path)
    assert not list(tmp_path.iterdir())


def test_both_strategies_keep_rounds_in_one_folder(federate, tmp_path):
    options = {"epsilon": 8.0, "delta": 1e-3, "clip": 0.5}
    for strategy in ("dp_fedavg", "dp_lora", "dp_fedavg", "dp_lora"):
        federate(strategy, options=options, checkpoint=tmp_path, rounds=1, steps=1)
    assert len(list((tmp_path / "running").iterdir())) == 2
