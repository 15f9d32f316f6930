"""What a format reads from files and writes to them: an adapter without a name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from loraweave.types import Factors, Fingerprint


@dataclass(frozen=True, eq=False)
class Contents:
    """Layers by module path of the base model, its id, its fingerprint where known, the card as JSON, and heads.

    Heads are whole trained tensors by parameter name of the base model (PEFT's modules_to_save), fp32. Files lie beside the
    weights and are kept as they are (`loraweave.hub.formats._kept_files`).
    """

    base_model: str
    layers: Mapping[str, Factors]
    fingerprint: Fingerprint | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    heads: Mapping[str, Tensor] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
