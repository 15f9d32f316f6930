"""The data of a router's training as rows of token ids, each with the expert whose task it is, where that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

from loraweave.common.rows import FORMS, located, read_row
from loraweave.composer.batches import IGNORED, EncodedRow, context_length, encode
from loraweave.errors import InvalidTask
from loraweave.hub.unknown_expert import unknown_expert
from loraweave.routers.gates.call import UNKNOWN
from loraweave.routers.routing.learned_router import LearnedRouter
from loraweave.types import Task

TOKENS = ("input_ids", "labels")
PLAIN = Task(())
SPLITS = {"train", "training", "test", "validation", "valid", "dev", "eval"}


@dataclass(frozen=True)
class Owners:
    """Whose task rows may be: the experts of a router's pool, or the tasks of a recipe of trained experts, by their places.

    `learner` is who asks, for messages, and `key` what a row has its owner under. With `needed` every row has to have one.
    With `grows` a name that is not known yet gets the next place. Parts of the data by names that are no owner's are of no
    owner, unless `heeded` refuses them.
    """

    places: dict[str, int]
    learner: str
    key: str
    needed: bool
    unknown: Callable[[object], Exception]
    grows: bool = False
    heeded: bool = False

    @classmethod
    def of(cls, router: LearnedRouter) -> Self:
        """The experts of a router."""
        unknown = partial(unknown_expert, known=router.experts)
        return cls(dict(router.members.places), f"router {router.name!r}", "expert", router.needs_experts, unknown)

    @property
    def forms(self) -> str:
        """What rows may be like."""
        return f"{FORMS}; with {self.key!r} where known, or with 'input_ids' and 'labels'"

    def closed(self) -> Self:
        """The same, to which no name is added any more."""
        return replace(self, grows=False)

    def known(self, name: Any, where: str) -> int:
        """The place of an owner. Raises what `unknown` gives for another name."""
        if isinstance(name, str) and self.grows:
            return self.places.setdefault(name, len(self.places))
        if not isinstance(name, str) or name not in self.places:
            error = self.unknown(name)
            raise type(error)(f"{where}: {error}")
        return self.places[name]

    def of_row(self, row: Any, own: int, where: str) -> int:
        """The place of a row's owner: the one it names, or that of its part. Raises InvalidTask where one is needed."""
        named = row.get(self.key) if isinstance(row, Mapping) else None
        owner = own if named is None else self.known(named, where)
        if owner == UNKNOWN and self.needed:
            an = "an" if self.key == "expert" else "a"
            raise InvalidTask(
                f"{where} does not say whose task it is, which {self.learner} learns from: give it {an} {self.key!r}, or "
                f"pass {{name of {an} {self.key}: rows}}"
            )
        return owner

    def _place(self, name: Any, where: str) -> int:
        """An owner's place; where the learner does not ask for owners, other names are those of tasks."""
        if self.needed or self.grows or self.heeded:
            return self.known(name, where)
        return self.places.get(name, UNKNOWN)

    def parts(self, dataset: Any, what: str) -> Iterator[tuple[str, int, Any]]:
        """(what it is called, place of its owner, rows) of each part of the data; rows alone are one, of no owner."""
        if not isinstance(dataset, Mapping):
            yield what, UNKNOWN, dataset
            return
        if set(dataset) & set(TOKENS) or "target" in dataset:
            raise InvalidTask(f"{what} is one row, {sorted(dataset)}: pass a list of rows")
        if splits := SPLITS & set(map(str, dataset)) - set(self.places):
            raise InvalidTask(
                f"{what} has the parts {', '.join(map(repr, sorted(splits)))}, no {self.key}s, but perhaps splits: "
                "pass the rows of one, and those held out as evaluation="
            )
        for name, rows in dataset.items():
            where = f"{what}[{name!r}]"
            yield where, self._place(name, where), rows


@dataclass(frozen=True)
class TrainingRow:
    """One row. `labels` is the target with `IGNORED` where no loss is asked; `expert` is the place of its owner, or -1."""

    encoded: EncodedRow
    labels: tuple[int, ...]
    expert: int
    number: int

    def __len__(self) -> int:
        return len(self.encoded)

    def determining(self) -> list[Any]:
        """All of it but its number, as JSON."""
        return [self.encoded.prompt, self.encoded.target, self.labels, self.expert]

    @property
    def num_targets(self) -> int:
        return sum(label != IGNORED for label in self.labels)


@dataclass(frozen=True)
class _Text:
    prompt: str
    target: str


@dataclass(frozen=True)
class _Tokens:
    prompt: tuple[int, ...]
    labels: tuple[int, ...]
    target: tuple[int, ...]


class RowReader:
    """Reads datasets for one learner on one model: {name of an owner or task: rows or a Task}, or the rows themselves."""

    def __init__(self, owners: Owners, model: Any, tokenizer: Any) -> None:
        self._owners = owners
        self._model = model
        self._tokenizer = tokenizer

    def read(self, dataset: Any, *, what: str = "dataset", first: int = 0, task: Task = PLAIN) -> list[TrainingRow]:
        """The rows in their order, numbered from `first`; those of no Task of their own are in the prompts of `task`.

        Raises InvalidTask for what is no such data, UnknownExpert for an expert that the pool has not.
        """
        found = [
            (content, expert)
            for where, own, rows in self._owners.parts(dataset, what)
            for content, expert in self._rows(rows, own, where, task)
        ]
        if not found:
            raise InvalidTask(f"{what} is empty: {self._owners.forms}")
        texts = [content for content, _ in found if isinstance(content, _Text)]
        if texts and self._tokenizer is None:
            raise InvalidTask(
                f"{what} has texts, but no tokenizer is known: pass tokenizer=... (a Composer is made with it), or token ids"
            )
        encoded = iter(
            encode(self._model, self._tokenizer, [text.prompt for text in texts], [text.target for text in texts])
            if texts
            else ()
        )
        rows = []
        for number, (content, expert) in enumerate(found, start=first):
            row = next(encoded) if isinstance(content, _Text) else EncodedRow(content.prompt, content.target)
            labels = row.target if isinstance(content, _Text) else content.labels
            rows.append(TrainingRow(row, labels, expert, number))
        return rows

    def _rows(self, rows: Any, own: int, part: str, task: Task) -> Iterable[tuple[_Text | _Tokens, int]]:
        given = rows.examples if isinstance(rows, Task) else rows
        empty = True
        for where, row in located(given, of=part):
            empty = False
            yield self._row(row, rows if isinstance(rows, Task) else task, own, where)
        if empty:
            raise InvalidTask(f"{part} is empty: {self._owners.forms}")

    def _row(self, row: Any, task: Task, own: int, where: str) -> tuple[_Text | _Tokens, int]:
        owner = self._owners.of_row(row, own, where)
        content: _Text | _Tokens
        if isinstance(row, Mapping) and "input_ids" in row:
            content = self._tokens(row, where)
        else:
            read = read_row(row, where)
            content = _Text(task.prompt_of(read), read.targets[0])
        return content, owner

    def _tokens(self, row: Mapping[str, Any], where: str) -> _Tokens:
        """A row of token ids; labels are aligned with them (IGNORED: no loss), or a decoder's of their own."""
        if "labels" not in row:
            raise InvalidTask(f"{where} has 'input_ids' and no 'labels': the loss is that of labels other than {IGNORED}")
        ids, labels = _ints(row["input_ids"], where), _ints(row["labels"], where)
        if "attention_mask" in row:
            mask = _ints(row["attention_mask"], where)
            if len(labels) == len(ids):
                labels = tuple(label for label, real in zip(labels, mask, strict=False) if real)
            ids = tuple(token for token, real in zip(ids, mask, strict=False) if real)
        if self._model.config.is_encoder_decoder:
            target = tuple(label for label in labels if label != IGNORED)
            found = _Tokens(ids, target, target)
        elif len(labels) != len(ids):
            raise InvalidTask(f"{where} has {len(ids)} input_ids, but {len(labels)} labels; a decoder's are aligned")
        else:
            # nothing comes before the first token to predict it from
            start = next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))
            found = _Tokens(ids[:start], labels[start:], ids[start:])
        if not found.prompt or not found.labels:
            raise InvalidTask(f"{where} has no label to predict after its first token")
        known = len(self._model.get_input_embeddings().weight)
        if strange := [token for token in (*found.prompt, *found.target) if not 0 <= token < known]:
            raise InvalidTask(f"{where} has token {strange[0]}, but the model knows those from 0 to {known - 1}")
        if strange := [label for label in found.labels if label != IGNORED and not 0 <= label < known]:
            raise InvalidTask(f"{where} has label {strange[0]}, which is no token of the model's {known} and not {IGNORED}")
        limit = context_length(self._model)
        if limit and len(found.prompt) + len(found.target) > limit:
            raise InvalidTask(f"{where} has {len(ids)} tokens, but the model's context is {limit}; shorten it")
        return found


def _ints(values: Any, where: str) -> tuple[int, ...]:
    found = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(found, Sequence) or not all(isinstance(value, int) for value in found):
        raise InvalidTask(f"{where} has {values!r:.60}, which is no list of token ids")
    return tuple(found)
