"""Which adapter counted for which token, and what did it cost? Figures, a picture and a page of them, and curves.

`explain` has figures, a table, a picture and a page of a mixture's weights, `loraweave explain` in a shell; `loads` says
what a forward used, `cost` what it added; `plot_training`, `plot_search` and `plot_searches` draw what was trained and
searched. Pictures need `loraweave[plot]`. An explanation is one forward that keeps all weights.
"""

from loraweave.extend import face

_MODULES = {
    "costs": "Cost LayerCost cost",
    "curves": "plot_search plot_searches plot_training",
    "explanation": "Explanation",
    "reading": "explain",
    "used": "Load loads",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
