"""What a format reads from files and writes to them: an adapter without a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loraweave.types import Factors, Fingerprint


@dataclass(frozen=True, eq=False)
class Contents:
    """Layers by module path of the base model, the base model's id, its fingerprint where known, and the card as JSON."""

    base_model: str
    layers: Mapping[str, Factors]
    fingerprint: Fingerprint | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
