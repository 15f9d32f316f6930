"""Which adapters are for a base model, and a warning for those that only have its name."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from loraweave.types import BaseKey, Record


def for_base(records: Iterable[Record], wanted: str | BaseKey | None) -> list[Record]:
    """The records for that base model: of a text the id must be equal, of a key nothing known may contradict it.

    Adapters under the key's id that were made for another model are left out with a warning.
    """
    if wanted is None:
        return list(records)
    if isinstance(wanted, str):
        return [record for record in records if record.base_model == wanted]
    reasons = [(record, wanted.differs(record.base)) for record in records]
    namesakes = [(record, why) for record, why in reasons if why and record.base_model == wanted.id]
    if namesakes:
        first, why = namesakes[0]
        warnings.warn(
            f"{len(namesakes)} adapters are left out, {first.name!r} the first: they name the base model {wanted.id!r}, but "
            f"were made for another ({why})",
            stacklevel=3,
        )
    return [record for record, why in reasons if not why]
