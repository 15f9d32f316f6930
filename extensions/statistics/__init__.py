"""Which adapter should count where, judged by data? Merge methods that weigh by data, and the statistics they need.

`collect_statistics` runs a model with an adapter over texts of its task, forwards and backwards, and `pool_statistics` many
adapters; `fisher`, `regmean` and `least_squares` merge by what comes back. It needs no other package.
"""

from loraweave.extend import face

_MODULES = {
    "collecting": "collect_statistics record_inputs",
    "pooling": "pool_statistics",
    "saved": "LayerStatistics Statistics",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
