"""The fields of a record that people write: their types, their limits, and their sources."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraweave.common.checks import is_list, one_or_many
from loraweave.common.rows import GivenRows, read_rows
from loraweave.errors import AdapterUnsupported

MAX_DESCRIPTION_BYTES = 100_000
MAX_EXAMPLES = 1_000
MAX_EXAMPLE_BYTES = 10_000
MAX_TAGS = 1_000
MAX_LANGUAGES = 1_000
# the limit of tags, licenses, languages and ids of base models
MAX_LABEL_BYTES = 1_000
MAX_CARD_BYTES = 4_000_000

OWN_FIELDS = ("description", "examples", "tags", "license", "language")


@dataclass(frozen=True)
class Fields:
    """The fields that a search reads: description, example inputs, tags, the license's SPDX id, and language codes."""

    description: str = ""
    examples: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    license: str | None = None
    language: tuple[str, ...] = ()


def checked_fields(name: str, given: Mapping[str, Any]) -> Fields:
    """Check the fields that a user gave for adapter `name`; return them without repeated tags and languages.

    Raises AdapterUnsupported for a wrong type or size.
    """
    labels = _texts(name, "tags", given["tags"], MAX_TAGS, MAX_LABEL_BYTES)
    languages = _texts(name, "language", given["language"], MAX_LANGUAGES, MAX_LABEL_BYTES)
    return Fields(
        checked_text(name, "description", given["description"], MAX_DESCRIPTION_BYTES),
        _texts(name, "examples", given["examples"], MAX_EXAMPLES, MAX_EXAMPLE_BYTES),
        tuple(dict.fromkeys(labels)),
        checked_text(name, "license", given["license"] or "", MAX_LABEL_BYTES) or None,
        tuple(dict.fromkeys(languages)),
    )


def checked_text(name: str, field: str, text: Any, limit_bytes: int) -> str:
    if not isinstance(text, str):
        raise AdapterUnsupported(
            f"the {field} of adapter {name!r} must be text, not {type(text).__name__}; pass text as {field.split('[')[0]}="
        )
    # surrogatepass: a lone surrogate is stored as it is, and has a size
    size_bytes = len(text.encode("utf-8", "surrogatepass"))
    if size_bytes > limit_bytes:
        raise AdapterUnsupported(f"the {field} of adapter {name!r} has {size_bytes:,} bytes; the limit is {limit_bytes:,}")
    return text


def _texts(name: str, field: str, values: Any, max_count: int, limit_bytes: int) -> tuple[str, ...]:
    match values:
        case str() | list() | tuple():
            texts = one_or_many(values)
        case set() | frozenset():
            # a set has no order of its own, and the same call must store the same row
            texts = tuple(sorted(values))
        case _:
            raise AdapterUnsupported(
                f"the {field} of adapter {name!r} must be a list of texts, not {type(values).__name__}; "
                f"pass them as {field}="
            )
    if len(texts) > max_count:
        raise AdapterUnsupported(f"adapter {name!r} has {len(texts):,} {field}; the limit is {max_count:,}")
    return tuple(checked_text(name, f"{field}[{number}]", text, limit_bytes) for number, text in enumerate(texts))


def split_pairs(name: str, examples: GivenRows) -> tuple[list[str], list[str]]:
    """Return the inputs, and the outputs if the examples have them; a single text is one input.

    Raises InvalidTask for anything but texts and rows, AdapterUnsupported if only some have outputs or one is too long.
    """
    match examples:
        case str():
            return [examples], []
        case set() | frozenset():
            # a set has no order of its own, and the same call must store the same row
            examples = sorted(examples, key=repr)
    read = read_rows(examples, noun="example", of=f"adapter {name!r}", targets="any")
    outputs = [row.targets[0] for row in read if row.targets]
    if len(outputs) not in (0, len(read)):
        odd = next(row.input for row in read if not row.targets)
        raise AdapterUnsupported(
            f"{len(outputs)} of the {len(read)} examples of adapter {name!r} are pairs (input, output), and {odd!r:.80} is "
            "none; give all with an output, or inputs alone"
        )
    for number, output in enumerate(outputs):
        checked_text(name, f"examples[{number}]", output, MAX_EXAMPLE_BYTES)
    return [row.input for row in read], outputs


def card_with_outputs(
    card: Mapping[str, Any], before: Sequence[str] | None, examples: Sequence[str], outputs: Sequence[str]
) -> Mapping[str, Any]:
    """Return the card with `outputs`; if these are empty, keep the card's own outputs only if they belong to the examples.

    They belong if `examples` equals `before`, or if `before` is None and there are as many outputs as examples.
    """
    if outputs:
        return {**card, "outputs": list(outputs)}
    card_outputs = card.get("outputs")
    if card_outputs is None:
        return card
    as_many = before is None and is_list(card_outputs) and len(card_outputs) == len(examples)
    if as_many or (before is not None and list(before) == list(examples)):
        return card
    return {key: value for key, value in card.items() if key != "outputs"}
