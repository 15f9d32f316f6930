"""The Composer: an engine that puts a pool of experts into a model while an activation is open or a mixture is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from loraweave.common.chat import Prompt
from loraweave.common.checks import is_collection, is_list
from loraweave.common.display import tracked
from loraweave.common.process import lock_of
from loraweave.common.rows import GivenRows
from loraweave.composer.live import pages
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.live.mixer import Activation, LiveLayers
from loraweave.composer.live.plan import KeptPlans
from loraweave.composer.live.recording import Setting, Trace, UsedWeights, last_weights, recording
from loraweave.composer.live.residents import Residency, Residents
from loraweave.composer.live.resolve import resolve, warn_of_licenses
from loraweave.composer.live.standing_in import CLAIMS
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import untouched
from loraweave.composer.model.layers import TargetLayer
from loraweave.errors import AlreadyActive, CompositionError, ScopeError, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import Parts, model_of
from loraweave.hub.pool import ExpertPool, require_no_heads
from loraweave.routers.combined import masked, num_rows_of
from loraweave.routers.weights import MixtureWeights, Router
from loraweave.types import Task

if TYPE_CHECKING:
    from loraweave.composer.fused.fused import Fused
    from loraweave.composer.fused.overwritten import Place
    from loraweave.composer.merge.method_call import AdapterStatistics
    from loraweave.composer.model.generate import Asked
    from loraweave.routers.tokens._learned import LearnedRouter


class Composer:
    """The engine that puts the experts of `pool` into `model`; `pool` is a pool, a list of adapters, or {name: adapter}.

    The model may be a pipeline (docs/extensions/diffusion.md). Making a Composer changes nothing in the model, but checks
    every adapter (a lazy pool's on first use): whether the model is its base, by docs/identity.md (BaseModelMismatch; a
    warning, BaseModelUnverified, where only names and shapes match), and each layer's presence, kind and shape
    (LayerMismatch). A trained magnitude or bias is resolved against the base's current weights. Adapters' factors are not
    trained. Used experts stay in memory on the layers' devices. `device_budget_bytes` bounds their bytes on devices other
    than the CPU, `host_budget_bytes` in the CPU's memory; the least recently used then make room (docs/pools.md). None is no
    limit.
    """

    def __init__(
        self,
        model: Any,
        pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter],
        *,
        tokenizer: Any = None,
        device_budget_bytes: int | None = None,
        host_budget_bytes: int | None = None,
    ) -> None:
        if hasattr(model, "_orig_mod"):
            raise CompositionError(
                "this model is the wrapper that torch.compile made; pass the model itself: the wrapper follows it"
            )
        self.model = model_of(model)
        self.tokenizer = tokenizer
        self._lock = lock_of(self)
        self._fused = False
        self._closed = False
        self._plans = KeptPlans()
        self._fitting = Fitting(self.model)
        self._pool = self._fitting.placed(ExpertPool.of(pool))
        self._bound = self._fitting.pool(self._pool)
        self._live = LiveLayers(self.model, self._fitting.layers, self._fitting.require_unchanged, self._plans.hooks)
        self._residents = Residents(
            *self._source(), device_budget_bytes=device_budget_bytes, host_budget_bytes=host_budget_bytes
        )

    @property
    def pool(self) -> ExpertPool:
        """The pool of experts, in their order."""
        return self._pool

    @property
    def bound_pool(self) -> ExpertPool:
        """The experts with values that depend on the base layers resolved (DoRA's magnitude, a trained bias).

        Raises AdapterUnsupported for an expert with trained heads: its update is the difference to this model's own head,
        which is random if the model was loaded without a head, so that it must not be saved.
        """
        for name in self._pool.headed:
            require_no_heads(name, self._pool[name])
        return self._bound

    def bound(self, name: str) -> Adapter:
        """Return an expert with base-dependent values resolved, for inspection only. Raises UnknownExpert."""
        return self._bound[name]

    @property
    def target_layers(self) -> Mapping[str, TargetLayer]:
        """The model's layers that some expert updates, by module path; for a lazy pool, the experts opened so far."""
        return self._fitting.layers

    @property
    def active(self) -> bool:
        """True if the model answers for a mixture: an activation is open in some thread, or weights are fused."""
        return self._fused or self._live.active

    @property
    def residency(self) -> Residency:
        """The hits, misses, evictions and bytes moved so far, and what is resident now; it prints as a small table."""
        return self._residents.residency

    def activate(self, mixture: Any) -> Activation:
        """Mix the experts live, from now until the handle is closed or its `with` block left.

        `mixture` is {name: weight} for all rows, or {name: {start of a layer's path: weight}}; a list with one of these, or
        None for the base, per row of the batch; MixtureWeights; a router; for pipelines also a function of (step, steps)
        that gives one, or a Composite. It counts in this thread (or asyncio task); the handle's `run` takes it into another.
        y = W x + ((x a^T) * w) b^T + sum over e of w_e (gain_e y0 + bias_e); rows of weight zero are the base bit for bit.
        In a batch of k times as many rows as the mixture has (beams, return sequences), each counts for k consecutive ones.
        An expert with invocation tokens has its weight from the last place in a row's prompt that has them on, 0 before.

        Inside another activation of this Composer the inner one replaces the outer. A backward pass with gradient
        checkpointing belongs inside the block, since it runs the layers again, and so does one of a model compiled by
        torch.compile. Raises WeightingError for mixtures that do not fit, BudgetExceeded for experts of more bytes than they
        may have, AlreadyActive while fused or while another Composer is active.
        """
        with self._lock:
            self._require_open()
            as_weights, by_call = partial(resolve, pool=self._pool, bound=self._bound), None
            if isinstance(self.model, Parts):
                weights, by_call = self._plans.calls(self.model, mixture, as_weights, self.activate)
            else:
                weights = as_weights(mixture)
            if self._fused:
                raise AlreadyActive("cannot activate while a mixture is fused into the weights: leave fused() first")
            plan = self._plans.plan(weights, self._pool)
            if by_call is not None:
                plan = plan.with_calls(by_call)
            if plan.call_router is not None:
                plan.call_router.take_tokenizer(self.tokenizer)
            warn_of_licenses(weights, self._pool)
            lease = self._residents.lease(plan.experts)
            try:
                self._fitting.limits.require(weights, self._bound.adapters, by_token=bool(plan.invocations))
                self._fitting.require_unchanged(plan.experts, closely=True)
                self._live.add(self._fitting.layers)
            except BaseException:
                lease.release()
                raise
            return self._live.open(plan, lease)

    @property
    def last_weights(self) -> UsedWeights:
        """The weights that the last forward under an activation used, as {layer: w_BTE}, with load() and entropy.

        They belong to this thread (or asyncio task), and are empty if no forward ran in it since swap(). For a layer that
        ran several times, the last call counts. Raises CompositionError for weights by token of over 64 MiB, which only
        record() keeps.
        """
        return last_weights(self._live, Setting(self._bound, self._fitting))

    def record(self) -> AbstractContextManager[Trace]:
        """Record the weights of every call in this thread: `with engine.record() as trace:`; trace.weights joins them.

        They stay on the model's devices until the trace goes. Their pool is the one that the engine has at this call.
        Raises AlreadyActive while fused, where no layer mixes.
        """
        self._require_not_fused("record weights")
        return recording(self._live, Setting(self._bound, self._fitting))

    def leave_one_out(
        self, task: Task | GivenRows, mixture: Any, *, renormalise: bool = False, progress: bool = True
    ) -> dict[str, float]:
        """Return {expert: rise in nats of the mean loss on a task's examples when the expert's weight is set to 0}.

        `mixture` is as for activate(), of one row. The rise is negative if the model is better without the expert. The other
        experts keep their weights; with `renormalise` each token's weights are scaled to their former sum. Raises
        CompositionError without a tokenizer, ScopeError for a mixture of several rows, AlreadyActive while fused.
        """
        self._require_not_fused("leave experts out")
        self._require_tokenizer("leave_one_out()")
        router = resolve(mixture, self._pool, self._bound)
        names = router.experts if isinstance(router, MixtureWeights) else self._pool.names
        if (num_rows := num_rows_of(router)) != 1:
            raise ScopeError(f"leave_one_out() takes one mixture for all examples, but this one has {num_rows} rows")
        judged = Task.of(task)
        rows = scoring.encode_pairs(self.model, self.tokenizer, judged, judged.examples)

        def mean_loss(mixture: Router) -> float:
            with untouched(self.model), self.activate(mixture):
                losses = scoring.losses_of_rows(self.model, self.tokenizer, rows)
            return sum(losses) / len(losses)

        whole = mean_loss(router)
        places = tracked(range(len(names)), "leaving experts out", total=len(names), shown=progress)
        return {names[at]: mean_loss(masked(router, at, renormalise=renormalise)) - whole for at in places}

    @contextmanager
    def fused(
        self,
        mixture: Any,
        *,
        method: str = "linear",
        seed: int = 0,
        statistics: Mapping[str, AdapterStatistics] | None = None,
        originals: Place = "memory",
        max_loss: float | None = None,
        **options: Any,
    ) -> Iterator[Fused]:
        """Write a task-scope mixture into the weights for a `with` block, and restore them bit for bit after it.

        `method` is a name of `names("methods")`, `seed` seeds random methods, `statistics` has each expert's statistics for
        methods that weigh by data, `options` are the method's own. Nothing is written before all new values are known to be
        finite. Unlike activate(), it holds for all threads. The block's handle can `switch` to another mixture.

        The originals of the touched weights are kept, as many bytes as these have: in "memory", or on "disk", in a file in
        the folder for temporary files (TMPDIR) that only this process can read and that is gone with it. With `max_loss` a
        quantised layer is quantised again if that loses at most this share of its update, else it adds the update live.
        Raises ScopeError for weights that vary per row or token, AlreadyActive while active, CompositionError for layers
        that cannot be written (tied, or quantised without `max_loss`) and results not finite; then nothing changes.
        """
        from loraweave.composer.fused.fused import fused, mixture_updates

        self._require_idle("fuse")
        self._fitting.require_unchanged(closely=True)
        make = partial(mixture_updates, self._pool, self._bound, self._fitting)
        updates = make(mixture, method, seed, statistics, options)
        modules = [self.model, *(layer.module for layer in self.target_layers.values())]
        mine = False
        try:
            with self._lock:
                self._require_idle("fuse")
                mine = self._fused = True
            CLAIMS.take(self._live, modules)
            with fused(self.model, make, updates, originals, max_loss) as written:
                yield written
        finally:
            if mine:
                self._fused = False
                CLAIMS.give_back(self._live, modules)

    def generate(
        self, texts: Sequence[Asked], *, mixture: Any = None, seeds: Sequence[int] | None = None, **generate_kwargs: Any
    ) -> list[str]:
        """Return the model's continuation of each text (an encoder-decoder's answer), decoded without special tokens.

        For a conversation, a list of {"role", "content"}, it is the assistant's next turn, in the tokenizer's chat template.
        `mixture` is what activate() takes, with one row per text where it has rows; None leaves what is active. The other
        arguments go to the model's own `generate`. With num_return_sequences=n, each text has n answers in a row. `seeds`,
        one per text, make sampling draw for each text what it would draw alone under its seed. Raises ScopeError for rows or
        seeds that are not as many as the texts, CompositionError for ways of decoding that run downloaded code or a thread
        of their own; docs/generation.md has the list.
        """
        from loraweave.composer.model.generate import generation_call

        prompts, resolved = self._resolve_texts(texts, mixture)
        if not prompts:
            return []
        call = generation_call(self.model, self.tokenizer, prompts, seeds, generate_kwargs)
        with nullcontext() if resolved is None else self.activate(resolved):
            return call.texts(call.output(self.model))

    def stream(
        self, texts: Sequence[Asked], *, mixture: Any = None, seeds: Sequence[int] | None = None, **generate_kwargs: Any
    ) -> Iterator[list[str]]:
        """Return an iterator over the output of generate() as it comes: lists with one piece of text per answer.

        The model runs in another thread, under the mixture that generate() would use here, even after the block around this
        call is left. To stop early, close the iterator or drop it. Raises the errors of generate(), at once where that is
        possible, and CompositionError for beams.
        """
        from loraweave.composer.model.generate import generation_call, stream

        prompts, resolved = self._resolve_texts(texts, mixture)
        if not prompts:
            return iter(())
        call = generation_call(self.model, self.tokenizer, prompts, seeds, generate_kwargs)
        call.require_streaming()
        outer = self._live.current() if resolved is None else None

        def generate(streamer: Any) -> None:
            if outer is not None:
                outer.run(call.output, self.model, streamer)
                return
            with nullcontext() if resolved is None else self.activate(resolved):
                call.output(self.model, streamer)

        return stream(generate, self.tokenizer)

    def _resolve_texts(self, texts: Sequence[Asked], mixture: Any) -> tuple[list[Prompt], MixtureWeights | Router | None]:
        """Return (prompts, resolved mixture or None). Raises CompositionError for a bad text, ScopeError for a mixture."""
        from loraweave.composer.model.generate import read_prompt

        self._require_open()
        self._require_tokenizer("generate() and stream()", "need")
        if not is_collection(texts):
            raise CompositionError(
                f"generate() and stream() take a list of texts, but got {texts!r:.80}: put one text into a list"
            )
        prompts = [read_prompt(text, number) for number, text in enumerate(texts)]
        if mixture is None:
            return prompts, None
        resolved = resolve(mixture, self._pool, self._bound)
        num_rows, num_tokens = num_rows_of(resolved), 1
        if isinstance(resolved, MixtureWeights):
            num_tokens = resolved.values_BTLE.shape[1]
        if num_rows not in (1, len(texts)):
            raise ScopeError(f"the mixture has {num_rows} rows, but there are {len(texts)} texts; give one for each")
        if num_tokens != 1:
            raise ScopeError(
                f"the mixture has weights for {num_tokens} tokens, and none for those to come: give a router, or "
                "weights that all tokens share"
            )
        return prompts, resolved

    def fit(self, router: LearnedRouter, dataset: Any, **settings: Any) -> None:
        """Train a router's parameters on `dataset`; the base and the adapters are not trained.

        `dataset` is {name of an expert or a task: rows or a Task}, or rows: pairs (input, target), {"input", "target"} with
        "instruction" and "expert" where known, {"prompt", "target"}, or {"input_ids", "labels"}. The loss is that of the
        targets alone. `settings` are the fields of `RouterSettings`; docs/router_training.md explains them. Afterwards the
        router is in evaluation mode, on the model's device, and has a `report`. Raises InvalidTask for rows that cannot be
        used, UnknownExpert for experts outside the pool, TrainingError for settings out of range, for parameters without a
        gradient, and for a loss or gradient that is not finite: the router then has the last good parameters.
        """
        from loraweave.composer.train.routers import fit, require_learning

        self._require_open()
        require_learning(router)
        resolve(router, self._pool, self._bound)
        fit(self.model, self.tokenizer, self.activate, router, dataset, settings)

    def prefetch(self, wanted: Any) -> Future[None]:
        """Begin to copy experts to the layers' devices in the background: those of a mixture, or of a list of names.

        The future ends when they are there. It carries any error, which the activation that needs the expert raises again.
        Raises UnknownExpert for a name that is not in the pool.
        """
        with self._lock:
            self._require_open()
            if isinstance(wanted, str) or is_list(wanted, str):
                names = [wanted] if isinstance(wanted, str) else wanted
                return self._residents.prefetch(self._pool.known(names))
            weights = resolve(wanted, self._pool, self._bound)
            return self._residents.prefetch(self._plans.plan(weights, self._pool).experts)

    def load(self, name: str, adapter: Adapter) -> None:
        """Add an expert at the end of the pool, also while others are in use; the other experts are not checked again.

        Raises WeightingError for a name that is taken, AlreadyActive while fused, and the errors of making a Composer.
        """
        with self._lock:
            self._require_not_fused("load an expert")
            if name in self._pool.adapters:
                raise WeightingError(f"the pool has an expert {name!r} already: unload() it first, or give another name")
            adapter = self._fitting.placed_adapter(name, adapter)
            fitted = self._fitting.adapter(name, adapter)
            self._pool, self._bound = self._pool.including(name, adapter), self._bound.including(name, fitted)
            self._residents.take_from(*self._source())

    def unload(self, name: str) -> None:
        """Remove an expert and its factors from the pool.

        Raises AlreadyActive for an expert that an open activation uses, and while fused; WeightingError for the last expert.
        """
        with self._lock:
            self._require_not_fused("unload an expert")
            pool, bound = self._pool.without(name), self._bound.without(name)
            self._residents.settle()
            if self._residents.in_use(name):
                raise AlreadyActive(
                    f"expert {name!r} is in use by an open activation: close its handle or leave its block first"
                )
            self._residents.forget(lambda other: other == name)
            self._fitting.forget(name)
            self._plans.forget(name)
            self._pool, self._bound = pool, bound
            self._residents.take_from(*self._source())

    def swap(self, pool: ExpertPool | Iterable[Adapter] | Mapping[str, Adapter]) -> None:
        """Replace the pool by another pool for the same model, checked like the first.

        Experts that are in both pools stay resident. Raises AlreadyActive while active.
        """
        with self._lock:
            self._require_idle("swap the pool")
            fitting = Fitting(self.model)
            pool = fitting.placed(ExpertPool.of(pool))
            bound, before = fitting.pool(pool), self._bound
            stay: set[str] = set()
            if not bound.lazy and not before.lazy:
                stay = {name for name, adapter in bound.adapters.items() if before.adapters.get(name) is adapter}
            self._residents.settle()
            self._residents.forget(lambda name: name not in stay)
            self._plans = KeptPlans()
            self._fitting, self._pool, self._bound = fitting, pool, bound
            self._live = LiveLayers(self.model, fitting.layers, fitting.require_unchanged, self._plans.hooks)
            self._residents.take_from(*self._source())

    def close(self) -> None:
        """Close this Composer, leaving the model as it was; a second call does nothing. Raises AlreadyActive if active."""
        with self._lock:
            if self._closed:
                return
            self._require_idle("close")
            self._closed = True
            self._plans = KeptPlans(0)
            self._residents.close()

    def __reduce__(self) -> tuple[Any, ...]:
        raise CompositionError(
            "a Composer stands beside one model and cannot be copied or pickled: copy the model, and make a Composer for it"
        )

    def _source(self) -> tuple[Callable[[str], Adapter], Callable[[], Mapping[str, pages.Place]]]:
        """Return functions that find an expert and the layers' places, without a reference to this object (a cycle)."""
        model, fitting, adapters = self.model, self._fitting, self._bound.adapters
        return adapters.__getitem__, lambda: pages.find_places(model, fitting.layers)

    def _require_open(self) -> None:
        if self._closed:
            raise CompositionError("this Composer is closed: make a new one for the model")

    def _require_tokenizer(self, what: str, verb: str = "needs") -> None:
        if self.tokenizer is None:
            raise CompositionError(f"{what} {verb} a tokenizer: make the Composer with tokenizer=...")

    def _require_not_fused(self, verb: str) -> None:
        self._require_open()
        if self._fused:
            raise AlreadyActive(f"cannot {verb} while a mixture is fused into the weights: leave fused() first")

    def _require_idle(self, verb: str) -> None:
        self._require_not_fused(verb)
        if self._live.active:
            raise AlreadyActive(f"cannot {verb} while an activation is open: close its handle or leave its block first")
