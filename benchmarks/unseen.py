"""Answers tasks that no adapter was trained for with few examples each, and compares the ways to do it.

    python -m benchmarks --out runs/unseen --data DATA unseen
    python -m benchmarks --out runs/unseen --data DATA unseen --ways auto,gradient --shots 5,20 --seeds 0,1,2,3,4
    python -m benchmarks --out runs/unseen --data DATA unseen --ways auto --control noise  (over a hub of noise)
    python -m benchmarks --out runs/unseen --report unseen                  (the tables of what has been measured so far)
    python -m benchmarks --out runs/unseen --report --save unseen unseen    (writes data/unseen.json)
    python -m benchmarks --out runs/left-out --data DATA unseen --left-out  (the pool's own tasks: what choices are made by)

The ways: the base model without an example (`base`) and with the examples in its prompt (`in_context`); a LoRA trained
on the examples alone (`lora_examples`), and one that begins as a composition (`composed_and_tuned`); the adapter that
retrieval puts first (`retrieved_first`); the published LoraHub recipe (`lorahub_original`: 20 adapters at random, A and
B mixed apart, 40 evaluations by nevergrad's NGOpt, the loss as its authors coded it); AdaMerging, which learns from
the first 20 test inputs without their answers (`adamerging`); a LoRA trained on the whole
training set (`oracle`); the program of adapters that `lw.order` finds (`order`), and one adapter that learned it on
sample inputs of the hub's cards (`order+distilled`); the base with the shipped in-context adapter and the examples in its
prompt (`in_context_adapter`), and the training that begins there (`few_shot_begun`; `few_shot` begins from nothing);
`compose()` without an example, by the instruction alone (`instruction`) and with the first 20 test inputs, without answers
(`instruction_and_inputs`); for joined skills the adapter that is best on the test items
(`any_single`), and both skills one after the other (`two_passes`); and every method of `compose()` by its name. With
`+shown` behind its name, a way learns and answers under prompts that show the other examples with their answers; with
`+calibrated`, on tasks with labels, it ranks them without their prior on the examples, as `auto` does.

--control noise replaces the factors of the stored adapters by noise of the same norms, --control shuffled by those of
another adapter (`_control.py`); cards and the in-context adapter stay. Its name stands behind the way's (`auto+noise`).

--left-out takes each task of the pool as if it were unseen: its own adapter and those of the same skill are not in the hub,
the in-context adapter is the one of `examples/make_in_context.py --folds` that was trained without it, and its examples and
test items are training rows. Methods, rates and budgets are chosen there, before the unseen tasks.

Every measurement is kept in --out as it is made, so that an interrupted run goes on; it goes on, too, from what
data/unseen.json holds. Several processes share the work by --part. --again repeats ways.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track

import loraweave as lw
from benchmarks._control import CONTROLS
from benchmarks._data import DATA, NO_SEED, NO_SHOTS, Key, Measured, Store
from benchmarks._run import ROOT, Run, pairs
from benchmarks._unseen_report import OF_JOINED_SKILLS, WAYS, WITHOUT_EXAMPLES, report
from loraweave.common.chat import Prompt
from loraweave.composer.compose.candidates import in_context_adapter as in_context_adapter_of
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.compose.program import Program
from loraweave.composer.model.scoring import Score, evaluate, predict
from loraweave.extensions.routers.routers.lorahub_original import LorahubOriginal
from loraweave.extensions.tour import DemoTask, load_task
from loraweave.extensions.transfer import distil_program
from loraweave.hub.base import fast_dtype

app = typer.Typer()


# behind the name of a way: its prompts show the other examples, labels are ranked without their prior on the examples
FORMS: dict[str, Callable[[lw.Task], lw.Task]] = {
    "shown": lambda task: replace(task, demonstrations=True),
    "calibrated": lambda task: replace(task, calibrated=task.examples),
}
# tasks of the pool that teach one skill on other texts
SAME_SKILL = (("sentiment_movie", "sentiment_tweet"),)
SHIPPED_READER = ROOT / "examples" / "in_context"


@dataclass(frozen=True)
class Asked:
    """What is measured: every way on every task with one seed, before the next seed."""

    relations: Mapping[str, str]
    ways: list[str]
    seeds: list[int]
    shots: list[int]
    k: int
    budget: int
    num_test: int
    labelled: Set[str] = frozenset()
    left_out: bool = False
    in_context: Path | None = None
    control: str | None = None

    def without(self, task: str) -> tuple[str, ...]:
        """What the hub may not have: the adapters of the task's own skill."""
        return same_skill(task) if self.left_out else ()

    def reader(self, without: tuple[str, ...]) -> list[Path]:
        """The folder of the in-context adapter that was not trained on these tasks, if there is one."""
        if not self.left_out:
            return [self.in_context or SHIPPED_READER]
        folds = sorted(self.in_context.iterdir()) if self.in_context is not None else []
        cards = {fold: json.loads((fold / "loraweave.json").read_text(encoding="utf-8")) for fold in folds}
        found = [fold for fold, card in cards.items() if set(without) <= set(card["left_out"])]
        if folds and not found:
            raise typer.BadParameter(f"no adapter of {self.in_context} was trained without {', '.join(without)}")
        return found[:1]

    def wanted(self) -> Iterator[Key]:
        ending = f"+{self.control}" if self.control else ""
        for shots in self.shots:
            for seed in self.seeds:
                for task, relation in self.relations.items():
                    for way in (f"{name}{ending}" for name in self.ways):
                        if plain_way(way) in OF_JOINED_SKILLS and relation != "compositional":
                            continue
                        if "calibrated" in endings(way) and task not in self.labelled:
                            continue
                        if way not in WITHOUT_EXAMPLES:
                            yield Key(task, way, shots, seed)
                        elif (shots, seed) == (self.shots[0], self.seeds[0]):
                            yield Key(task, way, NO_SHOTS, NO_SEED)


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str | None, typer.Option(help="a,b: only these tasks")] = None,
    ways: Annotated[str, typer.Option(help="a,b: only these ways")] = ",".join(WAYS),
    seeds: Annotated[str, typer.Option(help="of the examples and the searches")] = "0,1,2,3,4",
    shots: Annotated[str, typer.Option(help="numbers of examples")] = "5",
    k: Annotated[int, typer.Option(help="adapters that retrieval brings")] = 20,
    budget: Annotated[int, typer.Option(help="evaluations of each search")] = 40,
    num_test: Annotated[int, typer.Option(help="test items of each task")] = 100,
    part: Annotated[str, typer.Option(help="2/3 is the second of three processes that share the tasks")] = "1/1",
    again: Annotated[str, typer.Option(help="a,b: ways whose earlier measurements do not count")] = "",
    left_out: Annotated[bool, typer.Option(help="the pool's own tasks, each without its adapter")] = False,
    in_context: Annotated[Path | None, typer.Option(help="in-context adapter, or folder of folds")] = None,
    control: Annotated[str | None, typer.Option(help="noise or shuffled: in place of what is stored")] = None,
) -> None:
    """Right answers, the share of what training could gain, and the time to choose."""
    run: Run = context.obj
    store = Store(run.folder(), DATA / ("left_out.json" if left_out else "unseen.json"))
    entries = run.entries("pool" if left_out else "unseen")
    kinds = {task: entry["category" if left_out else "relation"] for task, entry in entries.items()}
    if not run.report:
        if control not in (None, *CONTROLS):
            raise typer.BadParameter(f"there is no control {control!r}; there are {', '.join(CONTROLS)}")
        number, count = (int(each) for each in part.split("/"))
        chosen = [task for task in kinds if not tasks or task in tasks.split(",")][number - 1 :: count]
        of_seeds, of_shots = ([int(each) for each in text.split(",")] for text in (seeds, shots))
        relations = {task: kinds[task] for task in chosen}
        limits = k, budget, num_test, {task for task in chosen if entries[task]["labels"]}, left_out, in_context, control
        asked = Asked(relations, ways.split(","), of_seeds, of_shots, *limits)
        measure(run, asked, store, again.split(","))
    name = "left out" if left_out else "unseen"
    store.close(run, lambda known: list(report(known, name).values()))


def measure(run: Run, asked: Asked, store: Store, again: list[str]) -> None:
    known = Store(store.folder).all() if any(again) else {}
    known |= {key: found for key, found in store.all().items() if key.way not in again}
    model, tokenizer = lw.load_base(dtype=fast_dtype())
    keys = [key for key in asked.wanted() if key not in known]
    with ExitStack() as stack:
        hubs: dict[tuple[tuple[str, ...], int], lw.Hub] = {}
        for key in track(keys, "measuring"):
            # each seed draws new numbers for the control
            without, seed = asked.without(key.task), key.seed if asked.control else 0
            if (without, seed) not in hubs:
                opened = run.hub(without, *asked.reader(without), control=asked.control, seed=seed)
                hubs[without, seed] = stack.enter_context(opened)
            store.keep(_measured(open_case(run, asked, model, tokenizer, hubs[without, seed], key), key))


def same_skill(task: str) -> tuple[str, ...]:
    """The pool's tasks that teach what this one does, itself among them."""
    return next((tasks for tasks in SAME_SKILL if task in tasks), (task,))


def open_case(run: Run, asked: Asked, model: Any, tokenizer: Any, hub: lw.Hub, key: Key) -> Case:
    training = pairs(run.rows(key.task), "train")
    num_examples = max(key.shots, 1)
    if asked.left_out:
        drawn = random.Random(key.seed).sample(training, len(training))
        entry = run.entries("pool")[key.task]
        task = lw.Task(drawn[:num_examples], instruction=entry["definition"], labels=entry["labels"])
        test = [(text, [target]) for text, target in drawn[-asked.num_test :]]
        training = drawn[: -asked.num_test]
        unseen = DemoTask(key.task, task, test, [])
    else:
        unseen = load_task(run.data, key.task, key.seed, asked.num_test, num_examples=num_examples)
    for form in endings(key.way):
        if form in FORMS:
            unseen = replace(unseen, task=FORMS[form](unseen.task))
    return Case(model, tokenizer, hub, unseen, training, key.seed, asked.k, asked.budget)


def _measured(case: Case, key: Key) -> Measured:
    started, cpu_started = time.perf_counter(), time.process_time()
    found = find(case, plain_way(key.way))
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    score = case.score(found)
    right_N = torch.tensor(score.right).to(torch.uint8).numpy()
    return Measured(key, right_N, score.loss, seconds, cpu_seconds, found.notes)


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


def order_distilled(case: Case) -> Found:
    """That program, learned by one adapter on sample inputs of the hub's cards; with the time that learning alone took."""
    program = lw.order(case.model, case.tokenizer, case.hub, case.task, k=case.k, progress=False)
    started = time.process_time()
    learned = distil_program(program, seed=case.seed, progress=False)
    notes = {"distilled": learned.report.reason, "distil_cpu_seconds": round(time.process_time() - started, 1)}
    return Found(composition=learned, notes={"chosen": str(program), **notes})


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
OWN["order+distilled"] = order_distilled


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
