"""Live mixing leaves nothing behind, and keeps contexts apart."""

import asyncio
import contextvars
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from live_models import IDS, in_thread, logits, num_hooks
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.composer.live import mixer
from loraweave.errors import AlreadyActive, CompositionError
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Factors


def test_an_exception_in_the_update_itself_leaves_nothing(engine):
    base = logits(engine.model)
    with pytest.raises(ValueError, match="batch_size"), engine.activate({"a": 1.0}):
        engine.model(input_ids=IDS, labels=IDS[:, :2])
    with pytest.raises(ZeroDivisionError), engine.activate(_Failing()):
        logits(engine.model)
    assert num_hooks(engine.model) == 0
    assert torch.equal(logits(engine.model), base)


class _Failing:
    def weights(self, x_BTI, layer):
        return torch.full((1, 1, 3), 1 / 0)


def test_an_inner_activation_that_has_ended_is_kept_by_no_layer(engine):
    with engine.activate({"a": 1.0}):
        with engine.activate({"b": 1.0}) as inner:
            logits(engine.model)
        ended = weakref.ref(inner)
        del inner
        gc.collect()
        assert ended() is None


def test_an_activation_that_outlived_the_one_around_it_ends_without_the_others(engine):
    with engine.activate({"a": 1.0}):
        expected = logits(engine.model)
        with engine.activate({"b": 1.0}):
            inner = engine.activate({"b": -1.0})
        assert torch.equal(logits(engine.model), expected)
        inner.__exit__(None, None, None)
        assert torch.equal(logits(engine.model), expected)
    assert num_hooks(engine.model) == 0


def test_a_handle_is_not_closed_by_another_thread(engine):
    handle = engine.activate({"a": 1.0})
    assert isinstance(in_thread(handle.close), AlreadyActive)
    assert engine.active
    handle.close()


def test_the_handle_of_a_thread_that_ended_can_be_closed(engine):
    base = logits(engine.model)
    handle = in_thread(lambda: engine.activate({"a": 1.0}))
    assert engine.active
    assert torch.equal(logits(engine.model), base)
    handle.close()
    assert not engine.active


def test_a_thread_of_ones_own_is_the_base_unless_the_activation_runs_it(engine):
    base = logits(engine.model)
    with engine.activate([{"a": 1.0}, None, {"b": 1.0}]) as activation:
        inside = logits(engine.model)
        assert torch.equal(in_thread(lambda: logits(engine.model)), base)
        assert torch.equal(in_thread(lambda: activation.run(logits, engine.model, ids=IDS)), inside)
        # the call's own context is left as it was
        with engine.activate({"c": 1.0}):
            inner = logits(engine.model)
            assert torch.equal(activation.run(logits, engine.model), inside)
            assert torch.equal(logits(engine.model), inner)
    with pytest.raises(CompositionError, match="closed, and runs nothing"):
        activation.run(logits, engine.model)


def test_a_run_keeps_its_mixture_when_the_activation_is_closed_meanwhile(engine):
    entered, closed = threading.Event(), threading.Event()

    def work():
        entered.set()
        closed.wait(10)
        return logits(engine.model)

    with engine.activate({"a": 1.0}):
        expected = logits(engine.model)
    found = []
    with engine.activate({"a": 1.0}) as activation:
        thread = threading.Thread(target=lambda: found.append(activation.run(work)))
        thread.start()
        entered.wait(10)
    assert engine.active
    closed.set()
    thread.join()
    assert torch.equal(found[0], expected)
    assert not engine.active


def test_to_thread_takes_the_mixture_along(engine):
    async def answer():
        with engine.activate({"a": 1.0}):
            return await asyncio.to_thread(logits, engine.model)

    found = asyncio.run(answer())
    with engine.activate({"a": 1.0}):
        assert torch.equal(found, logits(engine.model))


def test_asyncio_tasks_do_not_meet(engine):
    async def answer(mixture):
        with engine.activate(mixture):
            await asyncio.sleep(0)
            found = logits(engine.model)
            await asyncio.sleep(0)
        return found

    async def both():
        return await asyncio.gather(answer({"a": 1.0}), answer({"b": 1.0}))

    together = asyncio.run(both())
    for found, name in zip(together, "ab", strict=True):
        with engine.activate({name: 1.0}):
            assert torch.equal(found, logits(engine.model))


def test_a_context_that_outlives_its_activation_is_the_base(engine):
    base = logits(engine.model)
    with engine.activate({"a": 1.0}):
        context = contextvars.copy_context()
        inside = logits(engine.model)
        assert torch.equal(context.run(logits, engine.model), inside)
    assert torch.equal(context.run(logits, engine.model), base)


def test_an_abandoned_generator_leaves_nothing(engine):
    def stream():
        with engine.activate({"a": 1.0}):
            while True:
                yield logits(engine.model)

    base = logits(engine.model)
    for _ in range(3):
        generator = stream()
        next(generator)
        del generator
        gc.collect()
    assert num_hooks(engine.model) == 0
    assert torch.equal(logits(engine.model), base)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_made_while_active_is_the_base(copied, engine):
    base = logits(engine.model)
    with engine.activate({"a": 1.0}):
        twin = copied(engine.model)
        assert torch.equal(logits(twin), base)
    assert torch.equal(logits(twin), base)


def attributes(model):
    """What every module has beside its class, and how much is in it."""
    return {
        name: {key: len(value) if isinstance(value, dict) else 1 for key, value in vars(module).items()}
        for name, module in model.named_modules()
    }


def unpickled(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, unpickled])
@pytest.mark.parametrize("kind", ["one mixture", "blocks", "prompts"])
def test_a_copy_made_while_active_has_nothing_that_the_base_has_not(kind, copied, make_model, make_adapters, tokenizer):
    model = make_model("llama")
    pool = ExpertPool(make_adapters(model, "llama"))
    model.lm_head.register_forward_hook(seen, with_kwargs=True)
    before, base = attributes(model), logits(model)
    mixtures = {"blocks": WatchesBlocks(pool), "prompts": ReadsText(pool.names)}
    with Composer(model, pool, tokenizer=tokenizer).activate(mixtures.get(kind, {"a": 1.0})):
        assert ("generate" in vars(model)) == (kind == "prompts")
        twin, part = copied(model), copied(model.model)
        assert torch.equal(logits(twin), base)
    assert attributes(twin) == before
    assert num_hooks(part) == 0
    assert attributes(model) == before


class WatchesBlocks(TokenRouter):
    """A router that is shown the input of each block."""

    watched = ("model.layers.0", "model.layers.1")

    def weights(self, x_BTI, layer):
        return torch.full((1, 1, len(self.experts)), 0.5)


class ReadsText:
    """A router that is told the prompts of generate()."""

    needs_tokenizer = True

    def __init__(self, experts):
        self._weights = MixtureWeights.of({experts[0]: 1.0}, experts)

    def begin(self, model, arguments):
        return self._weights

    def weights(self, x_BTI, layer):
        return self._weights.weights(x_BTI, layer)


def seen(module, args, kwargs, output):
    """A hook of the caller's own, which a copy keeps."""


@pytest.mark.own_models
def test_state_and_saved_files_while_active_are_the_bases(engine, tmp_path):
    before = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    base = logits(engine.model)
    with engine.activate({"a": 1.0}):
        inside = engine.model.state_dict()
        engine.model.save_pretrained(tmp_path)
    assert inside.keys() == before.keys()
    assert all(torch.equal(inside[name], before[name]) for name in before)
    assert torch.equal(logits(type(engine.model).from_pretrained(tmp_path).eval()), base)


def test_users_hooks_see_the_mixed_output(engine):
    seen = []
    layer = engine.model.lm_head
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    with engine.activate({"c": 1.0}):
        found = logits(engine.model)
    handle.remove()
    assert torch.equal(seen[0], found)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.own_models
def test_the_factors_follow_a_model_that_changes_its_dtype(dtype, engine):
    with engine.activate({"a": 0.5, "b": -0.5}):
        before = logits(engine.model)
        engine.model.to(dtype)
        after = logits(engine.model)
    assert after.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float64 else 0.3
    assert float((before.double() - after.double()).abs().max()) <= tolerance


def test_autocast_mixes_like_any_half_precision_layer(engine):
    with engine.activate({"a": 0.5, "b": -0.5}):
        exact = logits(engine.model)
        with torch.autocast("cpu", torch.bfloat16):
            found = logits(engine.model)
    assert float((exact - found.float()).abs().max()) <= 0.3


@pytest.mark.own_models
def test_training_works_after_a_first_use_in_inference_mode(engine):
    mixture = MixtureWeights(torch.ones(1, 1, 1, 3), ("a", "b", "c"))
    with engine.activate(mixture):
        with torch.inference_mode():
            engine.model(input_ids=IDS)
        engine.model(input_ids=IDS).logits.sum().backward()
    assert engine.model.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize("start", [0.0, 0.7])
def test_gradients_of_weights_and_input_equal_the_dense_formulas(start):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model = nn.Sequential(nn.Linear(5, 4)).double()
    # factors are stored in fp32, and the formula is exact for what is stored
    factors = [Factors(*(random(*shape).float() for shape in ((r, 5), (4, r), (4,), (4,)))) for r in (1, 3)]
    engine = Composer(model, [Adapter(name, "tiny", {"0": f}) for name, f in zip("ab", factors, strict=True)])
    x = random(2, 3, 5).requires_grad_()
    values = torch.full((2, 3, 1, 2), start, dtype=torch.float64, requires_grad=True)
    with engine.activate(MixtureWeights(values, ("a", "b"))):
        model(x).square().sum().backward()
    found = values.grad, x.grad

    x2, values2 = x.detach().clone().requires_grad_(), values.detach().clone().requires_grad_()
    linear = model[0]
    y = x2 @ linear.weight.T + linear.bias
    for index, f in enumerate(factors):
        update = x2 @ (f.b_OR.double() @ f.a_RI.double()).T + f.gain_O * (x2 @ linear.weight.T) + f.bias_O
        y = y + values2[:, :, 0, index, None] * update
    y.square().sum().backward()
    assert torch.allclose(found[0], values2.grad, rtol=1e-10, atol=1e-10)
    assert torch.allclose(found[1], x2.grad, rtol=1e-10, atol=1e-10)


# the name that transformers 5.3 knows
@pytest.mark.filterwarnings("ignore:`(gradient_checkpointing_enable|is_gradient_checkpointing)` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, make_model, make_adapters):
    gradients = []
    for checkpointed in (False, True):
        model = make_model("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with Composer(model, make_adapters(model, "llama")).activate({"a": 1.0, "b": 0.5}):
            model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append(model.model.embed_tokens.weight.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_a_replica_of_the_model_is_refused(engine):
    with engine.activate({"a": 1.0}):
        # what DataParallel makes for each device: another object with the same attributes
        replica = engine.model._replicate_for_data_parallel()
        answer = in_thread(lambda: replica(IDS))
    assert isinstance(answer, CompositionError)
    assert "replica" in str(answer)


def test_other_activations_do_not_see_each_others_engines(make_adapter):
    models = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
    adapter = Adapter("a", "tiny", {"0": Factors(torch.ones(1, 4), torch.ones(4, 1))})
    engines = [Composer(model, [adapter]) for model in models]
    x = torch.ones(2, 4)
    with torch.no_grad():
        base = [model(x) for model in models]
        with engines[0].activate({"a": 1.0}), engines[1].activate({"a": 2.0}):
            assert torch.allclose(models[0](x), base[0] + 4.0)
            assert torch.allclose(models[1](x), base[1] + 8.0)


def test_many_activations_and_swaps_leave_no_memory(engine, make_adapters):
    adapters = make_adapters(engine.model, "llama")
    counts = []
    for _ in range(3):
        for number in range(40):
            with engine.activate([{"a": 1.0 + number}, {"b": 1.0}, None]):
                logits(engine.model, IDS[:, :2])
            engine.swap(adapters)
        gc.collect()
        counts.append(sum(type(each) in (Tensor, nn.Parameter) for each in gc.get_objects()))
    assert counts[1] == counts[2]


def test_an_interruption_while_layers_are_taken_over_leaves_nothing(engine, monkeypatch):
    original = mixer._MixedForward
    for stop_at in range(len(engine.pool.layer_names)):
        calls = 0

        def interrupted(*args, stop_at=stop_at):
            nonlocal calls
            calls += 1
            if calls - 1 == stop_at:
                raise KeyboardInterrupt
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(mixer, "_MixedForward", interrupted)
            with pytest.raises(KeyboardInterrupt):
                engine.activate({"a": 1.0})
        assert num_hooks(engine.model) == 0
        assert not engine.active
    with engine.activate({"a": 1.0}):
        pass


def test_a_thread_of_autograd_belongs_to_the_only_activation_or_is_named(engine, monkeypatch):
    # with a GPU, autograd runs checkpointed layers again in a thread of its own, which has no context
    monkeypatch.setattr("loraweave.composer.live.mixer.in_backward_thread", lambda: True)
    with engine.activate({"a": 1.0}):
        expected = logits(engine.model)
        assert torch.equal(in_thread(lambda: logits(engine.model)), expected)
        with engine.activate({"b": 1.0}):
            answer = in_thread(lambda: logits(engine.model))
    assert isinstance(answer, CompositionError)
    assert "2 activations" in str(answer)
