"""Which method is best for a task? All methods asked alike, with intervals, and the scores of a mixture by lm_eval.

`study` runs the cells of a file that are missing and writes tables, plots and a page; `loraweave study FILE` does so in a
shell. `evaluate_harness` has EleutherAI's lm-evaluation-harness score whatever mixes adapters; `loraweave eval --harness`
calls it. Some metrics, and data sets as tasks, need `loraweave[study]`, plots `loraweave[plot]`, and the harness needs
`loraweave[harness]`.
"""

from loraweave.extend import face

_MODULES = {"harness": "evaluate_harness", "results": "Figure StudyResults", "running": "study"}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
