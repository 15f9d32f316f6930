"""The guard of what tests share: it sees every change, names the test that made it, and spares the next."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from shared_models import Shared, differences, facts
from tiny_models import random_adapter
from torch import nn

from loraweave.hub.pool import ExpertPool

pytest_plugins = ["pytester"]

LAYER = "model.layers.1.mlp.up_proj"


def halve(model):
    model.get_parameter(f"{LAYER}.weight").data.mul_(0.5)


def turn(model):
    model.model.rotary_emb.inv_freq[0] += 1


def leave_gradient(model):
    model(input_ids=torch.tensor([[3, 4]])).logits.sum().backward()


def stand_in(model):
    layer = model.get_submodule(LAYER)
    layer.forward = MethodType(nn.Linear.forward, layer)


CHANGES = {
    "the bytes of a weight": (halve, f"{LAYER}.weight"),
    "the bytes of a buffer": (turn, "model.rotary_emb.inv_freq"),
    "a gradient": (leave_gradient, f"{LAYER}.weight"),
    "whether it learns": (lambda model: model.lm_head.requires_grad_(False), "lm_head.weight"),
    "its precision": (lambda model: model.lm_head.double(), "lm_head.weight"),
    "its mode": (lambda model: model.get_submodule(LAYER).train(), f"{LAYER}.training"),
    "a hook": (lambda model: model.get_submodule(LAYER).register_forward_hook(print), f"{LAYER}._forward_hooks"),
    "a forward": (stand_in, f"{LAYER}.forward"),
    "a class": (lambda model: setattr(model.lm_head, "__class__", nn.Bilinear), "lm_head.__class__"),
    "another layer": (lambda model: setattr(model, "lm_head", nn.Linear(16, 61, bias=False)), "lm_head.weight"),
    "one layer more": (lambda model: model.add_module("more", nn.ReLU()), "more"),
    "a config": (lambda model: setattr(model.config, "use_cache", False), "config.use_cache"),
    "a list of a config": (lambda model: model.config.architectures.append("x"), "config.architectures"),
    "how it generates": (lambda model: setattr(model.generation_config, "top_k", 3), "generation_config.top_k"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_every_change_of_a_model_is_seen_with_its_place(make_model, case):
    model = make_model("llama")
    model.config.architectures = []
    before = facts(model)
    assert differences(before, facts(model)) == []
    change, place = CHANGES[case]
    change(model)
    assert place in differences(before, facts(model))


def test_what_is_put_back_is_no_change(make_model):
    model = make_model("llama")
    before = facts(model)
    halve(model)
    stand_in(model)
    model.train().requires_grad_(False)
    handle = model.lm_head.register_forward_hook(print)
    model.get_parameter(f"{LAYER}.weight").data.mul_(2)
    del model.get_submodule(LAYER).forward
    model.eval().requires_grad_(True)
    handle.remove()
    assert differences(before, facts(model)) == []


def test_a_change_of_a_pools_factors_is_seen_with_its_place():
    pool = ExpertPool([random_adapter(name, {"q": (2, 5, 3)}) for name in "ab"])
    before = facts(pool)
    pool.rank_one()
    assert differences(before, facts(pool)) == []
    pool["b"].layers["q"].b_OR[0, 0] += 1
    assert differences(before, facts(pool)) == ["b: q.b_OR"]


def test_a_change_between_two_tests_is_no_fault_of_the_next():
    shared = Shared()
    layer = shared.lend("layer", lambda: nn.Linear(2, 3))
    shared.take_back("a test")
    layer.weight.data.zero_()
    with pytest.raises(pytest.fail.Exception, match="something between two tests changed the shared layer: weight;"):
        shared.lend("layer", lambda: nn.Linear(2, 3))
    assert shared.lend("layer", lambda: nn.Linear(2, 3)).weight.any()


def test_the_test_that_changes_a_shared_model_fails_by_name_and_no_other_does(pytester, make_model):
    # what the tests below import stays imported
    make_model("llama")
    pytester.makeconftest(
        """
        from shared_models import pytest_runtest_teardown, share_in_session
        from tiny_models import make_model, tiny_llama
        """
    )
    pytester.makepyfile(
        """
        import pytest

        def weight(model):
            return model.lm_head.weight

        def test_reads(tiny_llama):
            assert weight(tiny_llama).shape == (61, 16)

        def test_puts_back(tiny_llama, monkeypatch):
            monkeypatch.setattr(tiny_llama, "forward", None)

        def test_changes(tiny_llama):
            weight(tiny_llama).data.zero_()

        def test_has_one_as_it_was(tiny_llama):
            assert weight(tiny_llama).any()

        @pytest.mark.own_models
        def test_changes_its_own(tiny_llama):
            weight(tiny_llama).data.zero_()
        """
    )
    outcome = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    outcome.assert_outcomes(passed=5, errors=1)
    outcome.stdout.fnmatch_lines(
        ["*ERROR at teardown of test_changes *", "test_changes changed the shared llama: lm_head.weight; *"]
    )
