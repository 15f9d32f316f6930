"""The parts that this extension adds to a server: figures, logs, kept prefixes, and the admission of rows under a budget."""

from loraweave.extensions.operations.admission import Budgets as make_admission
from loraweave.extensions.operations.figures import PrometheusMetrics as make_metrics
from loraweave.extensions.operations.logs import log_config
from loraweave.extensions.operations.prefixes import KeptPrefixes as make_prefixes
from loraweave.extensions.operations.requests import observed

__all__ = ["log_config", "make_admission", "make_metrics", "make_prefixes", "observed"]
