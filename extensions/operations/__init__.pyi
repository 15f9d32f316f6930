from loraweave.extensions.operations.admission import Budgets as Budgets
from loraweave.extensions.operations.admission import StepTimes as StepTimes
from loraweave.extensions.operations.figures import PrometheusMetrics as PrometheusMetrics
from loraweave.extensions.operations.prefixes import KeptPrefixes as KeptPrefixes
from loraweave.extensions.operations.requests import observed as observed
