"""What `unseen` compares, a function for each way to answer a task; and the methods of compose()."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import loraweave as lw
from loraweave.composer.evaluation.example_loss import ExampleLoss
from loraweave.composer.scoring import Score, evaluate, predict
from loraweave.demo import DemoTask
from loraweave.errors import CompositionError
from loraweave.routers.lorahub_original import LorahubOriginal

WAYS = (
    "base",
    "in_context",
    "lora_examples",
    "composed_and_tuned",
    "retrieved_first",
    "best_single",
    "uniform",
    "lorahub_original",
    "similarity",
    "random",
    "greedy",
    "bayesian",
    "lorahub",
    "adamerging",
    "first_order",
    "gradient",
    "auto",
    "oracle",
    "any_single",
    "two_passes",
)

RECIPE_POOL = 20
# about the processor time of the published recipe; twice the steps or three times the rate came out alike
FEW_SHOT = {"steps": 20, "lr": 1e-3, "warmup": 3}
LEARNED_STEPS = 8
ORACLE = {"steps": 80, "lr": 3e-3}


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

    def score(self, found: Found) -> Score:
        """On the test items; what the way itself has measured stands."""
        if found.score is not None:
            return found.score
        task = found.task or self.task
        if found.adapter is None:
            return evaluate(self.model, self.tokenizer, task, self.unseen.test)
        with lw.Composer(self.model, [found.adapter]).activate({found.adapter.name: 1.0}):
            return evaluate(self.model, self.tokenizer, task, self.unseen.test)


@dataclass(frozen=True)
class Found:
    """What answers: an adapter, or the base model without one; `task` where it is asked in another form."""

    adapter: lw.Adapter | None = None
    task: lw.Task | None = None
    score: Score | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


def find(case: Case, way: str) -> Found:
    """By a function of this file, or by the method of compose() that has the name."""
    return OWN[way](case) if way in OWN else _composed(case, way)


def base(case: Case) -> Found:
    return Found()


def in_context(case: Case) -> Found:
    """The base model with the examples in front of the prompt, each with its answer."""
    shown = "".join(f"{case.task.prompt(text)} {target}\n\n" for text, target in case.task.examples)
    return Found(task=replace(case.task, template=shown + case.task.prompt("{input}")))


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


def lora_examples(case: Case) -> Found:
    """A LoRA of rank 8 trained on the examples alone, all of them (at most 8) in each step."""
    return Found(_trained(case, case.task, batch_size=min(8, len(case.task.examples)), **FEW_SHOT))


def composed_and_tuned(case: Case) -> Found:
    """Learned weights, and from their merge the training that `lora_examples` begins from nothing."""
    composition = lw.compose(
        case.model,
        case.tokenizer,
        case.hub,
        case.task,
        method="gradient",
        k=case.k,
        budget=2 * LEARNED_STEPS,
        folds=0,
        seed=case.seed,
        progress=False,
    )
    tuned = composition.tune(FEW_SHOT["steps"], lr=FEW_SHOT["lr"], progress=False)
    return Found(tuned.adapter, notes={"chosen": composition.report.chosen})


def oracle(case: Case) -> Found:
    """The same LoRA trained on the task's whole training set."""
    return Found(_trained(case, replace(case.task, examples=case.training), batch_size=8, **ORACLE))


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
        lora_examples,
        composed_and_tuned,
        oracle,
        any_single,
        two_passes,
    )
}
# these know nothing of the few examples
WITHOUT_EXAMPLES = ("base", "oracle", "any_single", "two_passes")
# these are for tasks that join two skills
OF_JOINED_SKILLS = ("any_single", "two_passes")


def _composed(case: Case, method: str) -> Found:
    composition = lw.compose(
        case.model,
        case.tokenizer,
        case.hub,
        case.task,
        method=method,
        k=case.k,
        budget=case.budget,
        seed=case.seed,
        progress=False,
    )
    report = composition.report
    notes = {"chosen": report.chosen, "evaluations": report.evaluations}
    if report.chosen == "best_single":
        notes["single"] = next(iter(composition.weights))
    try:
        return Found(composition.adapter, notes=notes)
    except CompositionError:
        # the base model itself, which no adapter expresses
        return Found(notes=notes)


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
