"""The running model under what users do to it: errors anywhere, threads, forks, hooks of their own."""

import contextlib
import gc
import os
import signal
import sys
import threading
import weakref
from functools import partial

import pytest
import torch
from live_models import IDS, in_threads, logits, num_hooks
from torch import nn

from loraweave.composer.composer import Composer

ROWS = [{"a": 1.0}, None, {"b": 1.0, "c": -0.5}]
SETTINGS = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "do_sample": False}


@pytest.fixture
def unharmed(engine):
    """After the test: nothing active, no hook, the base's bits, and an engine that still works."""
    base = logits(engine.model)
    state = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    with engine.activate(ROWS):
        mixed = logits(engine.model)
    yield
    assert not engine.active
    assert num_hooks(engine.model) == 0
    assert torch.equal(logits(engine.model), base)
    assert all(torch.equal(tensor, state[name]) for name, tensor in engine.model.state_dict().items())
    with engine.activate(ROWS):
        assert torch.equal(logits(engine.model), mixed)


class Stumbling:
    """A router that raises at its n-th layer."""

    def __init__(self, at, error):
        self.left = at
        self.error = error

    def weights(self, x_BTI, layer):
        if self.left == 0:
            raise self.error("injected")
        self.left -= 1
        return torch.ones(1, 1, 3)


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.usefixtures("unharmed")
def test_a_router_that_raises_at_any_layer_leaves_nothing(error, engine):
    for at in range(len(engine.target_layers)):
        with pytest.raises(error, match="injected"), engine.activate(Stumbling(at, error)):
            logits(engine.model)
        assert not engine.active


@pytest.mark.parametrize(
    ("error", "call"),
    [(RuntimeError, 1), (torch.OutOfMemoryError, 1), (KeyboardInterrupt, 1), (RuntimeError, 2), (KeyboardInterrupt, 2)],
)
@pytest.mark.usefixtures("unharmed")
def test_an_exception_at_any_module_of_the_prompt_or_a_later_token_leaves_nothing(error, call, engine):
    # a module list is never called
    for module in (each for each in engine.model.modules() if not isinstance(each, nn.ModuleList)):
        calls = 0

        def fail(*_):
            nonlocal calls
            calls += 1
            if calls == call:
                raise error("injected")

        handle = module.register_forward_hook(fail)
        with pytest.raises(error, match="injected"), engine.activate(ROWS):
            engine.model.generate(IDS, **SETTINGS)
        handle.remove()
        assert not engine.active
        assert num_hooks(engine.model) == 0


@pytest.mark.usefixtures("unharmed")
def test_an_exception_in_a_streamer_leaves_nothing(engine):
    class Failing:
        def put(self, tokens):
            if tokens.ndim == 1:
                raise BrokenPipeError

        def end(self):
            pass

    with pytest.raises(BrokenPipeError), engine.activate(ROWS):
        engine.model.generate(IDS, **SETTINGS, streamer=Failing())


@pytest.mark.parametrize(
    "where", ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.0.self_attn.q_proj", "model.norm"]
)
@pytest.mark.usefixtures("unharmed")
@pytest.mark.own_models
def test_an_exception_in_the_backward_leaves_nothing(where, engine):
    def fail(*_):
        raise RuntimeError("injected")

    handle = engine.model.get_submodule(where).register_full_backward_hook(fail)
    with pytest.raises(RuntimeError, match="injected"), engine.activate(ROWS):
        engine.model(input_ids=IDS, labels=IDS).loss.backward()
    handle.remove()
    engine.model.zero_grad()


# one that strikes while a weak reference is cleared is reported, and goes no further
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("unharmed")
def test_interruptions_at_any_moment_of_a_forward_leave_nothing(engine):
    stopped = 0
    for tenths_of_ms in range(1, 41):
        handle = engine.activate(ROWS)
        try:
            signal.setitimer(signal.ITIMER_REAL, tenths_of_ms / 10_000)
            for _ in range(100):
                logits(engine.model)
        except _Alarm:
            stopped += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            handle.close()
        assert not engine.active
    assert stopped > 20


# one that strikes while a weak reference is cleared is reported, and goes no further
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("unharmed")
def test_interruptions_at_any_moment_of_opening_and_closing_leave_nothing(engine):
    interrupted_inside = 0
    for microseconds in range(20, 620, 2):
        try:
            signal.setitimer(signal.ITIMER_REAL, microseconds / 1e6)
            for _ in range(100):
                with engine.activate(ROWS):
                    pass
        except _Alarm:
            pass
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        if engine.active:
            # Python itself lets an interruption in between a call and the `with` that it is for
            interrupted_inside += 1
            for activation in list(engine._live._open):
                engine._live.end(activation)
        assert num_hooks(engine.model) == 0
        assert not any("forward" in vars(module) for module in engine.model.modules())
    assert interrupted_inside < 30


class _Alarm(BaseException):
    pass


@pytest.fixture(autouse=True)
def alarms():
    def ring(*_):
        raise _Alarm

    before, grad_enabled = signal.signal(signal.SIGALRM, ring), torch.is_grad_enabled()
    yield
    signal.signal(signal.SIGALRM, before)
    # one that strikes while torch leaves a no_grad block keeps the thread in it
    torch.set_grad_enabled(grad_enabled)


@pytest.mark.usefixtures("unharmed")
def test_eight_threads_generate_under_their_own_mixtures(engine):
    mixtures = [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}, ROWS, ROWS[::-1], {"a": -1.0, "c": 0.5}, {}, None]

    def generated(mixture):
        with contextlib.nullcontext() if mixture is None else engine.activate(mixture):
            return engine.model.generate(IDS, **SETTINGS)

    def work(mixture, expected):
        for _ in range(4):
            assert torch.equal(generated(mixture), expected)

    calls = [partial(work, mixture, generated(mixture)) for mixture in mixtures]
    assert in_threads(calls) == [None] * len(mixtures)


@pytest.mark.usefixtures("unharmed")
def test_threads_that_open_new_mixtures_all_the_time_do_not_disturb_each_other(engine):
    threads, times = 6, 10
    mixtures = [[{"a": 1.0 + number / 8, "b": thread / 8} for number in range(times)] for thread in range(threads)]
    # the same one again in every thread, at its own time
    mixtures = [[*own, *[{"c": 1.0}, ROWS] * 2] for own in mixtures]
    expected = []
    for own in mixtures:
        for mixture in own:
            with engine.activate(mixture):
                expected.append(logits(engine.model))
    fresh = Composer(engine.model, engine.pool)

    def work(own):
        answers = []
        for mixture in own:
            with fresh.activate(mixture):
                answers.append(logits(engine.model))
        return answers

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    found = in_threads([partial(work, own) for own in mixtures])
    sys.setswitchinterval(interval)
    assert [answers for answers in found if isinstance(answers, BaseException)] == []
    flat = [answer for answers in found for answer in answers]
    assert all(torch.equal(one, other) for one, other in zip(flat, expected, strict=True))


@pytest.fixture
def one_thread():
    """torch on one thread: a forked process has none of OpenMP's others, and torch would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def in_child(call):
    """Whether `call` returns True in a forked process, within ten seconds."""
    process = os.fork()
    if process == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)
        try:
            os._exit(0 if call() else 1)
        except BaseException:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread", "unharmed")
def test_a_forked_process_answers_like_its_parent(engine):
    base = logits(engine.model)
    with engine.activate(ROWS):
        expected = logits(engine.model)
        assert in_child(lambda: torch.equal(logits(engine.model), expected))

        def close_in_child():
            with engine.activate({"a": 1.0}):
                logits(engine.model)
            return torch.equal(logits(engine.model), expected)

        assert in_child(close_in_child)
        assert torch.equal(logits(engine.model), expected)
    assert in_child(lambda: torch.equal(logits(engine.model), base))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.usefixtures("one_thread", "unharmed")
def test_a_process_forked_while_another_thread_opens_and_closes_is_free_of_it(engine):
    base = logits(engine.model)
    with engine.activate({"c": 1.0}):
        expected = logits(engine.model)
    stop = threading.Event()

    def open_and_close():
        while not stop.is_set():
            with engine.activate(ROWS):
                pass

    def answer():
        rested = not engine.active and torch.equal(logits(engine.model), base)
        with engine.activate({"c": 1.0}):
            mixed = torch.equal(logits(engine.model), expected)
        engine.close()
        return rested and mixed and not any("forward" in vars(module) for module in engine.model.modules())

    thread = threading.Thread(target=open_and_close)
    thread.start()
    try:
        for _ in range(20):
            assert in_child(answer)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("order", ["before", "after"])
def test_users_own_hooks_meet_the_layer_as_if_its_weights_were_the_mixtures(
    order, make_model, make_adapters, with_dense_update
):
    model = make_model("llama", dtype=torch.float64)
    adapters = make_adapters(model, "llama")
    dense = with_dense_update("llama", adapters, [1.0, 0.0, -0.5], dtype=torch.float64)

    def hooked(model, seen):
        layer = model.model.layers[1].self_attn.v_proj
        return [
            layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)),
            layer.register_forward_hook(lambda module, args, output: output.tanh()),
            layer.register_full_backward_hook(lambda module, inputs, outputs: seen.extend([*inputs, *outputs])),
            layer.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2.0,)),
            model.register_forward_hook(lambda module, args, output: seen.append(output.logits.detach())),
        ]

    def run(model):
        # the input's gradient exists only below a parameter that learns
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()

    expected = []
    hooked(dense, expected)
    run(dense)

    found = []
    handles = hooked(model, found) if order == "before" else []
    with Composer(model, adapters).activate({"a": 1.0, "c": -0.5}):
        handles += hooked(model, found) if order == "after" else []
        run(model)
        for handle in handles:
            handle.remove()
    assert num_hooks(model) == 0
    assert len(found) == len(expected) == 3
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-9) for one, other in zip(found, expected, strict=True))


@pytest.mark.own_models
def test_what_users_set_on_the_model_while_active_stays(engine):
    with engine.activate(ROWS):
        mixed = logits(engine.model)
        engine.model.train()
        engine.model.requires_grad_(False)
        assert torch.equal(logits(engine.model), mixed)
    assert engine.model.training
    assert not any(parameter.requires_grad for parameter in engine.model.parameters())
    assert num_hooks(engine.model) == 0


@pytest.mark.parametrize("times", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("unharmed")
def test_activations_by_the_thousand_leave_memory_flat(times, engine):
    def open_and_close(times):
        for number in range(times):
            with engine.activate([{"a": float(number)}, None, {"b": 1.0}]):
                pass
        gc.collect()
        return len(gc.get_objects())

    first = open_and_close(100)
    # an object that is left behind by each; threads of other tests make a few meanwhile
    assert open_and_close(times) < first + times // 2


@pytest.mark.own_models
def test_a_forward_that_someone_put_around_a_layer_meanwhile_stays_and_mixes_once(engine):
    base = logits(engine.model)
    with engine.activate(ROWS):
        mixed = logits(engine.model)
        inner = engine.model.lm_head.forward
        engine.model.lm_head.forward = lambda x: inner(x)
        assert torch.equal(logits(engine.model), mixed)
    assert torch.equal(logits(engine.model), base)
    for _ in range(2):
        with engine.activate(ROWS):
            assert torch.allclose(logits(engine.model), mixed, rtol=1e-5, atol=1e-5)
        assert torch.equal(logits(engine.model), base)


def test_a_model_is_freed_with_its_last_reference(make_model, make_adapters, tokenizer):
    model = make_model("llama")
    engine = Composer(model, make_adapters(model, "llama"), tokenizer=tokenizer)
    with engine.activate(ROWS) as closed:
        logits(model)
    pieces = engine.stream(["ab"], mixture={"a": 1.0}, max_new_tokens=8)
    next(pieces)
    engine.generate(["ab"], mixture={"b": 1.0}, max_new_tokens=2)
    gone = [weakref.ref(engine), weakref.ref(model), weakref.ref(model.lm_head), weakref.ref(closed)]
    del engine, model, pieces, closed
    gc.collect()
    assert [reference() for reference in gone] == [None] * 4
