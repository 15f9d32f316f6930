"""The parts that this extension adds to a server: figures, logs, kept prefixes, and the admission of rows under a budget."""

from typing import Any

from loraweave.extend.serving import Admission, Limits
from loraweave.extensions.operations.figures import PrometheusMetrics as make_metrics
from loraweave.extensions.operations.logs import log_config
from loraweave.extensions.operations.prefixes import KeptPrefixes as make_prefixes
from loraweave.extensions.operations.requests import observed

__all__ = ["log_config", "make_admission", "make_metrics", "make_prefixes", "observed"]


def make_admission(model: Any, limits: Limits, prefixes: Any, experts: Any) -> Admission:
    """Return a policy that runs answers together within `limits`, and drops kept `prefixes` and idle `experts` for room."""
    from loraweave.extensions.operations.admission import Budgets

    return Budgets(model, limits, prefixes, experts)
