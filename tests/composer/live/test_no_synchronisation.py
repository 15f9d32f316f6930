"""From the second forward of an activation on, a mixture asks a GPU for nothing and sends it nothing.

The meta device stands in for the GPU: whoever asks it for a value gets an error, and nothing from the CPU may meet it.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraweave.composer.composer import Composer
from loraweave.hub.adapter import Adapter
from loraweave.routers.tokens._saved import router, router_names
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

# copies a value to the host, or has a size that only the device knows, or comes from the host
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::lift_fresh"}


class _Watch(TorchDispatchMode):
    """Collects the operations that would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        name = func.name().split(".")[0]
        if name in WAITING or any(each.device.type == "cpu" for each in tensors):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


class _Router:
    def weights(self, x_BTI, layer):
        return x_BTI[..., :3].softmax(-1)


VALUES = torch.randn(3, 4, 1, 3, generator=torch.Generator().manual_seed(1))
NAMES = ("a", "b", "c")
MIXTURES = {
    "shared": lambda: {"a": 1.0, "b": 0.5},
    "rows": lambda: [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "c": 1.0}],
    "rows of two mixtures": lambda: [{"a": 1.0}, {"b": 1.0}, {"a": 1.0}],
    "some rows": lambda: [{"a": 1.0}, None, {"b": 1.0}],
    "tokens": lambda: MixtureWeights(VALUES, NAMES),
    "layers and tokens": lambda: MixtureWeights(VALUES.expand(3, 4, 2, 3), NAMES, ("0", "2")),
    "router": _Router,
}
# mole asks how many rows each expert has, once a layer, and the text routers look at token ids
TOKEN_ROUTERS = ("arrow", "spectr", "lag", "ramole", "adapter_fusion")


@pytest.fixture(params=[False, True], ids=["factors", "gain and bias"])
def engine(request):
    def factors(rank, num_inputs, num_outputs):
        affine = {"gain_O": torch.ones(num_outputs), "bias_O": torch.ones(num_outputs)} if request.param else {}
        return Factors(torch.ones(rank, num_inputs), torch.ones(num_outputs, rank), **affine)

    # "c" has no second layer
    adapters = [Adapter(name, "tiny", {"0": factors(r, 6, 5), "2": factors(r, 5, 3)}) for name, r in (("a", 2), ("b", 3))]
    adapters.append(Adapter("c", "tiny", {"0": factors(1, 6, 5)}))
    model = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3))
    engine = Composer(model, adapters)
    model.to("meta")
    return engine


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("mixture", MIXTURES)
def test_a_forward_asks_the_device_for_nothing_and_sends_it_nothing(mixture, training, engine):
    x_BTI = torch.empty(3, 4, 6, device="meta")
    with engine.activate(MIXTURES[mixture]()), torch.set_grad_enabled(training):
        engine.model(x_BTI)
        with _Watch() as watch:
            assert engine.model(x_BTI).shape == (3, 4, 3)
    assert watch.found == []


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", [name for name in TOKEN_ROUTERS if name in router_names()])
def test_neither_does_a_router_which_goes_to_where_the_layers_are(name, training, engine):
    x_BTI = torch.empty(3, 4, 6, device="meta")
    made = router(name, engine.pool).train(training)
    with engine.activate(made), torch.set_grad_enabled(training):
        engine.model(x_BTI)
        with _Watch() as watch:
            assert engine.model(x_BTI).shape == (3, 4, 3)
    assert watch.found == []
    assert all(tensor.device.type == "meta" for tensor in made.state_dict().values())


@pytest.mark.parametrize("mixture", ["shared", "rows", "some rows", "tokens"])
@pytest.mark.parametrize("kind", ["embedding", "conv"])
def test_neither_does_one_of_another_kind_of_layer(kind, mixture):
    model: nn.Module
    if kind == "embedding":
        model, num_inputs, options = nn.Embedding(6, 5), 6, {}
        x = torch.empty(3, 4, dtype=torch.long, device="meta")
    else:
        model, num_inputs, options = nn.Conv1d(3, 5, 2), 6, {"kernel": (2,)}
        x = torch.empty(3, 3, 5, device="meta")
    adapters = [
        Adapter(name, "tiny", {"0": Factors(torch.ones(r, num_inputs), torch.ones(5, r), kind=kind, **options)})
        for r, name in enumerate(NAMES, start=1)
    ]
    engine = Composer(nn.Sequential(model), adapters)
    engine.model.to("meta")
    with engine.activate(MIXTURES[mixture]()), torch.no_grad():
        engine.model(x)
        with _Watch() as watch:
            engine.model(x)
    assert watch.found == []
