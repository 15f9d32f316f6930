"""Training data as rows of token ids, each with its expert or task where that is known."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Self, TypeVar

import torch

from loraweave.common.chat import Conversation, Prompt, answered_ids
from loraweave.common.checks import is_list
from loraweave.common.descent import seeded
from loraweave.common.names import unknown_expert
from loraweave.common.options import Count, Range, fits
from loraweave.common.rows import FORMS, located, read_row
from loraweave.composer.model.batches import IGNORED, EncodedRow, answer_ids, context_length, encode
from loraweave.composer.model.scoring import encode_pairs
from loraweave.errors import InvalidTask, TrainingError, UnknownName
from loraweave.routers.tokens._learned import UNKNOWN, LearnedRouter
from loraweave.types import Task, with_pairs

TOKENS = ("input_ids", "labels")
Row = TypeVar("Row", bound=EncodedRow)

PLAIN = Task(())
SPLITS = {"train", "training", "test", "validation", "valid", "dev", "eval"}


@dataclass(frozen=True)
class Owners:
    """The owners of training rows, as {name: index}: a router's experts, or the tasks of a recipe of trained experts.

    `learner` names the router or recipe in messages, and `key` is the key of a row's owner. With `needed` every row must
    have an owner. With `grows` an unknown name gets the next index. In {name: rows}, rows under a name that is not an
    owner's have no owner; with `heeded` such a name is refused.
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
        """Return the experts of a router as owners."""
        unknown = partial(unknown_expert, known=router.experts)
        return cls(dict(router.members.places), f"router {router.name!r}", "expert", router.needs_experts, unknown)

    @property
    def forms(self) -> str:
        """The forms that rows may have, in words."""
        return f"{FORMS}; with {self.key!r} where known, or with 'input_ids' and 'labels'"

    def closed(self) -> Self:
        """Return the same owners, to which no more names can be added."""
        return replace(self, grows=False)

    def known(self, name: Any, where: str) -> int:
        """Return the index of the owner called `name`. Raises the error that `unknown` makes for any other name."""
        if isinstance(name, str):
            if self.grows:
                self.places.setdefault(name, len(self.places))
            if name in self.places:
                return self.places[name]
        error = self.unknown(name)
        raise type(error)(f"{where}: {error}")

    def of_row(self, row: Any, own: int, where: str) -> int:
        """Return the index of the owner that a row names, else `own`. Raises InvalidTask if a needed owner is UNKNOWN."""
        match row:
            case {self.key: named} if named is not None:
                return self.known(named, where)
        if own == UNKNOWN and self.needed:
            an = "an" if self.key == "expert" else "a"
            raise InvalidTask(
                f"{where} does not say whose task it is, which {self.learner} learns from: give it {an} {self.key!r}, or "
                f"pass {{name of {an} {self.key}: rows}}"
            )
        return own

    def parts(self, dataset: Any, what: str) -> Iterator[tuple[str, int, Any]]:
        """Yield (label, owner's place, rows) of each part of the data; unnamed rows are one part without an owner."""
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
            # where the learner does not ask for owners, other names are those of tasks
            heeds_names = self.needed or self.grows or self.heeded
            yield where, self.known(name, where) if heeds_names else self.places.get(name, UNKNOWN), rows


@dataclass(frozen=True)
class TrainingRow(EncodedRow):
    """A row to train on.

    `labels` is the target with `IGNORED` where a token has no loss; `expert` is the place of the row's owner, or -1.
    """

    labels: tuple[int, ...] = ()
    expert: int = UNKNOWN
    number: int = 0

    def identity(self) -> list[Any]:
        """Return the row's tokens, labels and owner, as JSON, without its number."""
        return [self.prompt, self.target, self.labels, self.expert]

    @property
    def num_targets(self) -> int:
        return sum(label != IGNORED for label in self.labels)


# a row before encoding: (prompt, target, end of the answer) or the tokens that the caller gave, and its owner's place
Read = tuple[tuple[Prompt, str, str | None] | None, TrainingRow | None, int]


class RowReader:
    """A reader of datasets for one learner on one model: {owner or task: rows or a Task}, or the rows themselves."""

    def __init__(self, owners: Owners, model: Any, tokenizer: Any) -> None:
        self._owners = owners
        self._model = model
        self._tokenizer = tokenizer

    def read(self, dataset: Any, *, what: str = "dataset", first: int = 0, task: Task = PLAIN) -> list[TrainingRow]:
        """Return the rows in order, numbered from `first`; rows that are not in a Task get the prompts of `task`.

        Raises InvalidTask for data of another form, UnknownExpert for an expert that is not in the pool.
        """
        unencoded = [
            read for where, place, rows in self._owners.parts(dataset, what) for read in self._rows(rows, place, where, task)
        ]
        if not unencoded:
            raise InvalidTask(f"{what} is empty: {self._owners.forms}")
        texts = [text for text, _, _ in unencoded if text is not None]
        if texts and self._tokenizer is None:
            raise InvalidTask(
                f"{what} has texts, but no tokenizer is known: pass tokenizer=... (a Composer is made with it), or token ids"
            )
        prompts, targets, ends = zip(*texts, strict=True) if texts else ((), (), ())
        encoded = iter(encode(self._model, self._tokenizer, prompts, targets, ends=ends))
        rows = []
        for number, (_, tokens, owner) in enumerate(unencoded, start=first):
            row = next(encoded) if tokens is None else tokens
            rows.append(TrainingRow(row.prompt, row.target, row.labels, owner, number))
        return rows

    def _rows(self, rows: Any, own: int, part: str, task: Task) -> Iterable[Read]:
        task = rows if isinstance(rows, Task) else task
        empty = True
        for where, row in located(examples_of(rows), of=part):
            empty = False
            owner = self._owners.of_row(row, own, where)
            match row:
                case {"input_ids": _}:
                    yield None, self._tokens(row, where), owner
                case _:
                    read = read_row(row, where)
                    yield (task.prompt_of(read), read.targets[0], task.answer_end), None, owner
        if empty:
            raise InvalidTask(f"{part} is empty: {self._owners.forms}")

    def _tokens(self, row: Mapping[str, Any], where: str) -> TrainingRow:
        """Return a row of `input_ids` and `labels`, equally many for a decoder. Raises InvalidTask, naming `where`."""
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
            training_row = TrainingRow(ids, target, target)
        elif len(labels) != len(ids):
            raise InvalidTask(f"{where} has {len(ids)} input_ids, but {len(labels)} labels; a decoder's are aligned")
        else:
            # nothing comes before the first token to predict it from
            start = next((place for place, label in enumerate(labels) if place and label != IGNORED), len(labels))
            training_row = TrainingRow(ids[:start], ids[start:], labels[start:])
        if not training_row.prompt or not training_row.labels:
            raise InvalidTask(f"{where} has no label to predict after its first token")
        known = len(self._model.get_input_embeddings().weight)
        if strange := [token for token in (*training_row.prompt, *training_row.target) if not 0 <= token < known]:
            raise InvalidTask(f"{where} has token {strange[0]}, but the model knows those from 0 to {known - 1}")
        if strange := [label for label in training_row.labels if label != IGNORED and not 0 <= label < known]:
            raise InvalidTask(f"{where} has label {strange[0]}, neither a token of the model's {known} nor {IGNORED}")
        limit = context_length(self._model)
        if limit and len(training_row.prompt) + len(training_row.target) > limit:
            raise InvalidTask(f"{where} has {len(ids)} tokens, but the model's context is {limit}; shorten it")
        return training_row


def _ints(values: Any, where: str) -> tuple[int, ...]:
    numbers = values.tolist() if hasattr(values, "tolist") else values
    if not is_list(numbers, int):
        raise InvalidTask(f"{where} has {values!r:.60}, not a list of token ids")
    return tuple(numbers)


@dataclass(frozen=True)
class HeldOut:
    """The held-out rows of a job, evaluated before the first step, after every `every` steps and after the last.

    With `patience`, the job ends after that many evaluations in a row without a lower loss, not counting the first.
    """

    rows: Sequence[EncodedRow]
    every: int
    patience: int | None = None


@dataclass(frozen=True)
class Judging:
    """The request for held-out rows: a share of each task's examples, or examples by task, and when they are evaluated."""

    held_out: float | Mapping[str, Any] | None
    every: int
    patience: int | None

    def require(self, counts: Mapping[str, int]) -> None:
        """Check the request against the tasks' numbers of examples, `counts`.

        Raises TrainingError for a share out of range and for patience without rows, UnknownName for rows of an unknown task.
        """
        if self.held_out is None:
            if self.patience is not None:
                raise TrainingError(
                    f"patience is {self.patience}, but nothing is held out to judge by; pass held_out=0.2, say"
                )
            return
        if isinstance(self.held_out, Mapping):
            if unknown := [name for name in self.held_out if name not in counts]:
                raise UnknownName(
                    f"held_out has rows of {unknown[0]!r}, which is not a task; the tasks are {', '.join(counts)}"
                )
            if strange := [name for name, rows in self.held_out.items() if isinstance(rows, int | float | None)]:
                raise TrainingError(
                    f"held_out of task {strange[0]!r} is {self.held_out[strange[0]]!r}; pass rows, such as (input, target)"
                )
            if empty := [name for name, rows in self.held_out.items() if is_empty(rows)]:
                raise TrainingError(f"held_out has no rows of task {empty[0]!r}; leave it out, or give it some")
        elif not fits(self.held_out, Annotated[float, Range(above=0, below=1)]):
            raise TrainingError(f"held_out is {self.held_out!r}; it must be a share above 0 and below 1, or rows by task")
        elif alone := [name for name, count in counts.items() if count < 2]:
            raise TrainingError(
                f"task {alone[0]!r} has one example, too few to hold out a share; pass rows as held_out={{name: rows}}"
            )

    def split(
        self, rows: Mapping[str, Sequence[Row]], read: Callable[[str, Any], Sequence[Row]], seed: int
    ) -> tuple[Mapping[str, Sequence[Row]], dict[str, HeldOut]]:
        """Return ({task: rows to train on}, {task: held-out rows}); the second has only tasks with held-out rows.

        `read(name, examples)` encodes the held-out examples of a task. A share is drawn by seed and name.
        """
        match self.held_out:
            case None:
                return rows, {}
            case Mapping() as by_task:
                judged = {name: read(name, examples) for name, examples in by_task.items()}
            case share:
                trained, judged = {}, {}
                for name, task_rows in rows.items():
                    # at least one row of each
                    count = min(len(task_rows) - 1, max(1, round(share * len(task_rows))))
                    chosen = set(torch.randperm(len(task_rows), generator=seeded(seed, name, "held out")).tolist()[:count])
                    trained[name] = [row for index, row in enumerate(task_rows) if index not in chosen]
                    judged[name] = [task_rows[index] for index in sorted(chosen)]
                rows = trained
        return rows, {name: HeldOut(judged_rows, self.every, self.patience) for name, judged_rows in judged.items()}


def is_empty(rows: Any) -> bool:
    """Return True if there are no rows; data whose length is unknown counts as not empty."""
    examples = examples_of(rows)
    return isinstance(examples, Sized) and not len(examples)


def examples_of(rows: Any) -> Any:
    """Return the examples of a Task, or `rows` itself if it is not one."""
    return rows.examples if isinstance(rows, Task) else rows


@dataclass(frozen=True)
class Texts:
    """Plain texts to train on, instead of a task: continued pre-training, in which every token is predicted.

    The tokens of all texts, an end of sequence after each, are one sequence, cut into rows of at most `length` tokens. A row
    begins with the last token of the row before, so that each token but the first is predicted once in an epoch.
    """

    texts: Sequence[str]
    length: Count = 256

    def __post_init__(self) -> None:
        if not is_list(self.texts, str) or not any(text.strip() for text in self.texts):
            raise InvalidTask(f"texts are {self.texts!r:.60}; give a list of texts that are not all empty")
        if not fits(self.length, Annotated[int, Range(least=2)]):
            raise InvalidTask(f"length is {self.length!r}; a row has 2 tokens or more")

    @property
    def examples(self) -> Sequence[str]:
        """The texts, for code that takes a Task's examples."""
        return self.texts

    def rows(self, model: Any, tokenizer: Any) -> list[EncodedRow]:
        """Return the rows in order. Raises InvalidTask for an encoder-decoder, or a length beyond the context."""
        limit = context_length(model)
        if model.config.is_encoder_decoder:
            raise InvalidTask("an encoder-decoder reads one text and writes another: give pairs (input, target), not Texts")
        if limit and self.length > limit:
            raise InvalidTask(f"rows of texts have {self.length} tokens, but the model's context is {limit}: lower length")
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = [token for text in self.texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
        starts = range(0, max(1, len(ids) - 1), self.length - 1)
        return [EncodedRow((ids[start],), tuple(ids[start + 1 : start + self.length])) for start in starts]


# the most examples and tokens in a packed row, and the least number of rows that few examples are packed into, roughly
MAX_PACKED = 8
MAX_PACKED_TOKENS, PACKED_ROWS = 1024, 40


def can_be_packed(model: Any, task: Task) -> bool:
    """Return True if the task has several examples, demonstrates with them, and the model is a decoder."""
    return len(task.examples) > 1 and shows_its_examples(task) and not model.config.is_encoder_decoder


def shows_its_examples(task: Task) -> bool:
    """Return True if the task has demonstrations and all of them are its own examples."""
    return bool(task.shown) and set(task.shown) <= set(task.examples)


def pack_task(model: Any, tokenizer: Any, task: Task, seed: int) -> list[TrainingRow]:
    """Return rows that show a task's examples one after the other, and train each answer given the examples before it.

    The examples stand in orders drawn by the seed, one row beginning with each example of an order, so that each stands at
    every place; few examples make about PACKED_ROWS rows. A chat's row is one conversation. One pass over a row teaches
    answers under 0, 1, 2 .. demonstrations (MetaICL, arXiv 2110.15943, takes a row for each). Raises InvalidTask for an
    example that alone exceeds the model's context.
    """
    alone, limit = with_pairs(task, demonstrations=()), context_length(model) or MAX_PACKED_TOKENS
    most = min(limit, MAX_PACKED_TOKENS)
    first = encode_pairs(model, tokenizer, alone, alone.examples)
    count = len(task.examples)
    orders = [
        torch.randperm(count, generator=seeded(seed, "packed", number)).tolist()
        for number in range(max(1, PACKED_ROWS // count))
    ]
    turned = [[*order[start:], *order[:start]][:MAX_PACKED] for order in orders for start in range(count)]
    if task.chat:
        return [_pack_turns(tokenizer, alone, [task.examples[place] for place in places], most) for places in turned]
    questions = tokenizer([f"\n\n{alone.prompt(text)}" for text, _ in task.examples], add_special_tokens=False)["input_ids"]
    answers = answer_ids(tokenizer, [target for _, target in task.examples], [""] * len(task.examples))
    (end,) = tokenizer(["\n"], add_special_tokens=False)["input_ids"]

    def row(places: Sequence[int]) -> TrainingRow:
        prompt, target, labels = first[places[0]].prompt, list(answers[places[0]]), list(answers[places[0]])
        for place in places[1:]:
            question, answer = questions[place], answers[place]
            if len(prompt) + len(target) + len(question) + len(answer) >= most:
                break
            target += [*question, *answer]
            # an answer ends with the line
            labels += [*end, *[IGNORED] * (len(question) - len(end)), *answer]
        return TrainingRow(prompt, (*target, *end), (*labels, *end))

    return [row(places) for places in turned]


def _pack_turns(tokenizer: Any, task: Task, pairs: Sequence[tuple[Prompt, str]], most: int) -> TrainingRow:
    """Return one conversation in which each pair is a turn of the user and its answer, up to `most` tokens.

    An answer whose tokens change when the chat template renders later turns is not trained.
    """
    ids: list[int] = []
    begins: list[tuple[int, list[int]]] = []
    for count, (question, target) in enumerate(pairs):
        prompt = with_pairs(task, demonstrations=tuple(pairs[:count])).prompt(question)
        assert isinstance(prompt, Conversation)
        before, answer = answered_ids(tokenizer, prompt, target)
        if count and len(before) + len(answer) >= most:
            break
        ids = [*before, *answer]
        begins.append((len(before), ids))
    labels = [IGNORED] * len(ids)
    for start, upto in begins:
        if ids[: len(upto)] == upto:
            labels[start : len(upto)] = upto[start:]
    first = begins[0][0]
    return TrainingRow(tuple(ids[:first]), tuple(ids[first:]), tuple(labels[first:]))
