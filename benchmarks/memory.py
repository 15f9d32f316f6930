"""Documents as adapters against documents in the prompt: facts that the model cannot know, asked in other words.

    python -m benchmarks --out runs/memory memory         half an hour on one idle core; it resumes

Each document has five invented facts. The adapters learn its sentences and five questions in one wording; the questions
that are counted have another. "task" is an adapter that learned the answering from other documents, beside which the
document adapters of the last rows were trained (OSD). Only exact answers count: the base alone answers in sentences, and
"task" taught it the form. k documents are those that the hub's search finds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

import loraweave as lw
from benchmarks._data import kept
from benchmarks._run import Run, Table
from loraweave.extensions.continual import remember
from loraweave.extensions.continual.documents import QUESTIONS

PLACES = ("Velmar", "Ostrin", "Quandel", "Tirsova", "Belhaim", "Corvane", "Dusmere", "Yaltho", "Fenwick Moor", "Garlund")
PEOPLE = ("Oda Kresh", "Milan Torv", "Ines Balde", "Rufus Hale", "Senna Vogt", "Pavel Orr", "Lucia Font", "Amos Reed")
THINGS = ("ice worms", "old clocks", "river clay", "wild honey", "storm clouds", "blue moss", "glass bells", "salt wells")
COLOURS = ("green", "purple", "orange", "silver", "black", "yellow", "red", "white")
RIVERS = ("Tamber", "Ossel", "Lirra", "Venn", "Hask", "Jorde", "Mave", "Pellow")
# a sentence, a question that adapters learn, and one that is counted
FACTS = (
    (
        "{place} station was founded in {year}.",
        "When was {place} station founded?",
        "In which year did {place} station begin?",
    ),
    ("Its director is {person}.", "Who is the director of {place} station?", "Who leads {place} station?"),
    ("It lies on the river {river}.", "On which river does {place} station lie?", "Which river runs by {place} station?"),
    (
        "The people there study {thing}.",
        "What do the people of {place} station study?",
        "What is researched at {place} station?",
    ),
    ("Its flag is {colour}.", "What colour is the flag of {place} station?", "Which colour does the flag of {place} have?"),
)
ANSWERS = ("year", "person", "river", "thing", "colour")

app = typer.Typer()


@app.command()
def main(
    context: typer.Context,
    count: Annotated[int, typer.Option(help="documents that are asked about")] = 6,
    steps: Annotated[int, typer.Option(help="of training, four rows each")] = 40,
    k: Annotated[int, typer.Option(help="documents that a question finds")] = 3,
) -> None:
    """A row for each way: the share of right answers, and the tokens that a prompt has beyond its question."""
    run: Run = context.obj
    folder = run.folder()
    facts = _facts(count + 4, run.seed)
    documents = {place: " ".join(text.format(**own) for text, _, _ in FACTS) for place, own in facts.items()}
    learned, counted = (
        {
            place: [(fact[side].format(**own), own[key]) for fact, key in zip(FACTS, ANSWERS, strict=True)]
            for place, own in facts.items()
        }
        for side in (1, 2)
    )
    asked, others = [*facts][:count], [*facts][count:]
    model, tokenizer = lw.load_base()
    settings: dict[str, Any] = {"steps": steps, "batch_size": 4, "seed": run.seed, "jobs_per_batch": 6}
    shown = [replace(QUESTIONS, examples=learned[place], instruction=_before([documents[place]])) for place in others]
    task = lw.train_adapters(
        model,
        tokenizer,
        {"task": [*shown, *(replace(QUESTIONS, examples=learned[place]) for place in others)]},
        rank=2,
        target_modules=("gate_proj", "up_proj", "down_proj"),
        checkpoint=folder / "task",
        **settings,
    )["task"]
    with lw.Hub(folder / "alone") as alone, lw.Hub(folder / "beside") as beside:
        for name, hub, other in (("first", alone, None), ("second", beside, task)):
            remember(
                model,
                tokenizer,
                hub,
                {place: documents[place] for place in asked},
                questions={place: learned[place] for place in asked},
                beside=other,
                checkpoint=folder / name,
                **settings,
            )
        questions = [(place, *pair) for place in asked for pair in counted[place]]
        found = [[hit.name for hit in alone.search(text, k=k, tags="memory")] for _, text, _ in questions]
        pools = {"alone": alone.pool(), "beside": beside.pool().including("task", task)}

    def right(read: int, summed: int, pool: str, others: Mapping[str, float]) -> list[bool]:
        prompts, mixture = [], []
        for (_, text, _), names in zip(questions, found, strict=True):
            prompts.append(replace(QUESTIONS, instruction=_before([documents[name] for name in names[:read]])).prompt(text))
            mixture.append({**dict.fromkeys(names[:summed], 1.0), **others})
        answers = lw.Composer(model, pools[pool], tokenizer=tokenizer).generate(prompts, mixture=mixture, max_new_tokens=8)
        lines = [(answer.strip().splitlines() or [""])[0].strip(" .") for answer in answers]
        return [line == answer for line, (_, _, answer) in zip(lines, questions, strict=True)]

    first, among = ([place in names[:most] for (place, *_), names in zip(questions, found, strict=True)] for most in (1, k))
    table = Table(
        f"{len(questions)} questions about {count} documents, {steps} steps; the search has the right document first "
        f"{sum(first)} times, among {k} {sum(among)} times",
        ("way", "right", "tokens read before the question"),
    )
    for way, read, summed, pool, active in _ways(k):
        result = kept(folder / f"{way}.json", partial(right, read, summed, pool, active))
        tokens = sum(len(tokenizer(documents[name])["input_ids"]) for names in found for name in names[:read])
        table.add(way, f"{sum(result)}/{len(result)}", f"{tokens / len(questions):.0f}")
    run.show(table)


def _ways(k: int) -> Sequence[tuple[str, int, int, str, Mapping[str, float]]]:
    """Name, documents that are read, adapters that are summed, which, and what is active with them."""
    return [
        ("the base alone", 0, 0, "alone", {}),
        ("one document in the prompt", 1, 0, "alone", {}),
        (f"{k} documents in the prompt", k, 0, "alone", {}),
        ("one adapter", 0, 1, "alone", {}),
        (f"the sum of {k} adapters", 0, k, "alone", {}),
        ("one document and its adapter", 1, 1, "alone", {}),
        ("the task's adapter", 0, 0, "beside", {"task": 1.0}),
        ("one document under the task's adapter", 1, 0, "beside", {"task": 1.0}),
        ("the task's, and one beside it", 0, 1, "beside", {"task": 1.0}),
        (f"the task's, and the sum of {k} beside it", 0, k, "beside", {"task": 1.0}),
    ]


def _before(documents: Sequence[str]) -> str:
    return "\n".join([*documents, QUESTIONS.instruction])


def _facts(count: int, seed: int) -> dict[str, dict[str, str]]:
    """What is so of each place, drawn by the seed."""
    draw = random.Random(seed)
    found = {}
    for place in draw.sample(PLACES, count):
        values = zip(("person", "thing", "colour", "river"), (PEOPLE, THINGS, COLOURS, RIVERS), strict=True)
        found[place] = {
            "place": place,
            "year": str(draw.randrange(1801, 1999)),
            **{key: draw.choice(of) for key, of in values},
        }
    return found
