"""torch.compile on models of a few layers: rules of the operators, exported programs, other kinds of layers, inductor."""

import os
import shutil

import pytest
import torch
from tiny_models import random_adapter
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from loraweave.composer.composer import Composer
from loraweave.extensions.accelerators.hooks.compiled import Compiled
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_exported_inside_an_activation_follows_activations(strict):
    model, engine = _sequence(torch.float32)
    x = torch.randn(2, 4, 9)
    base = model(x)
    with engine.activate({"a": 1.0}):
        program = torch.export.export(model, (x,), strict=strict).module()
    for mixture in ({"a": 2.0}, {}):
        with engine.activate(mixture):
            assert torch.equal(program(x), model(x))
    assert torch.equal(program(x), base)


def test_no_cuda_graph_holds_an_operator():
    for name in ("mixed", "mixed_for_backward", "mixed_backward"):
        assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.loraweave, name).default.tags


def _sequence(dtype):
    model = nn.Sequential(nn.Linear(9, 5), nn.GELU(), nn.Linear(5, 3)).to(dtype)
    return model, Composer(model, [random_adapter("a", {"0": (2, 9, 5)})])


# opcheck looks at every tensor's gradient
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_the_operators_keep_torchs_rules():
    model, engine = _sequence(torch.float64)
    x = torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    y = model[0](x).detach().requires_grad_()
    with engine.activate({"a": 1.5}):
        number = next(hook for hook in engine._live.hooks if isinstance(hook, Compiled)).numbers["0"]
        torch.library.opcheck(torch.ops.loraweave.mixed, (number, x.detach(), y.detach()))
        torch.library.opcheck(torch.ops.loraweave.mixed_for_backward, (number, x, y, model[0].bias))


class _Convolved(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.convolve = nn.Conv1d(6, 5, 2)

    def forward(self, ids):
        return self.convolve(self.embed(ids).mT)


def test_embeddings_and_convolutions_are_compiled_with_the_eager_outputs_and_gradients():
    model, ids = _Convolved(), torch.randint(0, 11, (3, 4))
    factors = {
        "embed": Factors(torch.randn(2, 11), torch.randn(6, 2), kind="embedding"),
        "convolve": Factors(torch.randn(2, 12), torch.randn(5, 2), kind="conv", kernel=(2,)),
    }
    engine = Composer(model, [Adapter("a", "tiny", factors)])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for mixture in ({"a": 1.0}, [{"a": 0.5}, None, {"a": -1.0}]):
        found = []
        for each in (model, compiled):
            model.zero_grad()
            with engine.activate(mixture):
                output = each(ids)
                output.sin().sum().backward()
            found.append([output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
        assert len(found[0]) == 4
        for eager, other in zip(*found, strict=True):
            assert torch.allclose(eager, other, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
# torch's own, on its import
@pytest.mark.filterwarnings("ignore")
def test_inductors_code_gives_the_eager_outputs_and_gradients():
    model, engine = _sequence(torch.float32)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x = torch.randn(2, 4, 9, requires_grad=True)
    base = compiled(x)
    for mixture in ({"a": 1.0}, [{"a": -2.0}, None], {}):
        found = []
        for each in (model, compiled):
            x.grad = None
            with engine.activate(mixture):
                output = each(x)
                output.sin().sum().backward()
            found.append((output.detach(), x.grad.clone()))
        for eager, other in zip(*found, strict=True):
            assert torch.allclose(eager, other, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 2
    assert torch.equal(compiled(x), base)
