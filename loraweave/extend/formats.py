"""Adapter formats and targets of exports (`formats`, `targets`): files read within limits, cards, configs and tensors."""

from loraweave.registry import face

_MODULES = {
    "common.checks": "entry",
    "hub.adapter": "ExportReport",
    "hub.formats._card": "base_model_of_readme json_text license_of_fields read_card readme_text",
    "hub.formats._config": "AdapterConfig config_fields words",
    "hub.formats._contents": "Bound Contents Dense cut_update lora_factors",
    "hub.formats._files": "folder_within open_file parse_json present read_bytes read_json",
    "hub.formats._peft_config": "module_names parse_lora stored_names stored_tensors",
    "hub.formats._reading": "is_adapter lora_files names_in",
    "hub.formats._safetensors": "FLOATS INTEGERS file_metadata read_tensors require_finite",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES, "loraweave")
