"""What functions on trained experts need to be given."""

from __future__ import annotations

from typing import Any

from loraweave.composer.experts.expert_model import ExpertModel
from loraweave.errors import WeightingError


def require_expert_model(model: Any, asker: str) -> None:
    """Raises WeightingError for what is no `ExpertModel`, such as a base model alone."""
    if not isinstance(model, ExpertModel):
        raise WeightingError(
            f"{asker} was given {type(model).__name__}, which has no experts: give what lw.experts(recipe, base_model) made"
        )
