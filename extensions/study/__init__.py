"""Which method is best for a task? All methods asked alike, with intervals, and the scores of a mixture by lm_eval.

`study` runs the cells of a file that are missing and writes tables, plots and a page; `loraweave study FILE` does so in a
shell. `evaluate_harness` has EleutherAI's lm-evaluation-harness score whatever mixes adapters; `loraweave eval --harness`
calls it. Some metrics, and data sets as tasks, need `loraweave[study]`, plots `loraweave[plot]`, and the harness needs
`loraweave[harness]`.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.study.harness import evaluate_harness
    from loraweave.extensions.study.results import Figure, StudyResults
    from loraweave.extensions.study.running import study
else:
    _MODULES = {"harness": "evaluate_harness", "results": "Figure StudyResults", "running": "study"}
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["Figure", "StudyResults", "evaluate_harness", "study"]
