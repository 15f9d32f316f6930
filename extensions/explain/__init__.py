"""Which adapter counted for which token, and what did it cost? Figures, a picture and a page of them, and curves.

`explain` has figures, a table, a picture and a page of a mixture's weights, `loraweave explain` in a shell; `loads` says
what a forward used, `cost` what it added; `plot_training`, `plot_search` and `plot_searches` draw what was trained and
searched. Pictures need `loraweave[plot]`. An explanation is one forward that keeps all weights.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.explain.costs import Cost, LayerCost, cost
    from loraweave.extensions.explain.curves import plot_search, plot_searches, plot_training
    from loraweave.extensions.explain.explanation import Explanation
    from loraweave.extensions.explain.reading import explain
    from loraweave.extensions.explain.used import Load, loads
else:
    _MODULES = {
        "costs": "Cost LayerCost cost",
        "curves": "plot_search plot_searches plot_training",
        "explanation": "Explanation",
        "reading": "explain",
        "used": "Load loads",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = [
    "Cost",
    "Explanation",
    "LayerCost",
    "Load",
    "cost",
    "explain",
    "loads",
    "plot_search",
    "plot_searches",
    "plot_training",
]
