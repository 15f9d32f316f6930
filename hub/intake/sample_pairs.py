"""Sample inputs of an adapter with the outputs beside them, which its card holds as `outputs` in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loraweave.errors import AdapterUnsupported
from loraweave.hub.fields import MAX_EXAMPLE_BYTES, checked_text


def split_pairs(name: str, examples: Any) -> tuple[Any, tuple[str, ...]]:
    """The inputs, and the outputs where the examples are pairs. What is no list of them is given back for `checked_fields`.

    AdapterUnsupported for a mixture of texts and pairs.
    """
    if isinstance(examples, str) or not isinstance(examples, list | tuple | set | frozenset):
        return examples, ()
    listed = sorted(examples, key=repr) if isinstance(examples, set | frozenset) else list(examples)
    pairs = [row for row in listed if isinstance(row, list | tuple) and len(row) == 2]
    if not pairs:
        return examples, ()
    if len(pairs) < len(listed):
        odd = next(row for row in listed if not (isinstance(row, list | tuple) and len(row) == 2))
        raise AdapterUnsupported(
            f"{len(pairs)} of the {len(listed)} examples of adapter {name!r} are pairs (input, output), and {odd!r:.80} is "
            "none; give all with an output, or inputs alone"
        )
    outputs = [checked_text(name, f"examples[{number}]", row[1], MAX_EXAMPLE_BYTES) for number, row in enumerate(pairs)]
    return [row[0] for row in pairs], tuple(outputs)


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
