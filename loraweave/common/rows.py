"""Readers of rows, which are examples with an input and a target, in every usual form.

A row is a pair (input, target), a mapping with a pair of columns in `COLUMNS` or with `messages`, or a list of chat
messages. An input may be chat messages, too. Rows come as an iterable of rows, as a data set with named columns
(`datasets.Dataset`, whose integer labels get their names), as a data frame, or as the path of a .jsonl or .csv file.
Anything else is refused, never guessed at.
"""

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

from loraweave.common.chat import Conversation, Prompt, is_messages
from loraweave.common.checks import are_texts, is_list
from loraweave.errors import InvalidTask

GivenRows: TypeAlias = Iterable[Any] | os.PathLike[str]

# the targets of a row. "one": one text, not empty. "blank": one text, perhaps empty. "several": one, or a list of accepted
# ones. "any": one, several, empty ones or none. "none": targets are ignored. With the last two a text alone is an input.
Targets = Literal["one", "blank", "several", "any", "none"]
_LISTS = ("several", "any")

# {column of the input: columns that may have its target}
COLUMNS = {"input": ("target", "output"), "prompt": ("completion", "target"), "question": ("answer",), "text": ("label",)}
ENDINGS = (".jsonl", ".json", ".csv")
_BEYOND = "beyond the header"
FORMS = (
    "rows are pairs of texts (input, target), or mappings with input and target (or output), prompt and completion, "
    "question and answer, text and label, or messages, as a prompt may be; a data set or a data frame of these; or the path "
    "of a .jsonl or .csv file"
)


@dataclass(frozen=True)
class Row:
    """One example: its input, and its accepted targets, the first of which is the one to learn.

    `instruction` is that of a column `instruction` or `definition`, or a system turn, and `split` that of a column `split`;
    both are "" if missing. `whole_prompt` is True if the input came from a column `prompt`. For a row of chat messages,
    `chat` has the turns before the answer, a system turn included, and `input` is their text.
    """

    input: str
    targets: tuple[str, ...] = ()
    instruction: str = ""
    whole_prompt: bool = False
    split: str = ""
    chat: Conversation | None = None

    @property
    def asked(self) -> Prompt:
        """The input as a prompt: for a row of chat messages the conversation before the answer, else the text."""
        return self.input if self.chat is None else self.chat


def read_rows(
    given: GivenRows,
    *,
    noun: str = "row",
    of: str = "",
    targets: Targets = "one",
    columns: Mapping[str, str] | None = None,
    one_split: bool = True,
) -> list[Row]:
    """Read rows of any form, in order. `noun` and `of` name a row in error messages: "row 3 of dataset".

    `columns` maps columns of the data to names in `COLUMNS`; all other columns are then ignored. Raises InvalidTask if
    `given` is not rows, if a row has another form (with its number and contents), and, with `one_split`, if rows are of
    several splits.
    """
    rows = []
    for where, row in located(given, noun=noun, of=of, one_split=one_split and targets != "none"):
        if columns is not None and isinstance(row, Mapping):
            row = {name: row.get(column) for column, name in columns.items()}
        rows.append(read_row(row, where, targets=targets))
    return rows


def read_inputs(given: GivenRows, *, of: str = "") -> list[str]:
    """Return the inputs of texts or rows, in order, as texts. Raises InvalidTask for other values, or a single text."""
    return [row.input for row in read_rows(given, noun="input", of=of, targets="none")]


def read_asked(given: GivenRows) -> list[Prompt]:
    """Return the inputs of texts or rows, in order, as prompts: chat messages as a `Conversation`, others as texts."""
    return [row.asked for row in read_rows(given, noun="input", targets="none")]


def shared_instruction(rows: Sequence[Row]) -> str:
    """Return the instruction that all rows share, "" if they have none. Raises InvalidTask if two rows differ."""
    for number, row in enumerate(rows, start=1):
        if row.instruction != rows[0].instruction:
            raise InvalidTask(
                f"example 1 has the instruction {rows[0].instruction!r:.60}, and example {number} {row.instruction!r:.60}: "
                "pass the task's as instruction=..., or write each into its input"
            )
    return rows[0].instruction if rows else ""


def located(given: GivenRows, *, noun: str = "row", of: str = "", one_split: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield (place, raw row) for every row, with a place such as "row 3 of x"; a data set's class numbers become names.

    Raises InvalidTask if `given` is not rows, for an unreadable file, and, with `one_split`, if rows are of several splits.
    """
    first = ""
    for where, row in _source(given, noun, of):
        match row:
            case {"split": str(split)} if one_split:
                first = first or split
                if split != first:
                    raise InvalidTask(
                        f"{where} is of split {split!r}, and those before it of {first!r}: give the rows of one"
                    )
        yield where, row


def read_row(row: Any, where: str, *, targets: Targets = "one") -> Row:
    """Read one row; `where` names it in error messages. Raises InvalidTask for another form, or without a target."""
    match row:
        case Mapping():
            return _of_mapping({str(name): value for name, value in row.items() if not _is_missing(value)}, where, targets)
        case str() if targets in ("any", "none"):
            return Row(row)
        case Conversation() if targets in ("any", "none"):
            return _of_chat(row, None, "", where, targets)
        case _ if is_messages(row):
            return _of_mapping({"messages": row}, where, targets)
        case [Conversation() as chat, target] if is_list(row):
            return _of_chat(chat, target, "", where, targets)
        case [messages, target] if is_list(row) and is_messages(messages):
            return _of_chat(Conversation.read(messages, where), target, "", where, targets)
        # an array of two texts matches too, from numpy 2.5 on
        case [str(text), target] if is_list(row) and _are_targets(target, targets):
            return Row(text, _checked(target, text, where, targets))
    what = "a text, nor a pair of texts" if targets in ("any", "none") else "a pair of texts (input, target)"
    raise InvalidTask(f"{where} is {row!r:.80}, not {what}: {FORMS}")


def _source(given: GivenRows, noun: str, of: str) -> Iterator[tuple[str, Any]]:
    whole = f"the {noun}s of {of}" if of else f"the {noun}s"
    if isinstance(given, os.PathLike) or (isinstance(given, str) and given.lower().endswith(ENDINGS)):
        yield from _of_file(Path(given))
        return
    if isinstance(given, Mapping):
        names = ", ".join(map(repr, given))
        raise InvalidTask(f"{whole}: got one mapping with {names:.200}, not rows: pass a list of rows, or one of its parts")
    records = _records(given)
    if records is None:
        if isinstance(given, str) and noun == "input":
            raise InvalidTask(f"{whole}: got the text {given!r:.60} alone: give a list of texts, [{given!r:.60}]")
        raise InvalidTask(f"{whole}: got {given!r:.80}, not rows: {FORMS}")
    names_of = _class_names(getattr(given, "features", None))
    for number, row in enumerate(records, start=1):
        where = f"{noun} {number} of {of}" if of else f"{noun} {number}"
        yield where, _with_names(row, names_of) if names_of and isinstance(row, Mapping) else row


def _records(given: Any) -> Iterable[Any] | None:
    """Return the rows of a pandas or polars frame, else an iterator over `given`; None for a text or without an iterator."""
    if isinstance(given, str | bytes):
        return None
    if hasattr(given, "to_dicts"):
        return cast(Iterable[Any], given.to_dicts())
    if hasattr(given, "to_dict") and hasattr(given, "columns"):
        return cast(Iterable[Any], given.to_dict("records"))
    try:
        return cast(Iterable[Any], iter(given))
    except TypeError:
        return None


def _class_names(features: Any) -> dict[str, Sequence[str]]:
    """Return {column: names of its classes} for those columns of a data set that store classes as integers."""
    if not isinstance(features, Mapping):
        return {}
    named = {column: getattr(feature, "names", None) for column, feature in features.items()}
    return {column: names for column, names in named.items() if is_list(names)}


def _with_names(row: Mapping[str, Any], names_of: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    changed = dict(row)
    for column, names in names_of.items():
        # -1 is an unknown label
        if isinstance(row.get(column), int) and 0 <= row[column] < len(names):
            changed[column] = names[row[column]]
    return changed


def _of_file(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        # line breaks are not translated: only a line feed ends a line, and texts may contain the others
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidTask(f"{path} is not UTF-8 text (byte {error.start}); give a JSONL or CSV file") from error
    except OSError as error:
        raise InvalidTask(f"{path} cannot be read ({error.strerror}); give a JSONL or CSV file") from error
    if path.suffix.lower() == ".csv":
        yield from _of_csv(path, text)
        return
    yield from located_lines(text.split("\n"), str(path))


def located_lines(lines: Iterable[str], of: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, raw row) for every line of JSON that is not blank. Raises InvalidTask for a line that is not JSON."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{of} line {number}"
        try:
            yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidTask(f"{where} is not JSON ({error}); every line is one object with input and target") from error


def _of_csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        for number, row in enumerate(csv.DictReader(io.StringIO(text, newline=""), restkey=_BEYOND), start=1):
            where = f"{path} row {number}"
            if _BEYOND in row:
                raise InvalidTask(f"{where} has more fields than the first line has names: quote texts with commas")
            yield where, row
    except csv.Error as error:
        raise InvalidTask(f"{path} is not CSV ({error}); its first line has the names of the columns") from error


def _of_mapping(row: Mapping[str, Any], where: str, targets: Targets) -> Row:
    instruction = row.get("instruction") or row.get("definition") or ""
    split = row.get("split", "")
    if not isinstance(instruction, str):
        raise InvalidTask(f"{where} has {instruction!r:.60} as its instruction, which is not a text")
    column, answer = _columns(row, where, targets)
    text, target_value = row[column], None if answer is None else row[answer]
    also = _listed(row.get("also_ok", []) if targets == "several" else [])
    if not are_texts(also):
        raise InvalidTask(f"{where} has {also!r:.60} as 'also_ok', which is not a list of texts")
    if column == "messages" or is_messages(text):
        chat = Conversation.read(text, where)
        if column == "messages" and chat.turns[-1][0] == "assistant":
            chat, target_value = Conversation(chat.turns[:-1]), chat.turns[-1][1]
        if is_messages(target_value):
            completion = Conversation.read(target_value, where).turns
            if (roles := [role for role, _ in completion]) != ["assistant"]:
                raise InvalidTask(f"{where} has a completion of {', '.join(roles)}: it must be one turn of the assistant")
            target_value = completion[0][1]
        target_value = [*_listed(target_value), *also] if also and target_value is not None else target_value
        return replace(_of_chat(chat, target_value, instruction, where, targets), split=str(split))
    if not isinstance(text, str):
        raise InvalidTask(f"{where} has {text!r:.60} as {column!r}, which is not a text: {FORMS}")
    row_targets: tuple[str, ...] = ()
    if target_value is not None and targets != "none":
        row_targets = _checked([*_texts(target_value, str(answer), where, targets), *also], text, where, targets)
    return Row(text, row_targets, instruction, column == "prompt", str(split))


def _of_chat(chat: Conversation, given: Any, instruction: str, where: str, targets: Targets) -> Row:
    """Make a row from the turns before an answer, and the answer or answers `given` (None: no answer)."""
    roles = [role for role, _ in chat.turns]
    if (given is None and targets not in ("any", "none")) or not roles or roles[-1] != "user":
        said = ", ".join([*roles, *([] if given is None else ["assistant"])]) or "nobody"
        raise InvalidTask(f"{where} has messages of {said}: the last two must be a user's turn and the answer to it")
    text = str(chat)
    row_targets: tuple[str, ...] = ()
    if given is not None and targets != "none":
        row_targets = _checked(_texts(given, "completion", where, targets), text, where, targets)
    return Row(text, row_targets, chat.system or instruction, chat=chat)


def _texts(given: Any, answer: str, where: str, targets: Targets) -> list[str]:
    if not _are_targets(given, targets):
        kind = "a text, or a list of texts" if targets in _LISTS else "one text"
        way = "; give the names of labels, not their numbers" if isinstance(given, int) else ""
        raise InvalidTask(f"{where} has {given!r:.60} as {answer!r}, which is not {kind}{way}")
    return _listed(given)


def _columns(row: Mapping[str, Any], where: str, targets: Targets) -> tuple[str, str | None]:
    """Return the columns of the input and the target (None: no target). Raises InvalidTask unless just one pair fits."""
    columns: list[tuple[str, str | None]] = [
        (column, answer) for column, answers in COLUMNS.items() if column in row for answer in answers if answer in row
    ]
    if not columns and targets in ("any", "none"):
        columns = [(column, None) for column in COLUMNS if column in row]
    # a column `prompt` was made from the column `input` beside it, and takes precedence
    if any(column == "prompt" for column, _ in columns):
        columns = [pair for pair in columns if pair[0] != "input"]
    columns += [("messages", None)] if "messages" in row else []
    if len(columns) == 1:
        return columns[0]
    has = f"{where} has {sorted(row)}"
    if columns:
        pairs = " and ".join("/".join(filter(None, pair)) for pair in columns)
        raise InvalidTask(f"{has:.300}, in which {pairs} could be the texts: leave the columns of one")
    # the error names what is missing of the form that has most columns in the row
    column, answers = max(COLUMNS.items(), key=lambda form: (form[0] in row) + any(answer in row for answer in form[1]))
    missing = [] if column in row else [repr(column)]
    missing += [] if any(answer in row for answer in answers) else [" or ".join(map(repr, answers))]
    raise InvalidTask(f"{has:.300}, and no {' and no '.join(missing)}: {FORMS}")


def _is_missing(value: Any) -> bool:
    """Return True if a data set or frame marks the value as missing."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _listed(value: Any) -> list[Any]:
    return list(value) if is_list(value) else [value]


def _are_targets(value: Any, targets: Targets) -> bool:
    if targets == "none":
        return True
    return are_texts(value if is_list(value) and targets in _LISTS and len(value) > 0 else [value])


def _checked(value: Any, text: str, where: str, targets: Targets) -> tuple[str, ...]:
    row_targets = () if targets == "none" else tuple(_listed(value))
    # targets that are neither learned nor compared may be empty
    if targets in ("one", "several") and not all(target.strip() for target in row_targets):
        raise InvalidTask(f"{where} (input {text!r:.60}) has an empty target; there is nothing to learn from it")
    return row_targets
