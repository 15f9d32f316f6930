"""Live mixtures on a GPU: what they are on the CPU, without waiting for the GPU, and in its graphs."""

from contextlib import contextmanager

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.errors import WeightingError
from loraweave.routers.weights import MixtureWeights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

IDS = torch.randint(3, 60, (4, 7), generator=torch.Generator().manual_seed(5))
MIXTURES = [
    {"a": 1.0, "b": 0.5},
    [{"a": 1.0}, {"b": 1.0}, {"a": 0.5, "c": 1.0}, {"c": -1.0}],
    [{"a": 1.0}, None, {"b": 1.0}, {"a": 1.0}],
    MixtureWeights(torch.randn(4, 7, 1, 3, generator=torch.Generator().manual_seed(1)), ("a", "b", "c")),
    {},
]


@torch.no_grad()
def logits(model, ids):
    found = model(input_ids=ids, use_cache=False).logits
    return found.clone()


@contextmanager
def no_waiting():
    """An error for whatever waits for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.fixture
def engines(make_model, make_adapters):
    """The same on the CPU and on the GPU."""
    models = [make_model("llama"), make_model("llama").to("cuda")]
    on_cpu, on_gpu = (Composer(model, make_adapters(model, "llama")) for model in models)
    return on_cpu, on_gpu


@pytest.mark.parametrize("mixture", MIXTURES, ids=range(len(MIXTURES)))
def test_a_mixture_is_what_it_is_on_the_cpu(mixture, engines):
    on_cpu, on_gpu = engines
    with on_cpu.activate(mixture):
        wanted = logits(on_cpu.model, IDS)
    with on_gpu.activate(mixture):
        for _ in range(2):
            assert torch.allclose(logits(on_gpu.model, IDS.cuda()).cpu(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mixture", MIXTURES, ids=range(len(MIXTURES)))
def test_a_second_forward_waits_for_nothing_and_can_be_recorded_as_a_graph(mixture, engines):
    model, layer = engines[1].model, "model.layers.0.self_attn.q_proj"
    x_BTI = torch.randn(4, 7, 16, device="cuda")
    with engines[1].activate(mixture), torch.no_grad():
        project = model.get_submodule(layer)
        wanted = project(x_BTI)
        with no_waiting():
            project(x_BTI)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = project(x_BTI)
        graph.replay()
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_cuda_graphs_of_torch_compile_repeat_no_mixture(engines):
    engine, ids = engines[1], IDS.cuda()
    compiled = torch.compile(engine.model, mode="reduce-overhead")
    for _ in range(3):
        for mixture in MIXTURES:
            with engine.activate(mixture):
                assert torch.allclose(logits(compiled, ids), logits(engine.model, ids), rtol=1e-3, atol=1e-3)


def test_weights_of_a_router_that_are_no_numbers_are_named_when_the_activation_ends(engines):
    class Broken:
        def weights(self, x_BTI, layer):
            w_BTE = torch.ones(*x_BTI.shape[:2], 3, device=x_BTI.device)
            return w_BTE * float("nan") if layer.endswith("1.self_attn.v_proj") else w_BTE

    _, on_gpu = engines
    ids = IDS.to("cuda")
    activation = on_gpu.activate(Broken())
    logits(on_gpu.model, ids)
    with no_waiting():
        logits(on_gpu.model, ids)
    with pytest.raises(WeightingError, match=r"layer 'model.layers.1.self_attn.v_proj' are not finite"):
        activation.close()
    assert not on_gpu.active
