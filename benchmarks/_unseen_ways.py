"""The ways to solve an unseen task from a few examples that the benchmark `unseen` compares, each a function of a `Case`."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import loraweave as lw
from benchmarks._control import CONTROLS
from loraweave.common.chat import Prompt
from loraweave.composer.compose.candidates import in_context_adapter as in_context_adapter_of
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.program import Program
from loraweave.composer.model.scoring import Score, evaluate, predict
from loraweave.extensions.routers.routers.lorahub_original import LorahubOriginal
from loraweave.extensions.tour import DemoTask

# behind the name of a way: its prompts show the other examples, labels are ranked without their prior on the examples
FORMS: dict[str, Callable[[lw.Task], lw.Task]] = {
    "shown": lambda task: replace(task, demonstrations=True),
    "calibrated": lambda task: replace(task, calibrated=task.examples),
}
RECIPE_POOL = 20
# about the processor time of the published recipe; twice the steps or three times the rate came out alike
FEW_SHOT: dict[str, Any] = {"steps": 20, "lr": 1e-3, "warmup": 3}
LEARNED_STEPS = 8
# test inputs that are shown without their answers
UNLABELLED = 20
ORACLE: dict[str, Any] = {"steps": 80, "lr": 3e-3}


@dataclass(frozen=True)
class Case:
    """One unseen task with its few examples, its whole training set, and what there is to solve it with."""

    model: Any
    tokenizer: Any
    hub: lw.Hub
    unseen: DemoTask
    training: list[tuple[str, str]]
    seed: int
    k: int
    budget: int

    @property
    def task(self) -> lw.Task:
        return self.unseen.task

    @property
    def unlabelled(self) -> list[Prompt]:
        """The first test inputs, without their answers."""
        return [text for text, _ in self.unseen.test[:UNLABELLED]]

    def score(self, found: Found) -> Score:
        """On the test items; what the way itself has measured stands."""
        if found.score is not None:
            return found.score
        answering = found.composition or found.program
        if answering is not None:
            return answering.score(self.unseen.test)
        task = found.task or self.task
        if found.adapter is None:
            return evaluate(self.model, self.tokenizer, task, self.unseen.test, share=True)
        with lw.Composer(self.model, [found.adapter]).activate({found.adapter.name: 1.0}):
            return evaluate(self.model, self.tokenizer, task, self.unseen.test, share=True)


@dataclass(frozen=True)
class Found:
    """What answers: an adapter, a composition, a program, or the base model; `task` where it is asked in another form."""

    adapter: lw.Adapter | None = None
    composition: lw.Composition | None = None
    program: Program | None = None
    task: lw.Task | None = None
    score: Score | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def endings(way: str) -> list[str]:
    """The form of its prompts and the control that stand behind a way's name."""
    return [part for part in way.split("+")[1:] if part in FORMS or part in CONTROLS]


def plain_way(way: str) -> str:
    """The way without them."""
    first, *others = way.split("+")
    return "+".join([first, *(part for part in others if part not in endings(way))])


def find(case: Case, way: str) -> Found:
    """By a function of this file, or by the method of compose() that has the name."""
    return OWN[way](case) if way in OWN else _composed(case, way)


def base(case: Case) -> Found:
    return Found()


def in_context(case: Case) -> Found:
    """The base model with the examples in front of the prompt, each with its answer."""
    return Found(task=replace(case.task, demonstrations=True))


def retrieved_first(case: Case) -> Found:
    """The adapter that retrieval puts first."""
    inputs = [text for text, _ in case.task.examples]
    (first,) = lw.Retriever(case.hub).for_task(inputs, description=case.task.instruction, k=1)
    return Found(case.hub[first.name], notes={"chosen": first.name})


def lorahub_original(case: Case) -> Found:
    """LoraHub as published: adapters at random, A and B mixed apart, 40 evaluations of NGOpt, the loss as it was coded."""
    names = random.Random(case.seed).sample([record.name for record in case.hub], RECIPE_POOL)
    engine = lw.Composer(case.model, case.hub.pool(names))
    solver = LorahubOriginal(names, seed=case.seed)
    method = solver.merge_method
    loss = ExampleLoss(engine, case.tokenizer, case.task, kind=solver.loss, merge_method=method, l1=solver.l1)
    best = solver.solve(loss)
    engine.close()
    adapters = [case.hub[name] for name in names]
    weights = [best.weights[name] for name in names]
    return Found(lw.merge(adapters, weights, method=method, name="original"))


def adamerging(case: Case) -> Found:
    """AdaMerging on the first test inputs, as published: it looks at what it is to answer, but not at the answers."""
    return _composed(case, "adamerging", folds=0, inputs=case.unlabelled)


def lora_examples(case: Case) -> Found:
    """A LoRA of rank 8 trained on the examples alone, all of them (at most 8) in each step."""
    return Found(_trained(case, case.task, batch_size=min(8, len(case.task.examples)), **FEW_SHOT))


def composed_and_tuned(case: Case) -> Found:
    """Learned weights, and from their merge the training that `lora_examples` begins from nothing."""
    composition = _compose(replace(case, budget=2 * LEARNED_STEPS), "gradient", folds=0)
    tuned = composition.tune(FEW_SHOT["steps"], lr=FEW_SHOT["lr"], progress=False)
    return Found(tuned.adapter, notes={"chosen": composition.report.chosen})


def in_context_adapter(case: Case) -> Found:
    """The base with the in-context adapter, under the examples."""
    reader = in_context_adapter_of(case.hub, case.model)
    return Found(reader, task=replace(case.task, demonstrations=True))


def few_shot(case: Case) -> Found:
    """A LoRA on all linear layers, trained on the examples under each other and asked under all of them; no guard.

    It begins from nothing, whatever the hub has.
    """
    return _composed(case, "few_shot", folds=0, pool=case.hub.pool([next(iter(case.hub)).name]))


def few_shot_begun(case: Case) -> Found:
    """The same, from the in-context adapter on."""
    return _composed(case, "few_shot", folds=0)


def oracle(case: Case) -> Found:
    """The same LoRA trained on the task's whole training set."""
    return Found(_trained(case, replace(case.task, examples=case.training), batch_size=8, **ORACLE))


def instruction(case: Case, inputs: list[Prompt] | None = None) -> Found:
    """What `compose()` makes of the task's instruction alone."""
    bare = replace(case.unseen, task=replace(case.task, examples=[]))
    return _composed(replace(case, unseen=bare), "auto", inputs=inputs)


def instruction_and_inputs(case: Case) -> Found:
    """The same, with inputs: it looks at what it is to answer, but not at the answers."""
    return instruction(case, case.unlabelled)


def order(case: Case) -> Found:
    """The program of adapters that the examples point to, each asked by its own instruction."""
    program = lw.order(case.model, case.tokenizer, case.hub, case.task, k=case.k, progress=False)
    return Found(program=program, notes={"chosen": str(program)})


def any_single(case: Case) -> Found:
    """The adapter that answers most of the *test items* right, of the whole hub: more than any choice could know."""
    scores = {record.name: case.score(Found(case.hub[record.name])) for record in case.hub}
    best = max(scores, key=lambda name: (scores[name].value, -scores[name].loss))
    return Found(score=scores[best], notes={"chosen": best})


def two_passes(case: Case) -> Found:
    """One skill after the other: the answer of the first is the input of the second, each with its own instruction."""
    first, second = (case.hub.record(name) for name in case.unseen.related)
    texts = [text for text, _ in case.unseen.test]
    with lw.Composer(case.model, [case.hub[first.name]]).activate({first.name: 1.0}):
        between = predict(case.model, case.tokenizer, _asked(first), texts)
    pairs = [(text, accepted) for text, (_, accepted) in zip(between, case.unseen.test, strict=True)]
    with lw.Composer(case.model, [case.hub[second.name]]).activate({second.name: 1.0}):
        score = evaluate(case.model, case.tokenizer, _asked(second), pairs)
    return Found(score=score, notes={"chosen": f"{first.name}, {second.name}"})


def _asked(skill: lw.Record) -> lw.Task:
    return lw.Task([], instruction=skill.description)


OWN: dict[str, Callable[[Case], Found]] = {
    way.__name__: way
    for way in (
        base,
        in_context,
        retrieved_first,
        lorahub_original,
        adamerging,
        lora_examples,
        in_context_adapter,
        few_shot,
        few_shot_begun,
        composed_and_tuned,
        oracle,
        instruction,
        instruction_and_inputs,
        order,
        any_single,
        two_passes,
    )
}


def _compose(
    case: Case,
    method: str,
    folds: int | None = None,
    pool: lw.ExpertPool | None = None,
    inputs: list[Prompt] | None = None,
) -> lw.Composition:
    return lw.compose(
        case.model,
        case.tokenizer,
        case.hub if pool is None else pool,
        case.task,
        method=method,
        k=case.k,
        budget=case.budget,
        seed=case.seed,
        folds=folds,
        inputs=inputs,
        progress=False,
    )


def _composed(case: Case, method: str, **given: Any) -> Found:
    composition = _compose(case, method, **given)
    report = composition.report
    held_out = {row.name: None if row.held_out_loss is None else round(row.held_out_loss, 4) for row in report.rows}
    notes = {"chosen": report.chosen, "evaluations": report.evaluations, "held_out": held_out}
    if report.chosen == "best_single":
        notes["single"] = next(iter(composition.mean_weights))
    return Found(composition=composition, notes=notes)


def _trained(case: Case, task: lw.Task, *, steps: int, lr: float, batch_size: int, warmup: int = 10) -> lw.Adapter:
    trained = lw.train_adapters(
        case.model,
        case.tokenizer,
        {case.unseen.name: task},
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        warmup=warmup,
        seed=case.seed,
        progress=False,
    )
    return trained[case.unseen.name]
