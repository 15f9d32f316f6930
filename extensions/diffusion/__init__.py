"""How do two styles, or several characters, get into one image? By mixtures in diffusers' pipelines, by prompt and step.

A mixture may differ by prompt and by step: `switch`, `composite` and `k_lora` make such mixtures. `zip_lora` learns one
adapter from two (ZipLoRA), `inputs_of` records what Mix-of-Show's fusion must know, and `regions` gives parts of an image
prompts of their own. It needs diffusers, and the last three some runs of the pipeline.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.diffusion.hooks.diffusers_pipeline import Composite
    from loraweave.extensions.diffusion.mix_of_show import inputs_of, regions
    from loraweave.extensions.diffusion.steps import composite, k_lora, switch
    from loraweave.extensions.diffusion.ziplora import zip_lora
else:
    _MODULES = {
        "hooks.diffusers_pipeline": "Composite",
        "mix_of_show": "inputs_of regions",
        "steps": "composite k_lora switch",
        "ziplora": "zip_lora",
    }
    __getattr__ = lazy(__name__, {f"{__name__}.{module}": names for module, names in _MODULES.items()})

__all__ = ["Composite", "composite", "inputs_of", "k_lora", "regions", "switch", "zip_lora"]
