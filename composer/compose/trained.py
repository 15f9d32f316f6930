"""The trials of what is trained: a LoRA under demonstrations, where it begins, its average with a search, and a router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch

from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.examples import EncodedExamples
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.objectives._row_sums import Kind
from loraweave.composer.compose.population import Job, row_sums
from loraweave.composer.compose.refine import (
    STEP_COST,
    Tuning,
    example_loss,
    linear_targets,
    num_scalars,
    pool_of,
    targets_of,
    task_of,
    tuned_adapters,
)
from loraweave.composer.compose.report import Report
from loraweave.composer.compose.settings import TRAINING, Settings, router_name
from loraweave.composer.compose.trials import Bench, Split, Trial, result_of
from loraweave.composer.merge.merge import parent_of
from loraweave.hub.adapter import Adapter
from loraweave.hub.pool import ExpertPool
from loraweave.registry import get
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.tokens._learned import LearnedRouter
from loraweave.routers.tokens._router import TokenRouter
from loraweave.routers.tokens._saved import router
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Router

# trainings of a LoRA under demonstrations: of a new one, and of one that begins as the in-context adapter; chosen by
# leave-one-out on the example pool, with ORDERS orders of the demonstrations in the prompts
FEW_SHOT = Tuning(steps=10, lr=5e-4, batch_size=2)
BEGUN = Tuning(steps=6, lr=8e-4, batch_size=1)
# the share of a member of an average, where it is not 1; by leave-one-out, too
SHARES = {"few_shot": 3.0, "program": 3.0}
# how a LoRA is trained on many examples
LONG = Tuning(steps=80, lr=3e-3, batch_size=8)
ORDERS = 3


@dataclass(frozen=True, eq=False)
class _Trained:
    """An adapter that was trained, here or before: the expert `name` of the loss's engine."""

    name: str
    loss: ExampleLoss

    @property
    def adapter(self) -> Adapter:
        return self.loss.engine.pool[self.name]


class InContextAdapter(Trial[_Trained]):
    """The trial of the bench's `start` as it is, asked under the examples that a split sees."""

    learns = False
    steps = 0

    def __init__(self, bench: Bench, name: str = "in_context_adapter") -> None:
        super().__init__(name, bench)

    def choose(self, splits: Sequence[Split]) -> list[_Trained]:
        assert self.bench.start is not None
        return [self._asked(self.bench.start, split) for split in splits]

    def scores(self, chosen: _Trained, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        alone = MixtureWeights.of({chosen.name: 1.0}, chosen.loss.engine.pool.names)
        losses_CN, hits_CN = chosen.loss.view(examples).scores([alone])
        return losses_CN[0], hits_CN[0]

    def result(self, chosen: _Trained) -> SearchResult:
        return result_of(MixtureWeights.of({}, self.bench.names), num_scalars(chosen.adapter) if self.steps else 0)

    def composition_fields(self, chosen: _Trained) -> dict[str, Any]:
        stored = replace(chosen.adapter, name="composition")
        task = replace(chosen.loss.task, examples=self.bench.task.examples)
        parents = [] if self.bench.start is None else [parent_of(self.bench.start)]
        fields = {"task": task, "stored": stored, "tuned_steps": self.steps, "parents": parents}
        return {**super().composition_fields(chosen), **fields}

    def _asked(self, adapter: Adapter, split: Split) -> _Trained:
        """Return the adapter with its loss; a prompt shows some of the split's examples (`in_turn`), but never its own."""
        task = self.bench.task
        shown = replace(task, demonstrations=task_of(task, split.seen).demonstrations)
        model, tokenizer, pool = self.bench.engine.model, self.bench.tokenizer, ExpertPool({adapter.name: adapter})
        return _Trained(adapter.name, example_loss(model, tokenizer, shown, pool, turned=True))


class FewShot(InContextAdapter):
    """The trial of a LoRA on all linear layers, trained on a split's examples, each under the others (arXiv 2110.15943).

    It begins as the bench's `start`, or as a new adapter.
    """

    learns = True

    def __init__(self, bench: Bench, tuning: Tuning, name: str = "few_shot") -> None:
        super().__init__(bench, name)
        self._tuning = tuning
        self.steps = tuning.steps
        self.target_modules = linear_targets(bench.engine.model)

    def planned(self, num_folds: int) -> int:
        return STEP_COST * self.steps * (num_folds + 1)

    def choose(self, splits: Sequence[Split]) -> list[_Trained]:
        bench, names = self.bench, [split.name for split in splits]
        trained = tuned_adapters(
            bench.engine.model,
            bench.tokenizer,
            bench.task,
            dict.fromkeys(names, bench.start),
            {split.name: split.seen for split in splits},
            self._tuning,
            target_modules=self.target_modules,
            checkpoint=bench.checkpoint,
            progress=bench.progress,
        )
        made = STEP_COST * self.steps * len(splits)
        self.evaluations += made
        bench.on_progress(made)
        return [self._asked(trained[split.name], split) for split in splits]


class Lora(FewShot):
    """The trial of a new LoRA on the pool's layers, trained on the examples that a split sees, and asked without them."""

    def __init__(self, bench: Bench, tuning: Tuning) -> None:
        folder = None if bench.checkpoint is None else bench.checkpoint / "lora"
        super().__init__(replace(bench, start=None, checkpoint=folder), tuning, "lora")
        self.target_modules = targets_of(bench.engine.pool)


class Averaged(Trial[tuple[Any, ...]]):
    """The average of the probabilities of what other trials chose, each asked in its own prompts, by `SHARES`."""

    def __init__(self, parts: Sequence[Trial[Any]]) -> None:
        super().__init__("average", parts[0].bench)
        self._parts = parts
        self._shares = [SHARES.get(part.name, 1.0) for part in parts]

    def choose(self, splits: Sequence[Split]) -> list[tuple[Any, ...]]:
        return list(zip(*(part.choices_on(splits) for part in self._parts), strict=True))

    def scores(self, chosen: tuple[Any, ...], examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        _, hits_N = self.hits(chosen, examples)
        losses_by_part = [part.scores(choice, examples)[0] for part, choice in zip(self._parts, chosen, strict=True)]
        return np.average(losses_by_part, axis=0, weights=self._shares), hits_N

    def finish(self) -> None:
        """Average the losses of the finished parts; answers to examples that were learned from are not looked at."""
        (self.chosen,) = self.choices_on([self.bench.everything])
        losses_by_part = [part.losses_N for part in self._parts if part.losses_N is not None]
        self.losses_N = np.average(losses_by_part, axis=0, weights=self._shares)

    def result(self, chosen: tuple[Any, ...]) -> SearchResult:
        return result_of(MixtureWeights.of({}, self.bench.names))

    def composition(self, chosen: tuple[Any, ...], report: Report, *, seed: int, allow_licenses: bool) -> Composition:
        members = {}
        for part, choice, share in zip(self._parts, chosen, self._shares, strict=True):
            of_part = replace(report, chosen=part.name, reason=f"a member of {self.name}")
            member = part.composition(choice, of_part, seed=seed, allow_licenses=allow_licenses)
            members[part.name] = replace(member, share=share)
        made = super().composition(chosen, report, seed=seed, allow_licenses=allow_licenses)
        return replace(made, members=members)


# the steps of a router's training without a budget
STEPS = 20
BATCH_SIZE = 8


class Routed(Trial[Router]):
    """The trial of a router, the same for all splits; a trained one sees a split's examples, up to 8 of them a step."""

    def __init__(self, bench: Bench, settings: Settings) -> None:
        method, options, budget = settings.method, settings.options, settings.budget
        super().__init__(router_name(method), bench)
        self.learns = settings.learns
        self.evaluations = 0 if self.learns else 1
        self._options = {name: value for name, value in options.items() if name not in TRAINING or not self.learns}
        # a step counts as 3 evaluations
        steps = STEPS if budget is None else max(1, budget // STEP_COST)
        self._steps, self._lr = options.get("steps", steps), options.get("lr")
        self._seed = settings.seed
        # what its options or the pool forbid is raised before anything runs
        self._router: Router
        match method:
            case str():
                self._router = self._new()
            case TokenRouter():
                self._router = method.onto(pool_of(method, bench.engine))
            case _:
                self._router = method

    def planned(self, num_folds: int) -> int:
        return STEP_COST * self._steps * (num_folds + 1) if self.learns else 0

    def choose(self, splits: Sequence[Split]) -> list[Router]:
        return [self._train(split) if self.learns else self._router for split in splits]

    def scores(self, chosen: Router, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        engine, needs = self.bench.engine, self._kind.needs | self._kind.hit_needs
        with engine.activate(chosen):
            (sums,) = row_sums(engine, self._examples, [Job(None, tuple(examples))], needs)
        return self._kind.losses(sums).double().numpy(), self._kind.hits(sums).numpy()

    def result(self, chosen: Router) -> SearchResult:
        count = sum(p.numel() for p in cast(LearnedRouter, chosen).parameters()) if self.learns else 0
        return result_of(MixtureWeights.of({}, self.bench.names), count)

    def composition_fields(self, chosen: Router) -> dict[str, Any]:
        return {**super().composition_fields(chosen), "router": chosen}

    @cached_property
    def _kind(self) -> Kind:
        kind: Kind = get("objectives", "cross_entropy")(self.bench.task)
        return kind

    @cached_property
    def _examples(self) -> EncodedExamples:
        """The examples, each in a row of its own: a router may look at the row as a whole."""
        return EncodedExamples(self.bench.engine.model, self.bench.tokenizer, self.bench.task, self._kind, trees=False)

    def _new(self) -> TokenRouter:
        with torch.random.fork_rng():
            torch.manual_seed(self._seed)
            return router(self.name, self.bench.engine.bound_pool, **self._options)

    def _train(self, split: Split) -> TokenRouter:
        new, folder, task = cast(LearnedRouter, self._new()), self.bench.checkpoint, self.bench.task
        new.fit(
            self.bench.engine,
            replace(task, examples=[task.examples[place] for place in split.seen]),
            steps=self._steps,
            lr=self._lr,
            batch_size=min(BATCH_SIZE, len(split.seen)),
            seed=self._seed,
            warmup=0,
            checkpoint=None if folder is None else folder / f"{self.name}-{split.name}",
            progress=False,
        )
        self.evaluations += STEP_COST * self._steps
        self.bench.on_progress(STEP_COST * self._steps)
        return new.eval()
