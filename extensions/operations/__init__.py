"""How does a server keep within its memory and time, and what does it report? By budgets, and by figures for Prometheus.

`Limits.memory_bytes` and `Limits.token_seconds` (`loraweave serve --memory-bytes`, `--token-seconds`) are kept by `Budgets`:
rows wait for memory, and for steps that would be quick enough. `PrometheusMetrics` is what /metrics shows. Both count at
each step of the model; without a budget nothing is added up. `KeptPrefixes` keeps what was read of prompts, up to
`Limits.prefix_bytes`, so that it is not read again. `observed` logs each request, and sends its spans to OpenTelemetry.
"""

from loraweave.extend import face

_MODULES = {
    "admission": "Budgets StepTimes",
    "figures": "PrometheusMetrics",
    "prefixes": "KeptPrefixes",
    "requests": "observed",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
