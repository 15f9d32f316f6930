"""The weights over the adapters of a pool for one task, on one model, and the answers under these weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from html import escape
from itertools import chain
from typing import Any

from loraweave.common.chat import Prompt
from loraweave.common.display import ShownTable
from loraweave.common.rows import GivenRows, read_asked
from loraweave.composer.compose.report import Report
from loraweave.composer.compose.settings import require_no_router
from loraweave.composer.composer import Composer
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import untouched
from loraweave.errors import CompositionError, ScopeError
from loraweave.hub.adapter import Adapter
from loraweave.hub.licenses import license_of_all, stated_license
from loraweave.hub.pool import ExpertPool
from loraweave.routers.weights import MixtureWeights, Router
from loraweave.types import Task

# the most adapters that a composition's one line names, and characters of a name
NUM_NAMED, NAME_WIDTH = 3, 40


@dataclass(frozen=True, eq=False)
class TaskMixture:
    """The weights over the adapters of a pool for one task, on one model.

    `pool` is None if only the base is used, and for weights read from a folder. `merge_method` says what the weights mean (a
    name of `names("methods")`). `all_weights` are means over the layers if `by_layer`, {layer: {name: weight}}, has the
    weights. `stored` is the adapter itself if the weights do not determine it: read from a folder, cut in rank, or trained
    on for `tuned_steps` steps. A `router` weighs the experts of the pool for every token and layer: such a composition
    answers live, and no adapter or merge can replace it. `allow_licenses` permits an adapter made of adapters whose licenses
    exclude each other. `members`, {name: composition}, are each asked in their own prompts, and their probabilities are
    averaged in proportion to their `share`; of `steps`, {name: composition}, each gets the answer of the step before it as
    its input. A composition with members or steps is not one adapter.
    """

    model: Any
    tokenizer: Any
    task: Task
    pool: ExpertPool | None
    all_weights: Mapping[str, float]
    merge_method: str
    report: Report
    seed: int = 0
    stored: Adapter | None = None
    parents: Sequence[Mapping[str, Any]] = ()
    by_layer: Mapping[str, Mapping[str, float]] | None = None
    tuned_steps: int = 0
    router: Router | None = None
    allow_licenses: bool = False
    members: Mapping[str, TaskMixture] = field(default_factory=dict)
    steps: Mapping[str, TaskMixture] = field(default_factory=dict)
    share: float = 1.0

    def __repr__(self) -> str:
        by_size = self._by_size()
        shown = [f"{name[:NAME_WIDTH]!r}: {weight:.4g}" for name, weight in by_size[:NUM_NAMED]]
        rest = [f"{len(by_size) - NUM_NAMED} more"] if len(by_size) > NUM_NAMED else []
        what = "the base model" if self.is_base else f"{{{', '.join([*shown, *rest])}}}"
        if self.parts:
            what = self._said
        elif self.router is not None:
            what = f"{type(self.router).__name__} over {len(self._used)} adapters"
        elif self.stored is not None and not self.mean_weights:
            what = "an adapter trained on the examples" if self.tuned_steps else f"adapter {self.stored.name!r}"
        layers = "" if self.by_layer is None else f", means over {len(self.by_layer)} layers"
        chosen = self.report.chosen[:NAME_WIDTH]
        return f"{type(self).__name__}({what}{layers}, method={self.merge_method!r}, chosen={chosen!r})"

    def _repr_html_(self) -> str:
        weights = "" if self.router is not None else ShownTable.of(("adapter", "weight"), self._by_size())._repr_html_()
        return f"<div><p>{escape(repr(self))}</p>{weights}{self.report.table()._repr_html_()}</div>"

    def _by_size(self) -> list[tuple[str, float]]:
        """Return (name, mean weight) of each adapter, the largest by magnitude first."""
        return sorted(self.mean_weights.items(), key=lambda pair: -abs(pair[1]))

    @property
    def weights(self) -> dict[str, float] | MixtureWeights | Router:
        """The weights as {name: weight} without zeros, as MixtureWeights if layers differ, or the router if tokens do.

        Raises ScopeError for an average of members or a program of steps, whose parts have weights of their own.
        """
        if self.router is not None:
            return self.router
        self._require_one("have weights")
        if self.by_layer is not None:
            names = list(self.mean_weights)
            used = {layer: {name: row[name] for name in names if name in row} for layer, row in self.by_layer.items()}
            return MixtureWeights.of_layers(used, names)
        return self.mean_weights

    @property
    def mean_weights(self) -> dict[str, float]:
        """The weights as {name: weight}, averaged over layers and parts, of the adapters that have a weight somewhere."""
        if means_by_part := [part.mean_weights for part in self.parts.values()]:
            return {
                name: self._average([part_means.get(name, 0.0) for part_means in means_by_part])
                for name in chain(*means_by_part)
            }
        layers = self.by_layer.values() if self.by_layer is not None else (self.all_weights,)
        used = {name for of_layer in layers for name, weight in of_layer.items() if weight}
        return {name: float(weight) for name, weight in self.all_weights.items() if name in used}

    @property
    def is_base(self) -> bool:
        """True if this is the base model itself, with nothing added."""
        return self.stored is None and self.router is None and not self.parts and not self.mean_weights

    @property
    def parts(self) -> Mapping[str, TaskMixture]:
        """The members of an average, or the steps of a program, by name; empty for a single mixture."""
        return self.members or self.steps

    @property
    def _shares(self) -> list[float]:
        return [part.share for part in self.parts.values()]

    def _average(self, values: Sequence[float]) -> float:
        """Return the average of one value for each part, weighted by the parts' shares."""
        return sum(value * share for value, share in zip(values, self._shares, strict=True)) / sum(self._shares)

    @property
    def _said(self) -> str:
        """The average or program as a phrase that names all parts, for error messages."""
        return f"the average of {' and '.join(self.members)}" if self.members else f"the program {' > '.join(self.steps)}"

    @property
    def license(self) -> str | None:
        """The SPDX expression that joins the licenses of all adapters that have a weight; None if no license is known."""
        members: list[Mapping[str, Any]] = [adapter.card for adapter in self._used.values()]
        known = members or self.parents or ([] if self.stored is None else [self.stored.card])
        return license_of_all(stated_license(card.get("license")) for card in known)

    @cached_property
    def adapter(self) -> Adapter:
        """The composition as one adapter.

        Raises CompositionError if the composition is the base model itself, ScopeError if it is a router, an average or a
        program, InvalidLicense for licenses that exclude each other or derived works, unless `allow_licenses`.
        """
        self._require_one("be one adapter")
        if self.stored is not None:
            # a tuned or cut adapter keeps its own card
            known = {} if self.license is None else {"license": self.license}
            return replace(self.stored, card={**self.stored.card, **known})
        if self.is_base or self.pool is None:
            raise CompositionError("this composition is the base model itself: there is no adapter to give")
        # imported here, since a composition that only answers live needs no merging
        from loraweave.composer.merge.merge import merge, merge_by_layer

        # DoRA's magnitudes and trained biases are resolved against the model
        used = Composer(self.model, self.pool.subset(self.mean_weights)).bound_pool
        options: dict[str, Any] = {"method": self.merge_method, "name": "composition", "allow_licenses": self.allow_licenses}
        if self.by_layer is not None:
            return merge_by_layer(used, self.by_layer, **options)
        return merge(list(used.adapters.values()), list(self.mean_weights.values()), progress=False, **options)

    def predict(self, inputs: GivenRows, *, max_new_tokens: int = scoring.MAX_NEW_TOKENS) -> list[str]:
        """Return one answer for each input: a label if the task has labels, else the first line of a greedy generation.

        In a chat an answer is the whole turn. Inputs are texts, conversations, or those of rows. Raises InvalidTask for
        anything else, such as a single text.
        """
        return self._predict(read_asked(inputs), max_new_tokens)

    __call__ = generate = predict  # as users of transformers expect

    @property
    def device(self) -> Any:
        """No device: raises CompositionError, since transformers' pipeline() reads the device of a model before all else."""
        way_out = "composition.pipeline() is one for text, and `with composition.activate() as model:` has a model"
        raise CompositionError(f"a composition is not a transformers model, which pipelines need: {way_out}")

    def pipeline(self, **options: Any) -> Any:
        """Return transformers' text-generation pipeline with these options, which answers as the base does in `activate`."""
        from transformers import TextGenerationPipeline, pipeline

        if self.parts:
            self._require_one("be a pipeline")
        activate = self.activate

        class Answering(TextGenerationPipeline):  # type: ignore[misc]
            def _forward(self, *args: Any, **kwargs: Any) -> Any:
                with activate():
                    return super()._forward(*args, **kwargs)

        if getattr(self.model, "hf_device_map", None) is None:
            # else transformers would move the base to the first accelerator
            options.setdefault("device", self.model.device)
        return pipeline("text-generation", model=self.model, tokenizer=self.tokenizer, pipeline_class=Answering, **options)

    def evaluate(self, pairs: GivenRows) -> dict[str, float]:
        """Score answers to (input, target) pairs, or rows in any other form; a target may be a list of accepted ones.

        Every input is put into the task's prompt, with the task's instruction, whatever instruction its row has. `value` is
        the share of right answers under the task's metric, `low` and `high` its 95 % interval (Wilson's),
        `loss` the mean loss of the target tokens (of an average, the mean over its members), `count` the number of pairs.
        Raises InvalidTask for rows without a target (`loraweave.common.rows`).
        """
        return self.score(pairs).figures()

    def score(self, pairs: GivenRows, *, max_new_tokens: int | None = None) -> scoring.Score:
        """Return the figures of `evaluate`, with the answer and the loss of each pair, and whether the answer is right.

        An answer has at most `max_new_tokens`, by default as many as a right one can need.
        """
        read = scoring.read_answers(pairs)
        most = scoring.longest_answer(self.tokenizer, read) if max_new_tokens is None else max_new_tokens
        said = self._predict([prompt for prompt, _ in read], most)
        return scoring.score(said, read, self._losses(read))

    def losses(self, pairs: GivenRows | None = None) -> list[float]:
        """Return each pair's mean loss of the first target's tokens, a mean over members; by default of the examples."""
        return self._losses(self.task.examples if pairs is None else scoring.read_answers(pairs))

    @property
    def engine(self) -> Composer:
        """A Composer of the model and the pool that the router weighs."""
        assert self.pool is not None
        return Composer(self.model, self.pool, tokenizer=self.tokenizer)

    @contextmanager
    def activate(self) -> Iterator[Any]:
        """Let the base model itself answer for the composition, without dropout: `with composition.activate() as model:`.

        In the block, and in the thread that opened it, everything that takes a model works as with any other: its own
        `generate`, a transformers pipeline, a Trainer that evaluates, lm_eval. Prompts are yours to make (task.prompt).
        Raises ScopeError for an average of members or a program of steps, whose parts answer one by one.
        """
        if self.parts:
            self._require_one("answer as one model")
        with ExitStack() as stack:
            stack.enter_context(untouched(self.model))
            # no Composer can exist without an adapter: the base is the model as it is
            if self.router is not None:
                stack.enter_context(self.engine.activate(self.router))
            elif not self.is_base:
                stack.enter_context(Composer(self.model, [self.adapter]).activate({self.adapter.name: 1.0}))
            yield self.model

    def _predict(self, texts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
        if self.members:
            from loraweave.composer.ensembles.ensemble import answers_to

            last = {name: member._last for name, member in self.members.items()}
            adapters = {name: member.adapter for name, member in last.items() if not member.is_base}
            engine = Composer(self.model, ExpertPool(adapters), tokenizer=self.tokenizer)
            mixtures = [{name: 1.0} if name in adapters else None for name in last]
            tasks = [member.task for member in last.values()]
            inputs_MN = [member._between(texts) for member in self.members.values()]
            return answers_to(engine, mixtures, tasks, inputs_MN, weights=self._shares, max_new_tokens=max_new_tokens)
        if self.steps:
            return self._last._predict(self._between(texts), max_new_tokens)
        with self.activate():
            return scoring.predict(*self._on, texts, max_new_tokens=max_new_tokens, share=self._may_share)

    def _losses(self, pairs: Sequence[tuple[Prompt, scoring.Targets]]) -> list[float]:
        if self.members:
            losses_by_member = [member._losses(pairs) for member in self.members.values()]
            return [self._average(pair_losses) for pair_losses in zip(*losses_by_member, strict=True)]
        if self.steps:
            texts = self._between([prompt for prompt, _ in pairs])
            return self._last._losses([(text, targets) for text, (_, targets) in zip(texts, pairs, strict=True)])
        with self.activate():
            return scoring.losses(*self._on, pairs, share=self._may_share)

    @property
    def _last(self) -> TaskMixture:
        """The last step, or the mixture itself without steps."""
        return list(self.steps.values())[-1] if self.steps else self

    def _between(self, texts: Sequence[Prompt]) -> Sequence[Prompt]:
        """Return the last step's inputs, one for each text: the answers of the step before it, or the texts themselves."""
        before = list(self.steps.values())[:-1]
        limit = scoring.answer_limit(self.tokenizer, self.task.examples) if before else 0
        for step in before:
            texts = step._predict(texts, limit)
        return texts

    @property
    def _may_share(self) -> bool:
        """True if prompts that begin alike may share the cache of their beginning, because no weight depends on the rest."""
        return self.router is None and (self.is_base or not self.adapter.invocation)

    def _require_one(self, verb: str) -> None:
        """Raise ScopeError if a router, an average or a program answers, which cannot `verb`, a phrase for the message."""
        require_no_router(self.router, verb)
        if self.steps:
            raise ScopeError(
                f"{self._said} cannot {verb}: its steps answer one after the other. Ask one of composition.steps, or let "
                "one adapter learn the program (docs/programs.md)"
            )
        if self.members:
            names = [name for name, member in self.members.items() if not member.steps]
            raise ScopeError(
                f"{self._said} cannot {verb}: its members answer apart. Ask one of them, "
                f"composition.members[{names[-1]!r}] (saved as member-{list(self.members).index(names[-1])}), "
                f"or use method={names[-1]!r}"
            )

    @property
    def _used(self) -> Mapping[str, Adapter]:
        """The adapters that have a weight, by name, from the pool or the parts' pools; {} without a pool."""
        if self.parts:
            return {name: adapter for part in self.parts.values() for name, adapter in part._used.items()}
        used = self.mean_weights if self.router is None or self.pool is None else self.pool.names
        return self.pool.subset(used).adapters if self.pool and used else {}

    @property
    def _on(self) -> tuple[Any, Any, Task]:
        return self.model, self.tokenizer, self.task
