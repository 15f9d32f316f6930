"""Which adapter should count where, judged by data? Merge methods that weigh by data, and the statistics they need.

`collect_statistics` runs a model with an adapter over texts of its task, forwards and backwards, and `pool_statistics` many
adapters; `fisher`, `regmean` and `least_squares` merge by what comes back. It needs no other package.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.statistics.collecting import collect_statistics, record_inputs
    from loraweave.extensions.statistics.pooling import pool_statistics
    from loraweave.extensions.statistics.saved import LayerStatistics, Statistics
else:
    _MODULES = {
        "collecting": "collect_statistics record_inputs",
        "pooling": "pool_statistics",
        "saved": "LayerStatistics Statistics",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["LayerStatistics", "Statistics", "collect_statistics", "pool_statistics", "record_inputs"]
