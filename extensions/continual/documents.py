"""Documents as adapters: each is trained into an adapter, which is stored and summed with others for a question."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraweave import Adapter, Hub, InvalidTask, Record, Task, TrainingError, UnknownName, train_adapters
from loraweave.extend import Count, GivenRows, Positive, Whole, check_options, checked_name, is_list, options_of
from loraweave.extend.hubs import Addition, checked_fields
from loraweave.extend.scoring import predict
from loraweave.extend.training import JobKind
from loraweave.extensions.continual.kinds import Beside

MEMORY = "memory"
# the default form of questions
QUESTIONS = Task([], instruction="Answer the question.")
REWRITE = "Say the same in other words. Keep all names, numbers and facts."
# shares of a sentence's words after which its beginning may end
CUTS = (1 / 3, 2 / 3)
MAX_REWRITTEN = 256


def remember(
    model: Any,
    tokenizer: Any,
    hub: Hub,
    documents: Mapping[str, str],
    *,
    questions: Mapping[str, GivenRows] | None = None,
    form: Task = QUESTIONS,
    rewrites: Whole = 0,
    beside: Adapter | None = None,
    rank: Count = 2,
    steps: Count = 60,
    lr: Positive = 3e-3,
    batch_size: Count = 8,
    jobs_per_batch: Count = 4,
    target_modules: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> list[Record]:
    """Store an adapter for each document, {name: text}, in the hub with the tag "memory": PRAG (arXiv 2501.15915).

    An adapter learns the ends of the document's sentences from their beginnings, and the answers to its `questions`, {name
    of a document: (question, answer) rows}, as the `form` asks them: the first half with the document before the question,
    the others without, as the authors' code does. `rewrites` more versions of the document, in the model's own words, are
    learned like the document. The authors have a large model write the questions and a rewrite: give what yours has written.

    `hub.search(question, tags="memory")` finds documents, and the authors sum those they find with weight 1 each:
    `lw.Composer(model, hub.pool(names)).activate(dict.fromkeys(names, 1.0))`. Such sums repeat what every adapter has
    learned about answering. With `beside`, an adapter that answers questions of this form about other documents, each learns
    only from what that one leaves of the inputs (OSD, arXiv 2604.26768; `Beside`); activate it at weight 1 with any of them.

    A document that the hub has under its name gets a new version. With `checkpoint`, a folder, an interrupted call goes on.
    Raises TrainingError unless `documents` are texts and `hub` is a Hub, InvalidTask for a document without a sentence of
    two words, UnknownName for questions about an unknown document, InvalidName and AdapterUnsupported for a name or a text
    that the hub does not take, before anything is trained; and what `train_adapters` raises.
    """
    check_options("remember()", {"rewrites": rewrites}, options_of(remember), error=TrainingError)
    if not isinstance(documents, Mapping) or not documents or not is_list([*documents, *documents.values()], str):
        raise TrainingError(f"documents are {documents!r:.80}; pass {{name: text}}, one or more")
    about = dict(questions or {})
    if unknown := [name for name in about if name not in documents]:
        raise UnknownName(f"questions are about {unknown[0]!r}, which is not a document; there are {', '.join(documents)}")
    if not isinstance(hub, Hub):
        raise TrainingError(f"documents are stored in a hub, but got {hub!r:.60}: pass lw.Hub(path)")
    fields: dict[str, Any] = {}
    for name, text in documents.items():
        fields[name] = {"description": text, "examples": split(text), "tags": [MEMORY]}
        checked_fields(checked_name(name), {**fields[name], "license": None, "language": ()})
    versions = _versions(model, tokenizer, documents, rewrites)
    tasks = {
        name: [_sentences(name, texts), *_questions(texts, form, about.get(name, ()))] for name, texts in versions.items()
    }
    trained = train_adapters(
        model,
        tokenizer,
        tasks,
        kind=JobKind() if beside is None else Beside(beside),
        rank=rank,
        steps=steps,
        lr=lr,
        batch_size=batch_size,
        jobs_per_batch=jobs_per_batch,
        target_modules=target_modules,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
    )
    additions = [Addition(adapter, **fields[name]) for name, adapter in trained.items()]
    added = hub.add_many(additions, replace=True, anomalies="off")
    for _, error in added.refused:
        raise error
    return [*added.records]


def split(text: str) -> list[str]:
    """Return the sentences of a text; a sentence ends at a line's end, or in ".", "?" or "!" before a space."""
    return [sentence for part in re.split(r"(?<=[.!?])\s+|\s*\n\s*", text) if (sentence := " ".join(part.split()))]


def _versions(model: Any, tokenizer: Any, documents: Mapping[str, str], rewrites: int) -> dict[str, list[str]]:
    """Return {name: [the document, its rewrites]}; the model makes each from the last, as greedy answers would repeat."""
    versions = {name: [text] for name, text in documents.items()}
    chat = bool(getattr(tokenizer, "chat_template", None))
    asking = Task([], instruction=REWRITE, chat=chat, stop=())
    for _ in range(rewrites):
        last = [texts[-1] for texts in versions.values()]
        answers = predict(model, tokenizer, asking, last, max_new_tokens=MAX_REWRITTEN)
        for texts, answer in zip(versions.values(), answers, strict=True):
            # an empty rewrite is left out
            texts += [answer] if answer else []
    return versions


def _sentences(name: str, texts: Sequence[str]) -> Task:
    rows = list(dict.fromkeys(row for text in texts for sentence in split(text) for row in _cut(sentence)))
    if not rows:
        raise InvalidTask(f"document {name!r} has no sentence of two words or more: {texts[0]!r:.60}")
    return Task(rows, template="{input}")


def _cut(sentence: str) -> Iterator[tuple[str, str]]:
    words = sentence.split()
    if len(words) > 1:
        for place in dict.fromkeys(max(1, int(share * len(words))) for share in CUTS):
            yield " ".join(words[:place]), " ".join(words[place:])


def _questions(texts: Sequence[str], form: Task, given: GivenRows) -> list[Task]:
    """Return a document's questions as tasks: the first half below each version of the document, the rest without it."""
    rows = Task.of(given).examples
    half = (len(rows) + 1) // 2
    shown = [replace(form, examples=rows[:half], instruction=f"{text}\n{form.instruction}") for text in texts if rows]
    return [*shown, *([replace(form, examples=rows[half:])] if rows[half:] else [])]
