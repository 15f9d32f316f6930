"""How do two styles, or several characters, get into one image? By mixtures in diffusers' pipelines, by prompt and step.

A mixture may differ by prompt and by step: `switch`, `composite` and `k_lora` make such mixtures. `zip_lora` learns one
adapter from two (ZipLoRA), `inputs_of` records what Mix-of-Show's fusion must know, and `regions` gives parts of an image
prompts of their own. It needs diffusers, and the last three some runs of the pipeline.
"""

from loraweave.extend import face

_MODULES = {
    "hooks.diffusers_pipeline": "Composite",
    "mix_of_show": "inputs_of regions",
    "steps": "composite k_lora switch",
    "ziplora": "zip_lora",
}
__getattr__, __dir__, __all__ = face(__name__, _MODULES)
