"""Any order of opening, nesting, closing, fusing, switching, swapping and failing: the model is what the formula says."""

import hashlib
from contextlib import ExitStack

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from loraweave.composer.composer import Composer
from loraweave.errors import AlreadyActive, UnknownExpert
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

ROWS = 3
NAMES = ("a", "b", "c")
POOLS = {"all": NAMES, "some": ("a", "c")}

weights = st.dictionaries(st.sampled_from(("a", "c")), st.sampled_from([-1.0, 0.0, 0.5, 2.0]), max_size=2)
mixtures = weights | st.lists(st.none() | weights, min_size=ROWS, max_size=ROWS)


def _random(generator, *shape):
    return torch.randn(*shape, generator=generator)


class Machine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        shapes = {"0": (4, 5), "2": (3, 4)}
        self.adapters = {}
        for rank, name in enumerate(NAMES, start=1):
            layers = {
                layer: Factors(_random(generator, rank, wide), _random(generator, high, rank))
                for layer, (high, wide) in shapes.items()
                # one expert leaves a layer alone
                if (name, layer) != ("a", "2")
            }
            self.adapters[name] = Adapter(name, "tiny", layers)
        self.x = _random(generator, ROWS, 2, 5).double()
        self.engine = Composer(self.model, self.pool("all"))
        self.dense = {
            layer: (self.model.get_submodule(layer).weight.detach().clone(), self.model.get_submodule(layer).bias.detach())
            for layer in shapes
        }
        self.base = self.output()
        self.digest = self.digested()
        self.open = []
        self.mixtures = []
        self.fusion = None
        self.fused_block = ExitStack()

    def pool(self, which):
        return [self.adapters[name] for name in POOLS[which]]

    @torch.no_grad()
    def output(self):
        return self.model(self.x)

    def digested(self):
        state = self.model.state_dict()
        return hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()

    def formula(self, mixture):
        """Every row through W + sum of w_e b_e a_e of its own, written out."""
        rows = mixture if isinstance(mixture, list) else [mixture] * ROWS
        found = []
        for x_TI, row in zip(self.x, rows, strict=True):
            for layer, (weight_OI, bias_O) in self.dense.items():
                updated_OI = weight_OI.clone()
                for name, weight in (row or {}).items():
                    if layer in self.adapters[name].layers:
                        factors = self.adapters[name].layers[layer]
                        updated_OI += weight * factors.b_OR.double() @ factors.a_RI.double()
                x_TI = x_TI @ updated_OI.T + bias_O
                x_TI = x_TI.tanh() if layer == "0" else x_TI
            found.append(x_TI)
        return torch.stack(found)

    @property
    def busy(self):
        return bool(self.open) or self.fusion is not None

    @rule(mixture=mixtures)
    def activate(self, mixture):
        if self.fusion is not None:
            with pytest.raises(AlreadyActive, match="fused"):
                self.engine.activate(mixture)
        else:
            self.open.append(self.engine.activate(mixture))
            self.mixtures.append(mixture)

    @precondition(lambda self: self.open)
    @rule(depth=st.integers(0, 5), data=st.data())
    def close(self, depth, data):
        place = max(len(self.open) - 1 - depth, 0)
        if place < len(self.open) - 1 and data.draw(st.booleans()):
            with pytest.raises(AlreadyActive, match="opened later"):
                self.open[place].close()
            return
        while len(self.open) > place:
            self.mixtures.pop()
            handle = self.open.pop()
            handle.close()
            handle.close()

    @precondition(lambda self: len(self.open) > 1)
    @rule(depth=st.integers(1, 5))
    def leave_a_block(self, depth):
        place = max(len(self.open) - 1 - depth, 0)
        self.open[place].__exit__(None, None, None)
        del self.open[place:], self.mixtures[place:]

    @rule(mixture=weights)
    def fuse(self, mixture):
        if self.busy:
            with pytest.raises(AlreadyActive):
                self.engine.fused(mixture).__enter__()
        else:
            self.fusion = self.fused_block.enter_context(self.engine.fused(mixture))
            self.mixtures = [mixture]

    @precondition(lambda self: self.fusion is not None)
    @rule(mixture=weights)
    def switch(self, mixture):
        self.fusion.switch(mixture)
        self.mixtures = [mixture]

    @precondition(lambda self: self.fusion is not None)
    @rule()
    def unfuse(self):
        self.fused_block.close()
        self.fusion, self.mixtures = None, []

    @rule(which=st.sampled_from(sorted(POOLS)))
    def swap(self, which):
        if self.busy:
            with pytest.raises(AlreadyActive):
                self.engine.swap(self.pool(which))
        else:
            self.engine.swap(self.pool(which))

    @rule(layer=st.sampled_from(["0", "1", "2"]), error=st.sampled_from([RuntimeError, KeyboardInterrupt]))
    def fail_in_a_forward(self, layer, error):
        def fail(*_):
            raise error("injected")

        handle = self.model.get_submodule(layer).register_forward_hook(fail)
        with pytest.raises(error, match="injected"):
            self.output()
        handle.remove()

    @precondition(lambda self: self.fusion is None)
    @rule(mixture=mixtures, inner=mixtures)
    def fail_in_a_block(self, mixture, inner):
        def careless():
            with self.engine.activate(mixture):
                self.engine.activate(inner)
                assert torch.allclose(self.output(), self.formula(inner), rtol=1e-9, atol=1e-9)
                raise RuntimeError("injected")

        with pytest.raises(RuntimeError, match="injected"):
            careless()

    @rule()
    def ask_for_what_is_not_there(self):
        with pytest.raises((UnknownExpert, AlreadyActive)):
            self.engine.activate({"d": 1.0})

    @invariant()
    def the_output_is_the_formulas(self):
        assert self.engine.active == self.busy
        expected = self.formula(self.mixtures[-1] if self.mixtures else None)
        assert torch.allclose(self.output(), expected, rtol=1e-9, atol=1e-9)

    @invariant()
    def at_rest_it_is_the_base_bit_for_bit(self):
        if self.fusion is None:
            assert self.digested() == self.digest
        if not self.busy:
            assert torch.equal(self.output(), self.base)
            assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.model.modules()) == 0

    def teardown(self):
        self.fused_block.close()
        for handle in reversed(self.open):
            handle.close()
        self.engine.close()
        assert torch.equal(self.output(), self.base)
        assert self.digested() == self.digest


# every example is the same on every run: what is new is looked for by the slow one
Machine.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
TestMachine = Machine.TestCase


@pytest.mark.slow
def test_ten_thousand_steps():
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        Machine, settings=settings(max_examples=200, stateful_step_count=50, deadline=None, database=None)
    )
