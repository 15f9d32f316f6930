"""Compositions: formulas, programs, ensembles, and the candidates and reports of a search."""

from loraweave.registry import face

_MODULES = {
    "composer.compose.candidates": "experts_of in_context_adapter",
    "composer.compose.compose": "ComposeCall",
    "composer.compose.program": "Program",
    "composer.ensembles.ensemble": (
        "EnsemblePrediction align_right answers by_rows known_members last_positions member_passes rows_of rows_that_fit "
        "without_cache"
    ),
    "composer.formula.nodes": "Named Stored Sum leaves",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
