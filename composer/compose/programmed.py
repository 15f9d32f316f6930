"""The trial of a program: stored adapters that answer one after the other, found by the examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from loraweave.composer.compose.asked import Reading, Step
from loraweave.composer.compose.composition import Composition
from loraweave.composer.compose.program_search import Order, labels_of, search_programs
from loraweave.composer.compose.refine import task_of
from loraweave.composer.compose.report import Report
from loraweave.composer.compose.settings import Settings
from loraweave.composer.compose.trials import Bench, Split, Trial, result_of
from loraweave.composer.live.fitting import Fitting
from loraweave.composer.train.rows import MAX_PACKED
from loraweave.retrieval.retriever import Retriever
from loraweave.routers.searches._told import SearchResult
from loraweave.routers.weights import MixtureWeights

# a longer program's loss must be lower by this share: with five examples a needless third step often seems to help a little
GAIN = 0.2
# three steps are sought from so many programs of two
BEAM = 1


class Programmed(Trial[Order]):
    """The program that `lw.order` finds by the first examples that a split sees, where a longer one must gain GAIN."""

    def __init__(self, bench: Bench, retriever: Retriever, settings: Settings) -> None:
        super().__init__("program", bench)
        self._retriever, self._settings = retriever, settings
        # what the searches have measured of programs that were chosen, by example
        self._read: dict[tuple[Order, int], Reading] = {}

    def choose(self, splits: Sequence[Split]) -> list[Order]:
        return [self._search(split.seen[:MAX_PACKED]) for split in splits]

    def scores(self, chosen: Order, examples: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if all((chosen, place) in self._read for place in examples):
            read = [self._read[chosen, place] for place in examples]
            return np.array([reading.loss for reading in read]), np.array(
                [reading.hit for reading in read], dtype=np.float64
            )
        made, hits_N = self.hits(chosen, examples)
        return np.array(made.losses([self.bench.task.examples[place] for place in examples])), hits_N

    def result(self, chosen: Order) -> SearchResult:
        return result_of(MixtureWeights.of({}, self.bench.names))

    def composition(self, chosen: Order, report: Report, *, seed: int, allow_licenses: bool) -> Composition:
        made = super().composition(chosen, report, seed=seed, allow_licenses=allow_licenses)
        steps = {}
        for label, step in zip(labels_of(chosen), chosen, strict=True):
            of_step = replace(report, chosen=label, reason=f"a step of {' > '.join(labels_of(chosen))}")
            steps[label] = replace(made, **self._step_fields(step), report=of_step)
        return replace(made, pool=None, steps=steps)

    def _step_fields(self, step: Step) -> dict[str, Any]:
        task = step.task(self.bench.task)
        if step.name is None:
            return {"task": task, "pool": None}
        pool = Fitting(self.bench.engine.model).accepted(self._retriever.hub.pool([step.name]))
        return {"task": task, "pool": pool, "all_weights": {step.name: 1.0}}

    def _search(self, examples: Sequence[int]) -> Order:
        """Return the program. Raises InvalidTask without descriptions, InvalidLicense for steps that may not be combined."""
        bench, task = self.bench, task_of(self.bench.task, examples)
        model, tokenizer, k = bench.engine.model, bench.tokenizer, self._settings.k
        limits: dict[str, Any] = {"k": k, "gain": GAIN, "beam": BEAM}
        search = search_programs(model, tokenizer, self._retriever, task, **limits, progress=bench.progress)
        # an evaluation is a candidate scored on all examples
        self.evaluations += math.ceil(search.asking.count / len(examples))
        chosen, _ = search.best()
        self._read |= {(chosen, place): read for place, read in zip(examples, search.readings(chosen), strict=True)}
        # the base alone combines nothing
        if names := [step.name for step in chosen if step.name is not None]:
            self._settings.require_combinable(self._retriever.hub.pool(names))
        return chosen
