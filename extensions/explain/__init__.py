"""Which adapter counted for which token, what did it cost, and does an odd word change the answer? Figures and probes.

`explain` has figures, a table, a picture and a page of a mixture's weights, `loraweave explain` in a shell; `loads` says
what a forward used, `cost` what it added; `probe` looks for planted triggers; `plot_training`, `plot_search` and
`plot_searches` draw what was trained and searched. Pictures need `loraweave[plot]`. An explanation is one forward that
keeps all weights, a probe two rows for each input and word.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.explain.costs import Cost, LayerCost, cost
    from loraweave.extensions.explain.curves import plot_search, plot_searches, plot_training
    from loraweave.extensions.explain.explanation import Explanation
    from loraweave.extensions.explain.probes import Probed, probe
    from loraweave.extensions.explain.reading import explain
    from loraweave.extensions.explain.used import Load, loads
else:
    _MODULES = {
        "costs": "Cost LayerCost cost",
        "curves": "plot_search plot_searches plot_training",
        "explanation": "Explanation",
        "probes": "Probed probe",
        "reading": "explain",
        "used": "Load loads",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = [
    "Cost",
    "Explanation",
    "LayerCost",
    "Load",
    "Probed",
    "cost",
    "explain",
    "loads",
    "plot_search",
    "plot_searches",
    "plot_training",
    "probe",
]
