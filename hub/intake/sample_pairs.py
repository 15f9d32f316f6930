"""Sample inputs of an adapter with the outputs beside them, which its card holds as `outputs` in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.common.rows import GivenRows, read_rows
from loraweave.errors import AdapterUnsupported
from loraweave.hub.fields import MAX_EXAMPLE_BYTES, checked_text


def split_pairs(name: str, examples: GivenRows) -> tuple[list[str], list[str]]:
    """The inputs, and the outputs where the examples have them; a single text is one input.

    InvalidTask for what is no texts and no rows, AdapterUnsupported where some have outputs and some have none, and for an
    output above the limit.
    """
    if isinstance(examples, str):
        return [examples], []
    # a set has no order of its own, and the same call must store the same row
    listed = sorted(examples, key=repr) if isinstance(examples, set | frozenset) else examples
    read = read_rows(listed, noun="example", of=f"adapter {name!r}", targets="any")
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
    """The card with these outputs; without any, with its own as long as they belong to the examples.

    They do where the examples are still those of `before`, or where nothing was before and there are as many.
    """
    if outputs:
        return {**card, "outputs": list(outputs)}
    own = card.get("outputs")
    if own is None:
        return card
    as_many = before is None and isinstance(own, list | tuple) and len(own) == len(examples)
    if as_many or (before is not None and list(before) == list(examples)):
        return card
    return {key: value for key, value in card.items() if key != "outputs"}
