"""Recipes of experts that are trained together (`recipes`, `forms`, `losses`): gates, sites, and experts in a model."""

from loraweave.registry import face

_MODULES = {
    "composer.experts.expert_model": "ExpertModel require_expert_model",
    "composer.experts.forms._form": "Args Form Seen Weigh fitting",
    "composer.experts.forms.sum_of_experts": "SumOfExperts",
    "composer.experts.make": "has_expert layers_with put_expert",
    "composer.experts.parts": "is_named layer_sites make_recipe numbered_blocks require_all_named shapes_of",
    "composer.experts.running": "Running",
    "routers.recipes._gate": "Call Gate TokenGate Weighing draw_linear",
    "routers.recipes._recipe": (
        "ATTENTION FEED_FORWARD EvenRecipe ExpertShape Recipe Site TopKRecipe balance_term by_layer uniform"
    ),
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
