"""Base models (`bases`, `pipelines`): how a model is known and loaded, and its layers by kind."""

from loraweave.registry import face

_MODULES = {
    "composer.model.kinds": "by_row conv is_near linear",
    "composer.model.layers": "GradientTap is_floating multiplies_columns target_layer tied_parameters",
    "hub.base": (
        "PIPELINE_PARTS Parts base_config base_id fast_dtype head_size require_model require_same_base "
        "rounded_samples sampled_places says_nothing"
    ),
    "hub.base_layer": "BaseLayer ExpertMatrix as_base_layer base_layer expert_matrix missing_layer",
    "hub.base_reference": "BaseReference base_loader",
    "hub.gguf_base": "EMBEDDED GgufBase",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
