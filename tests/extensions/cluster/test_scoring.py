"""Candidates scored on workers: the bits of one process, whatever they mean and whatever becomes of the workers."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial

import joblib
import pytest
import torch

import loraweave as lw
from loraweave.common.spread import crew
from loraweave.composer.compose import loss, population
from loraweave.composer.compose.loss import ExampleLoss, together
from loraweave.errors import BaseModelMismatch, CompositionError, WorkersFailed
from loraweave.extensions.cluster import scoring as scoring_workers
from loraweave.extensions.cluster.scoring import Parcel, ScoringWorkers

EXAMPLES = [("a", "ab"), ("b", "ba"), ("cc", "c"), ("d", "DD"), ("e f", "fe"), ("g", "gg"), ("hh", "h")]
TASK = lw.Task(EXAMPLES, instruction="swap")
NAMES = tuple("abcd")


@pytest.fixture(scope="module")
def hub(base, make_adapter, tmp_path_factory):
    made = [make_adapter(base[0], name, seed=seed) for seed, name in enumerate(NAMES)]
    with lw.Hub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_many([replace(adapter, base_model=base[0].name_or_path, card={"description": "swaps"}) for adapter in made])
        yield hub


@pytest.fixture
def two(warm_workers):
    with crew(2) as workers:
        yield workers


@pytest.fixture(scope="module")
def engine(base, hub):
    return lw.Composer(base[0], hub.pool(), tokenizer=base[1])


@pytest.fixture
def scoring(two, engine, base, hub):
    return ScoringWorkers(two, engine, base[1], hub)


@pytest.fixture(autouse=True)
def small_passes(monkeypatch):
    """So few candidates share a pass that a generation of this task has many."""
    monkeypatch.setattr(population, "MAX_LOGITS", 40)
    monkeypatch.setattr(population, "MAX_TOKENS_WITH_GRADIENTS", 200)


def mixtures(count=9):
    made = torch.Generator().manual_seed(count)
    return [lw.MixtureWeights(torch.randn(1, 1, 1, len(NAMES), generator=made), NAMES) for _ in range(count)]


def pids(folder, on, number):
    """Where a piece runs, and how many engines were made there; the worker of the first piece dies once."""
    try:
        (folder / "died").touch(exist_ok=number != 0)
    except FileExistsError:
        pass
    else:
        if number == 0:
            os._exit(1)
    assert on.engine.pool.names == NAMES
    return number, os.getpid(), scoring_workers._engine.cache_info().misses


@pytest.mark.parametrize("side", ["hub", "pool"])
def test_losses_and_gradients_have_the_bits_of_one_process(side, two, engine, base, scoring):
    workers = scoring if side == "hub" else ScoringWorkers(two, engine, base[1], None)
    for kind in ("cross_entropy", "entropy"):
        alone, spread = (ExampleLoss(engine, base[1], TASK, kind=kind, workers=each) for each in (None, workers))
        views = [(each.view([0, 2, 4, 5]), each.view([1, 3]), each) for each in (alone, spread)]
        asked = [mixtures(5), mixtures(3), mixtures(4)]
        ran = []
        handle = base[0].register_forward_hook(lambda *_, ran=ran: ran.append(1))
        expected, here = together(views[0], asked), len(ran)
        assert here > 2
        assert together(views[1], asked) == expected
        losses, gradients = alone.gradients(mixtures())
        before = len(ran)
        found = spread.gradients(mixtures())
        assert len(ran) == before
        handle.remove()
        assert found[0] == losses
        assert all(torch.equal(one, other) for one, other in zip(found[1], gradients, strict=True))


@pytest.mark.parametrize("method", ["factor_sum", "ties"])
def test_other_meanings_of_weights_have_the_bits_of_one_process(method, engine, base, scoring, monkeypatch):
    # workers plan the passes of a candidate that is an adapter of its own, by the limits that they know
    monkeypatch.undo()
    monkeypatch.setattr(loss, "MAX_CANDIDATES", 2)
    alone, spread = (ExampleLoss(engine, base[1], TASK, merge_method=method, workers=each) for each in (None, scoring))
    assert spread(mixtures(5)) == alone(mixtures(5))


def test_a_worker_that_dies_costs_its_piece_and_the_others_keep_what_they_hold(engine, base, scoring, tmp_path):
    objective = Parcel.of(partial(ExampleLoss, task=TASK))
    first = scoring.deal(objective, partial(pids, tmp_path), range(6))
    second = scoring.deal(objective, partial(pids, tmp_path), range(6))
    assert [number for number, _, _ in first] == [number for number, _, _ in second] == list(range(6))
    assert (tmp_path / "died").exists()
    made = {pid: {count for _, other, count in first + second if other == pid} for _, pid, _ in first + second}
    assert os.getpid() not in made
    # no process makes an engine between its first piece and its last
    assert {len(counts) for counts in made.values()} == {1}


def test_a_candidate_that_cannot_be_scored_fails_as_in_one_process(engine, base, scoring):
    wrong = lw.MixtureWeights(torch.ones(1, 1, 1, 1), ("nobody",))
    alone, spread = (ExampleLoss(engine, base[1], TASK, workers=each) for each in (None, scoring))
    asked = [*mixtures(4), wrong, *mixtures(3)]
    assert [repr(found) for found in spread(asked)] == [repr(found) for found in alone(asked)]
    assert spread.failures == alone.failures
    assert alone.failures.count == 1


@pytest.mark.usefixtures("warm_workers")
def test_a_search_on_two_workers_finds_what_one_process_finds(base, hub):
    def told(composition):
        rows = composition.report.rows
        return composition.weights, [(row.name, row.loss, row.held_out_loss, row.losses, row.weights) for row in rows]

    asked = {"method": "lorahub", "budget": 17, "folds": 2, "progress": False}
    alone = lw.compose(*base, hub.pool(), TASK, **asked)
    with joblib.parallel_config(backend="loky", n_jobs=2):
        assert told(lw.compose(*base, hub.pool(), TASK, **asked)) == told(alone)
    assert alone.report["lorahub"].losses


def test_an_adapter_that_is_replaced_meanwhile_ends_the_search(two, base, hub, make_adapter, tmp_path):
    with lw.Hub(tmp_path / "own") as own:
        own.add_many([hub[name] for name in NAMES])
        engine = lw.Composer(base[0], own.pool(), tokenizer=base[1])
        spread = ExampleLoss(engine, base[1], TASK, workers=ScoringWorkers(two, engine, base[1], own))
        own.add(replace(make_adapter(base[0], "b", seed=9), base_model=base[0].name_or_path), replace=True)
        with pytest.raises(WorkersFailed, match=r"'b' of .* was replaced while the search ran"):
            spread(mixtures())


def test_what_workers_cannot_hold_is_refused_before_anything_runs(base, hub, make_model, make_adapters, tokenizer):
    model = make_model("llama")
    with pytest.raises(BaseModelMismatch, match="save_pretrained"):
        lw.compose(model, tokenizer, make_adapters(model, "llama"), TASK, method="lorahub", n_jobs=2, progress=False)
    with pytest.raises(CompositionError, match="lazy pool cannot be sent to workers"):
        lw.compose(*base, hub.pool(lazy=True), TASK, method="lorahub", n_jobs=2, progress=False)


def test_a_function_as_the_objective_is_called_here(engine, base, scoring):
    called = []

    def share(model, examples):
        called.append(os.getpid())
        return 1.0

    ExampleLoss(engine, base[1], TASK, kind=share, workers=scoring)(mixtures(3))
    assert called == [os.getpid()] * 3
