"""Rounds of federation: who is in them, what is refused, and what a failure or a kill costs."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

import loraweave as lw
from loraweave.errors import InvalidTask, PackageMissing, TrainingError, UnknownName
from loraweave.extensions.federated.rounds import draw
from loraweave.extensions.federated.strategies._strategy import Order
from loraweave.extensions.federated.strategies.fedavg import Fedavg

NAME = "model.layers.0.self_attn.q_proj.a_RI"


@dataclass(frozen=True, kw_only=True)
class Faulty(Fedavg):
    """FedAvg in which one client does something else in one round."""

    does: str = "nothing"
    who: str = "double"
    when: int = 2

    def train(self, course, order):
        trained = super().train(course, order)
        if order.client != self.who or order.round != self.when:
            return trained
        update = dict(trained.update)
        match self.does:
            case "raises":
                raise ValueError("its disk is full")
            case "is not finite":
                update[NAME] = update[NAME].clone()
                update[NAME][0, :3] = float("nan")
            case "is misshapen":
                update[NAME] = update[NAME][:, 1:]
            case "is missing":
                del update[NAME]
            case "is unknown":
                update["more"] = torch.ones(2)
            case "is nothing":
                return replace(trained, update=None)
            case "is killed":
                raise KeyboardInterrupt
        return replace(trained, update=update)


FAULTS = {
    "raises": "ValueError: its disk is full",
    "is not finite": "has 3 values that are not finite",
    "is misshapen": r"shape \(2, 15\) instead of \(2, 16\)",
    "is missing": "lacks 'model.layers.0.self_attn.q_proj.a_RI'",
    "is unknown": "'more', which is not one of the 8 tensors",
    "is nothing": "sent NoneType, and not named tensors",
}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("does", FAULTS)
def test_a_bad_client_is_named_and_left_out_and_the_round_is_that_of_the_others(federate, clients, caplog, does):
    with caplog.at_level(logging.WARNING):
        found = federate(Faulty(does=does, when=1), rounds=1)
    assert list(found.rounds[0].losses) == ["upper", "count"]
    assert "round 1 goes on without client 'double'" in caplog.text
    assert pytest.raises(AssertionError, match=FAULTS[does]).matches(AssertionError(found.rounds[0].left_out["double"]))
    others = {name: rows for name, rows in clients.items() if name != "double"}
    assert same(found.state.server, federate("fedavg", clients=others, rounds=1).state.server)


def test_a_client_that_was_left_out_takes_part_again(federate):
    found = federate(Faulty(does="raises", when=1), rounds=2)
    assert [len(each.losses) for each in found.rounds] == [2, 3]


def test_a_loss_that_is_not_finite_leaves_the_client_out(federate):
    found = federate("fedavg", rounds=1, lr=1e30, min_clients=1, steps=1, warmup=0, target_modules=("q_proj",))
    assert found.rounds[0].losses
    with pytest.raises(TrainingError, match="usable updates of 0 of its 3 clients"):
        federate("fedavg", rounds=1, lr=1e38, min_clients=1, steps=3, warmup=0)


def test_too_few_usable_updates_refuse_the_round_and_the_next_call_asks_only_the_client_that_failed(federate, tmp_path):
    settings = {"min_clients": 3, "checkpoint": tmp_path}
    with pytest.raises(
        TrainingError, match=r"round 2 has usable updates of 2 of its 3 clients, and min_clients is 3 \('dou"
    ):
        federate(Faulty(does="raises", when=2), **settings)
    asked = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Faulty):
        @classmethod
        def registered_name(cls):
            return Faulty.registered_name()

        def train(self, course, order):
            asked.append((order.round, order.client))
            return Fedavg.train(self, course, order)

    mended = federate(Watched(does="raises", when=2), **settings)
    assert asked == [(2, "double")]
    assert same(mended.state.server, federate("fedavg").state.server)


@pytest.mark.parametrize("strategy", ["fedavg", "hetlora", "slora", "fedms", "pfedlora", "dp_lora"])
def test_a_federation_that_was_killed_goes_on_to_the_same_bits(federate, tmp_path, strategy, monkeypatch):
    if strategy == "dp_lora":
        pytest.importorskip("opacus")
    made = lw.registry.get("strategies", strategy)
    whole, train, seen = federate(strategy), made.train, []

    def killed(self, course, order):
        seen.append(order)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return train(self, course, order)

    monkeypatch.setattr(made, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        federate(strategy, checkpoint=tmp_path)
    again = federate(strategy, checkpoint=tmp_path)
    # the fifth of six trainings was running: it and the sixth are left
    assert [(order.round, order.client) for order in seen[5:]] == [(2, "double"), (2, "count")]
    assert same(again.state.server, whole.state.server)
    assert all(same(again.state.own[name], own) for name, own in whole.state.own.items())
    assert [dict(each.losses) for each in again.rounds] == [dict(each.losses) for each in whole.rounds]
    # and a finished one trains nothing
    federate(strategy, checkpoint=tmp_path)
    assert len(seen) == 7
    assert len(list((tmp_path / "running").iterdir())) == 1


@pytest.mark.parametrize("strategy", ["fedavg", "hetlora", "slora", "federa", "pfedlora", "fedms", "ffa"])
@pytest.mark.own_models
def test_the_order_in_which_tensors_arrive_changes_no_bit(federate, strategy):
    found = federate(strategy, rounds=2, steps=2)
    course, server = found.course, found.state.server
    own = found.state.own.get("upper", {})
    orders = [Order("upper", 2, dict(turn(server.items())), dict(turn(own.items()))) for turn in (list, reversed)]
    first, second = (found.strategy.train(course, order) for order in orders)
    assert same(first.update, {name: second.update[name] for name in first.update})


def test_a_damaged_checkpoint_costs_the_rounds_and_not_the_result(federate, tmp_path, caplog):
    whole = federate("ffa", checkpoint=tmp_path)
    (kept,) = (tmp_path / "running").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert same(federate("ffa", checkpoint=tmp_path).state.server, whole.state.server)
    assert "is damaged" in caplog.text


def test_other_settings_do_not_take_the_checkpoint(federate, clients, tmp_path):
    federate("ffa", checkpoint=tmp_path)
    for changed in ({"lr": 2e-2}, {"rounds": 1}, {"clients": {**clients, "count": [("one", "2"), ("two", "2")]}}):
        assert same(federate("ffa", checkpoint=tmp_path, **changed).state.server, federate("ffa", **changed).state.server)


def test_the_model_is_as_it_was(federate, tiny_llama):
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    learning = [parameter.requires_grad for parameter in tiny_llama.parameters()]
    for strategy in lw.names("strategies"):
        if not strategy.startswith("dp_"):
            federate(strategy, steps=1)
    assert same(before, tiny_llama.state_dict())
    assert [parameter.requires_grad for parameter in tiny_llama.parameters()] == learning
    assert not tiny_llama.lm_head._forward_hooks
    assert not tiny_llama.model.layers[0].self_attn.q_proj._forward_hooks


def test_the_adapter_is_an_ordinary_one_whose_card_says_how_it_came_about(federate, tmp_path, tiny_llama):
    found = federate("flexlora", options=None, ranks={"count": 1})
    with lw.Hub(tmp_path) as hub:
        hub.add(found.adapter)
        record = hub.get("flexlora").card
    assert record["recipe"]["strategy"] == {"name": "flexlora"}
    assert record["federation"]["clients"] == {"upper": 4, "double": 3, "count": 2}
    assert len(record["federation"]["rounds"]) == 2
    with lw.Composer(tiny_llama, {"it": found.adapter}).activate({"it": 1.0}):
        pass


def test_the_report_counts_what_was_sent(federate):
    down = {each: federate(each, rounds=1).rounds[0].bytes_down for each in ("fedavg", "ffa")}
    # two layers of q (16 by 16) and v (8 by 16), rank 2, three clients, 4 bytes a number; of a nothing with ffa
    assert down == {"fedavg": 4 * 3 * 2 * 2 * (32 + 24), "ffa": 4 * 3 * 2 * 2 * (16 + 8)}
    found = federate("hetlora", rounds=1, ranks={"upper": 1, "double": 1, "count": 1})
    assert found.rounds[0].bytes_up == found.rounds[0].bytes_down == down["fedavg"] // 2
    assert "round 1: 3 clients, loss" in str(found)


def test_a_share_of_the_clients_takes_part_at_least_as_many_as_are_needed(federate):
    found = federate("fedavg", rounds=4, steps=1, participation=0.4, min_clients=2)
    assert [len(each.losses) for each in found.rounds] == [2] * 4
    assert len({tuple(each.losses) for each in found.rounds}) > 1
    assert draw(found.course, found.strategy, 1, 3) == ["upper", "double", "count"]


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"strategy": "flexlra"}, UnknownName, "did you mean 'flexlora'"),
        ({"strategy": "hetlora", "options": {"gama": 1}}, TrainingError, "no option 'gama', did you mean 'gamma'"),
        ({"strategy": "hetlora", "options": {"gamma": 1.0}}, TrainingError, "gamma=1.0; it takes a finite number above 0"),
        ({"strategy": Faulty(), "options": {"does": "raises"}}, TrainingError, "made already"),
        (
            {"ranks": {"count": 1}, "strategy": "ffa"},
            TrainingError,
            r"ranks are \[1, 2\]: give all the same, or take flexlora",
        ),
        ({"ranks": {"counts": 1}}, UnknownName, "ranks has 'counts', did you mean 'count'"),
        ({"ranks": {"count": 0}}, TrainingError, "rank of client 'count' is 0"),
        ({"min_clients": 4}, TrainingError, "min_clients is 4, but there are 3 clients"),
        ({"participation": 0.0}, TrainingError, "participation=0.0"),
        ({"rounds": 0}, TrainingError, "rounds=0"),
        ({"target_modules": ("k_prj",)}, UnknownName, "k_prj"),
        ({"target_modules": "q_proj"}, TrainingError, "must be a list of endings"),
        ({"clients": {}}, TrainingError, "no tasks to train"),
        ({"clients": {"a": [1]}}, InvalidTask, "task 'a'"),
    ],
)
def test_what_cannot_be_is_refused_by_name_before_the_first_round(federate, settings, error, says):
    with pytest.raises(error, match=says):
        federate(**{"strategy": "flexlora", **settings})


def test_an_unknown_client_is_refused_with_the_nearest_name(federate):
    with pytest.raises(UnknownName, match="did you mean 'upper'"):
        federate("ffa", rounds=1, steps=1).client("uper")


@pytest.mark.parametrize(
    ("package", "extra", "asked"),
    [
        ("opacus.accountants", "privacy", {"strategy": "dp_fedavg"}),
        ("opacus.accountants", "privacy", {"strategy": "dp_lora"}),
    ],
)
def test_a_missing_package_is_said_before_the_first_round(package, extra, asked, federate, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(PackageMissing, match=rf"pip install 'loraweave\[{extra}\]'"):
        federate(**asked)


WRONG = {
    "clients in a list": {"clients": [[("a", "b")]]},
    "an unknown strategy": {"strategy": "flex"},
    "no strategy": {"strategy": None},
    "a pipeline for a model": {"model": SimpleNamespace(model=None, tokenizer=None)},
    "ranks in a list": {"ranks": [2]},
    "options of the strategy in a list": {"options": ["gamma"]},
    "more clients in a round than there are": {"min_clients": 4},
}


@pytest.mark.parametrize("options", WRONG.values(), ids=WRONG)
def test_a_wrong_call_is_refused_by_name(federate, options):
    with pytest.raises(lw.LoraweaveError) as caught:
        federate(**{"strategy": "fedavg", **options})
    assert len(str(caught.value).split()) > 3


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_pefts_adapters_in_a_base_are_refused_with_the_way_out(federate, make_model):
    model = get_peft_model(make_model("llama"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(lw.CompositionError, match=r"PeftModel\w* of peft, .* pass model\.unload\(\)"):
        federate("fedavg", model=model)
