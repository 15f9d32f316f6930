"""Whether `lw.order` finds programs of adapters, on tasks that are joined here from the pool's training rows.

    python -m benchmarks --out runs/order --data DATA order
    python -m benchmarks --out runs/order --data DATA order --auto
    python -m benchmarks --out runs/order --report order

The settings of `order` are chosen here, before the unseen tasks. A task's rows are those of its first skill, or lists made
of another skill's inputs; each further skill is code, or looks the word up in its own rows. Five rows are the examples.
Right answers of the program that was found are shown beside those of the order by which the task was made; with --auto also
those of `compose(method="auto")`, with and without its program. Measurements are kept in --out.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import typer
from rich.progress import track

import loraweave as lw
from benchmarks._data import kept, known
from benchmarks._run import Run, Table, pairs
from benchmarks.unseen import SHIPPED_READER
from loraweave.composer.compose.program import Program
from loraweave.composer.compose.program_search import Step
from loraweave.hub.base import fast_dtype

NUM_EXAMPLES = 5
AUTO = ("auto", "auto without program")
LIST_SIZES = {"pick_first_5": 5, "pick_middle_5": 5, "alphabetical_first_3": 3}
BY_CODE: dict[str, Callable[[str], str]] = {
    "uppercase": str.upper,
    "second_letter": lambda word: word[1],
    "spell_out": " ".join,
    "pick_first_5": lambda words: words.split(", ")[0],
    "pick_middle_5": lambda words: words.split(", ")[2],
    "alphabetical_first_3": lambda words: min(words.split(", ")),
}

app = typer.Typer()


@dataclass(frozen=True)
class Joined:
    """A task made of skills, the first of which comes first."""

    instruction: str
    skills: tuple[str, ...]


TASKS = {
    "past_upper": Joined("Write the past tense of the verb in capital letters.", ("past_tense", "uppercase")),
    "capital_letter": Joined("Write the second letter of the country's capital.", ("country_capital", "second_letter")),
    "company_upper": Joined("Name the company in capital letters.", ("product_company", "uppercase")),
    "adjective_antonym": Joined("Write the opposite of the adjective in the list.", ("pick_adjective_5", "antonym")),
    "first_german": Joined("Translate the first word into German.", ("pick_first_5", "translate_en_de")),
    "alphabetical_past": Joined(
        "Write the past tense of the verb that comes first in the alphabet.", ("alphabetical_first_3", "past_tense")
    ),
    "adjective_antonym_upper": Joined(
        "Write the opposite of the adjective in the list in capital letters.", ("pick_adjective_5", "antonym", "uppercase")
    ),
    "first_past_upper": Joined(
        "Write the past tense of the first verb in capital letters.", ("pick_first_5", "past_tense", "uppercase")
    ),
    "antonym": Joined("Write the opposite.", ("antonym",)),
    "passive": Joined("Say it in the passive voice.", ("passive",)),
}


@app.command()
def main(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="a,b: only these tasks")] = ",".join(TASKS),
    k: Annotated[int, typer.Option(help="adapters that each search brings")] = 20,
    max_steps: Annotated[int, typer.Option(help="of a program")] = 3,
    gain: Annotated[float, typer.Option(help="share by which a longer program's loss is lower")] = 0.1,
    num_test: Annotated[int, typer.Option(help="test rows of each task")] = 20,
    auto: Annotated[bool, typer.Option("--auto", help="also compose(method='auto')")] = False,
) -> None:
    """The order found, right answers, and the time it took."""
    run: Run = context.obj
    folder = run.folder()
    if not run.report:
        model, tokenizer = lw.load_base(dtype=fast_dtype())
        with run.hub((), *([SHIPPED_READER] if auto else [])) as hub:

            def figures(name: str) -> dict[str, Any]:
                settings = {"k": k, "max_steps": max_steps, "gain": gain}
                return _measured(run, model, tokenizer, hub, name, settings, num_test, auto)

            for name in track(tasks.split(","), "measuring"):
                kept(folder / f"{name}-{run.seed}-{k}-{max_steps}-{gain}-{auto}.json", partial(figures, name))
    columns = ("task", "made as", "found", "loss", "loss as made", "right", "right as made", *AUTO)
    table = Table("programs found from five examples", (*columns, "processor s"))
    for found in known(folder, "*.json"):
        table.add(*(str(found.get(column, "-")) for column in table.columns))
    run.show(table)


def joined_rows(run: Run, skills: tuple[str, ...], seed: int) -> list[tuple[str, str]]:
    """(input, target) of a task, in an order that the seed decides."""
    generator = random.Random(seed)
    words = {skill: dict(pairs(run.rows(skill), "train")) for skill in skills if skill not in BY_CODE}
    first, *others = skills
    if first in LIST_SIZES:
        size, inputs = LIST_SIZES[first], list(words[others[0]])
        lists = (", ".join(generator.sample(inputs, size)) for _ in range(200))
        rows = [(text, BY_CODE[first](text)) for text in lists]
    else:
        rows = pairs(run.rows(first), "train")
    for skill in others:
        done = ((text, _apply(words, skill, middle)) for text, middle in rows)
        rows = [(text, target) for text, target in done if target is not None]
    generator.shuffle(rows)
    return rows


def _apply(words: Mapping[str, Mapping[str, str]], skill: str, text: str) -> str | None:
    return BY_CODE[skill](text) if skill in BY_CODE else words[skill].get(text)


def _measured(
    run: Run,
    model: Any,
    tokenizer: Any,
    hub: lw.Hub,
    name: str,
    settings: dict[str, Any],
    num_test: int,
    auto: bool,
) -> dict[str, Any]:
    joined = TASKS[name]
    rows = joined_rows(run, joined.skills, run.seed)
    examples, test = rows[:NUM_EXAMPLES], rows[NUM_EXAMPLES : NUM_EXAMPLES + num_test]
    task = lw.Task(examples, instruction=joined.instruction)
    before = time.process_time()
    program = lw.order(model, tokenizer, hub, task, progress=False, **settings)
    seconds = time.process_time() - before
    steps = tuple(Step(skill, hub.record(skill).description, hub.record(skill).hash) for skill in joined.skills)
    told = Program(model, tokenizer, task, steps, hub, hub.pool(joined.skills), program.report)
    measured = {row.steps: f"{row.loss:.3f} of {row.num_examples}" for row in program.report.rows}
    found = {
        "task": name,
        "made as": str(told),
        "found": str(program),
        "loss": measured[program.report.chosen],
        "loss as made": measured.get(joined.skills, "not measured"),
        "right": program.evaluate(test)["value"],
        "right as made": told.evaluate(test)["value"],
        "processor s": round(seconds, 1),
        "questions": program.report.questions,
        "best": [[list(row.steps), row.loss, row.hits, row.num_examples] for row in program.report.rows[:60]],
    }
    if auto:
        composed = lw.compose(model, tokenizer, hub, task, seed=run.seed, progress=False)
        without = {name: member for name, member in composed.members.items() if name != "program"}
        each = composed, replace(composed, members=without)
        found |= {column: one.evaluate(test)["value"] for column, one in zip(AUTO, each, strict=True)}
        found["auto's reason"] = composed.report.reason
    return found
