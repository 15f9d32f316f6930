"""torch.compile: compiled models answer as the eager one, and no mixture compiles anything anew."""

import copy
import functools

import pytest
import torch
from live_models import IDS, in_thread, in_threads
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# other experts, weights, row sets, rank sums, and the base
MIXTURES = [
    {"a": 1.0},
    {"a": 0.3, "b": 2.0},
    [{"a": 1.0}, None, {"c": 1.0}],
    [{"c": 1.0}, {"b": 2.0, "a": 3.0}, {"c": 3.0}],
    [None, None, None],
    {},
]


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids, use_cache=False).logits


@pytest.fixture
def engine(make_model, make_adapters):
    model = make_model("llama", num_hidden_layers=1)
    return Composer(model, make_adapters(model, "llama"))


@pytest.mark.parametrize(("kind", "backend"), [("llama", "aot_eager"), ("gpt2", "eager")])
def test_every_mixture_answers_as_eagerly_and_compiles_nothing_anew(kind, backend, make_model, make_adapters):
    model = make_model(kind)
    engine = Composer(model, make_adapters(model, kind))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with engine.activate(MIXTURES[0]):
        logits(compiled)
    assert counter.frame_count == 1
    for mixture in [*MIXTURES, MIXTURES[0]]:
        with engine.activate(mixture):
            assert torch.equal(logits(compiled), logits(model))
    assert counter.frame_count == 1


def test_one_expert_is_that_adapters_dense_update(make_model, make_adapters, with_dense_update):
    model = make_model("llama")
    adapters = make_adapters(model, "llama")
    dense = with_dense_update("llama", [adapters[1]], [1.0])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    logits(compiled)
    with Composer(model, adapters).activate({"b": 1.0}):
        assert torch.allclose(logits(compiled), logits(dense), rtol=1e-4, atol=1e-4)


def wrapped(model, **options):
    return torch.compile(model, **options)


def itself(model, **options):
    model.compile(**options)
    return model


def its_blocks(model, **options):
    for block in model.model.layers:
        block.compile(**options)
    return model


def a_target(model, **options):
    model.lm_head.compile(**options)
    model.model.layers[0].self_attn.q_proj.compile(**options)
    return model


def its_forward(model, **options):
    model.forward = torch.compile(model.forward, **options)
    return model


@pytest.mark.parametrize("compile_it", [wrapped, itself, its_blocks, a_target, its_forward])
def test_what_was_compiled_and_called_before_notices_that_an_activation_opens_and_ends(compile_it, engine):
    expected = []
    for mixture in MIXTURES:
        with engine.activate(mixture):
            expected.append(logits(engine.model))
    counter = CompileCounterWithBackend("eager")
    compiled = compile_it(engine.model, backend=counter)
    base = logits(compiled)
    counts = []
    for _ in range(2):
        for mixture, found in zip(MIXTURES, expected, strict=True):
            with engine.activate(mixture):
                assert torch.equal(logits(compiled), found)
            assert torch.equal(logits(compiled), base)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


def test_a_forward_of_the_layers_own_is_kept_and_noticed_too(engine):
    # what accelerate does to a layer
    layer = engine.model.lm_head
    old = layer.forward
    layer.forward = functools.update_wrapper(functools.partial(lambda module, x: old(x), layer), old)
    patched = layer.forward
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(engine.model, backend=counter)
    base = logits(compiled)
    for _ in range(3):
        with engine.activate({"a": 1.0, "c": 1.0}):
            assert torch.equal(logits(compiled), logits(engine.model))
        assert torch.equal(logits(compiled), base)
    assert counter.frame_count == 2
    assert layer.forward is patched


# bloom's own activation function
@pytest.mark.filterwarnings("ignore:.*Function.* should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("compile_it", [wrapped, itself])
def test_a_layer_that_its_owner_reads_instead_of_calling_is_noticed_in_code_that_was_compiled_before(compile_it):
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2)).eval()
    model.name_or_path = "tiny"
    layer = model.transformer.h[0].mlp.dense_4h_to_h
    factors = Factors(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1))
    engine = Composer(model, [Adapter("a", "tiny", {"transformer.h.0.mlp.dense_4h_to_h": factors})])
    compiled = compile_it(model, backend="eager")
    base = logits(compiled)
    with engine.activate({"a": 1.0}):
        found = logits(compiled)
    assert not torch.equal(found, base)
    # it then multiplies by slices of the layer's weight
    model.transformer.h[0].mlp.slow_but_exact, model.transformer.h[0].mlp.pretraining_tp = True, 2
    assert torch.allclose(logits(compiled), base, atol=1e-5)
    another = Composer(model, engine.pool)
    for each in (engine, another):
        with each.activate({"a": 1.0}), pytest.raises(CompositionError, match="did not run"):
            logits(compiled)
    assert torch.allclose(logits(compiled), base, atol=1e-5)
    assert not [module for module in model.modules() if "forward" in vars(module)]


def test_another_pool_and_another_composer_compile_nothing_anew(engine, make_adapters):
    model = engine.model
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with engine.activate({"a": 1.0}):
        logits(compiled)
    engine.swap(make_adapters(model, "llama")[1:])
    another = Composer(model, make_adapters(model, "llama"))
    for each, mixture in ((engine, {"b": 1.0}), (another, {"a": 2.0})):
        with each.activate(mixture):
            assert torch.equal(logits(compiled), logits(model))
    # the pool without "a" has all layers too, by "c"
    assert counter.frame_count == 1


def test_layers_that_share_their_code_share_what_it_was_compiled_to(make_model, make_adapters):
    model = make_model("llama", num_hidden_layers=9)
    engine = Composer(model, make_adapters(model, "llama"))
    with engine.activate({"a": 1.0, "b": 1.0}):
        expected = logits(model)
        counter = CompileCounterWithBackend("eager")
        for block in model.model.layers:
            block.compile(backend=counter, fullgraph=True)
        assert torch.equal(logits(model), expected)
    assert counter.frame_count == 1


def test_batches_of_other_shapes_compile_no_more_than_the_base_does(engine):
    model = engine.model
    shapes = [(3, 7), (2, 5), (1, 3), (8, 1)]
    counts = []
    for active in (False, True):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for num_rows, num_tokens in shapes:
            ids = torch.ones(num_rows, num_tokens, dtype=torch.long)
            for mixture in ({"a": 1.0}, [{"b": 1.0}] * num_rows, [None] * num_rows) if active else ():
                with engine.activate(mixture):
                    assert torch.equal(logits(compiled, ids), logits(model, ids))
            if not active:
                logits(compiled, ids)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize(("kind", "backend"), [("llama", "eager"), ("gpt2", "aot_eager")])
def test_gradients_are_those_of_the_eager_model(kind, backend, make_model, make_adapter):
    model = make_model(kind)
    targets = ("q_proj", "down_proj") if kind == "llama" else ("c_attn", "c_fc")
    affine = {"gain": True, "bias": True} if kind == "gpt2" else {}
    engine = Composer(model, [make_adapter(model, name, targets=targets, seed=ord(name), **affine) for name in "ab"])
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for mixture in ({"a": 1.0}, [{"a": 1.0}, None, {"a": 0.5, "b": -1.0}], {}):
        gradients = []
        for each in (model, compiled):
            model.zero_grad()
            with engine.activate(mixture):
                each(input_ids=IDS, use_cache=False).logits.sin().sum().backward()
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        for name, wanted in gradients[0].items():
            assert torch.allclose(gradients[1][name], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())), name


class _Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def weights(self, x_BTI, layer):
        return (self.weight * x_BTI.mean(-1, keepdim=True)).softmax(-1)


# torch's own, where a graph ends between layers
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("routed", [False, True])
def test_weights_that_learn_and_routers_get_their_gradients(routed, engine):
    router = _Learned()
    values = torch.full((3, 1, 1, 3), 0.5, requires_grad=True)
    mixture = router if routed else MixtureWeights(values, ("a", "b", "c"))
    learned = router.weight if routed else values
    compiled = torch.compile(engine.model, backend="eager")
    logits(compiled)
    found = []
    for each in (engine.model, compiled):
        learned.grad = None
        with engine.activate(mixture):
            each(input_ids=IDS, use_cache=False).logits.sin().sum().backward()
        found.append(learned.grad.clone())
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-4 * float(found[0].abs().max()))
    # the next steps compile nothing anew
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for _ in range(2):
        with torch.no_grad():
            learned -= 0.1
        with engine.activate(mixture):
            compiled(input_ids=IDS, use_cache=False).logits.sin().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_router_in_one_whole_graph_works_without_gradients_and_is_refused_with_them(engine):
    compiled = torch.compile(engine.model, backend="eager", fullgraph=True)
    with engine.activate(_Learned()):
        assert torch.equal(logits(compiled), logits(engine.model))
        with pytest.raises(torch._dynamo.exc.Unsupported, match=r"without fullgraph=True, or run under torch\.no_grad"):
            compiled(input_ids=IDS, use_cache=False)


def test_a_backward_pass_after_the_block_is_refused(engine):
    compiled = torch.compile(engine.model, backend="aot_eager")
    with engine.activate({"a": 1.0}):
        total = compiled(input_ids=IDS, use_cache=False).logits.sum()
    with pytest.raises(CompositionError, match=r"call backward\(\) inside the block"):
        total.backward()


# the name that transformers 5.3 knows
@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
# dynamo looks at the .grad of the embedding's output, on which transformers asks for a gradient
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_gradient_checkpointing_gives_the_same_gradients(make_model, make_adapters):
    gradients = []
    for compiled in (False, True):
        model = make_model("llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        run = torch.compile(model, backend="aot_eager") if compiled else model
        with Composer(model, make_adapters(model, "llama")).activate([{"a": 1.0}, None, {"b": 0.5}]):
            run(input_ids=IDS, use_cache=False).logits.sin().sum().backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-4, atol=1e-5 * float(gradients[0].abs().max()))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
def test_generation_with_a_compiled_forward_gives_the_eager_ones_tokens(cache, engine):
    from transformers import CompileConfig

    model = engine.model
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    expected = []
    for mixture in MIXTURES:
        with engine.activate(mixture):
            expected.append(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options))
    if cache == "static":
        config = CompileConfig(backend="eager", mode=None, fullgraph=True)
        # transformers compiles by itself on other devices only
        config._compile_all_devices = True
        options |= {"cache_implementation": "static", "compile_config": config}
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    counts = []
    for mixture, found in zip(MIXTURES, expected, strict=True):
        with engine.activate(mixture):
            assert torch.equal(model.generate(IDS, attention_mask=torch.ones_like(IDS), **options), found)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert counts[0] > 0
    assert counts[-1] == counts[0]


def test_inference_mode_and_training_share_a_compiled_model(engine):
    compiled = torch.compile(engine.model, backend="aot_eager", fullgraph=True)
    with engine.activate({"a": 1.0}):
        expected = logits(engine.model)
        with torch.inference_mode():
            assert torch.equal(compiled(input_ids=IDS, use_cache=False).logits, expected)
        compiled(input_ids=IDS, use_cache=False).logits.sum().backward()
    assert engine.model.model.embed_tokens.weight.grad is not None


def test_a_thread_without_a_mixture_gets_the_base_from_the_same_compiled_model(engine):
    base = logits(engine.model)
    compiled = torch.compile(engine.model, backend="aot_eager", fullgraph=True)
    with engine.activate({"a": 1.0}):
        inside = logits(compiled)
        assert torch.equal(in_thread(lambda: logits(compiled)), base)
        assert torch.equal(logits(compiled), inside)


def test_threads_with_different_mixtures_share_a_compiled_model(engine):
    compiled = torch.compile(engine.model, backend="aot_eager", fullgraph=True)
    expected = []
    for mixture in MIXTURES:
        with engine.activate(mixture):
            expected.append(logits(compiled))

    def work(mixture, expected):
        for _ in range(10):
            with engine.activate(mixture):
                assert torch.equal(logits(compiled), expected)

    calls = [functools.partial(work, *each) for each in zip(MIXTURES, expected, strict=True)]
    assert in_threads(calls) == [None] * len(MIXTURES)


def test_the_weights_of_a_compiled_forward_are_told_like_those_of_an_eager_one(engine):
    compiled = torch.compile(engine.model, backend="eager", fullgraph=True)
    found = []
    for each in (engine.model, compiled):
        with engine.activate([{"a": 1.0}, None, {"b": 2.0, "c": 0.5}]), engine.record() as trace:
            logits(each)
            found.append((engine.last_weights, trace.weights))
    for eager, other in zip(*found, strict=True):
        assert eager.layers.keys() == other.layers.keys()
        assert all(torch.equal(used.w_BTE, other.layers[name].w_BTE) for name, used in eager.layers.items())


def test_a_copy_made_while_active_compiles_to_the_base(engine):
    base = logits(engine.model)
    with engine.activate({"a": 1.0}):
        twin = copy.deepcopy(engine.model)
        assert torch.equal(logits(torch.compile(twin, backend="eager", fullgraph=True)), base)


def test_rows_that_do_not_match_are_refused_and_leave_a_compiled_model_usable(engine):
    compiled = torch.compile(engine.model, backend="aot_eager", fullgraph=True)
    with engine.activate([{"a": 1.0}, {"b": 1.0}]), pytest.raises(ScopeError, match="2 rows"):
        logits(compiled)
    with engine.activate([{"a": 1.0}, {"b": 1.0}, None]):
        assert torch.equal(logits(compiled), logits(engine.model))
