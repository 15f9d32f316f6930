"""How does a server keep within its memory and time, and what does it report? By budgets, and by figures for Prometheus.

`Limits.memory_bytes` and `Limits.token_seconds` (`loraweave serve --memory-bytes`, `--token-seconds`) are kept by `Budgets`:
rows wait for memory, and for steps that would be quick enough. `PrometheusMetrics` is what /metrics shows. Both count at
each step of the model; without a budget nothing is added up. `KeptPrefixes` keeps what was read of prompts, up to
`Limits.prefix_bytes`, so that it is not read again. `observed` logs each request, and sends its spans to OpenTelemetry.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.operations.admission import Budgets, StepTimes
    from loraweave.extensions.operations.figures import PrometheusMetrics
    from loraweave.extensions.operations.prefixes import KeptPrefixes
    from loraweave.extensions.operations.requests import observed
else:
    __getattr__ = lazy(
        __name__,
        {
            f"{__name__}.admission": "Budgets StepTimes",
            f"{__name__}.figures": "PrometheusMetrics",
            f"{__name__}.prefixes": "KeptPrefixes",
            f"{__name__}.requests": "observed",
        },
    )

__all__ = ["Budgets", "KeptPrefixes", "PrometheusMetrics", "StepTimes", "observed"]
