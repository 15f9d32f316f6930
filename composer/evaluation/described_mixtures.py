"""What the losses of mixtures depend on besides the examples, so that a checkpoint of others can be told apart."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from loraweave.composer.composer import Composer
from loraweave.composer.evaluation.penalty import Penalty
from loraweave.hub.fingerprint import fingerprint


def described_mixtures(engine: Composer, merge_method: str, penalty: Penalty) -> dict[str, Any]:
    """The base model and its dtype, the experts' hashes, and what weights mean and cost, for JSON.

    It opens the experts of a lazy pool.
    """
    return {
        "base": fingerprint(engine.model).to_json(),
        "dtype": str(next(engine.model.parameters()).dtype),
        "experts": {name: adapter.hash for name, adapter in engine.pool.adapters.items()},
        "merge_method": merge_method,
        "penalty": asdict(penalty),
    }
