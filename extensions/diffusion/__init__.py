"""How do two styles, or several characters, get into one image? For diffusers' pipelines, which `lw.Composer` takes itself.

`zip_lora` learns one adapter from two (ZipLoRA), `inputs_of` records what Mix-of-Show's fusion must know, and `regions`
gives parts of an image prompts of their own. It needs diffusers, and for each of these some runs of the pipeline.
"""

from typing import TYPE_CHECKING

from loraweave.extend import lazy

if TYPE_CHECKING:
    from loraweave.extensions.diffusion.mix_of_show import inputs_of, regions
    from loraweave.extensions.diffusion.ziplora import zip_lora
else:
    __getattr__ = lazy(__name__, {f"{__name__}.mix_of_show": "inputs_of regions", f"{__name__}.ziplora": "zip_lora"})

__all__ = ["inputs_of", "regions", "zip_lora"]
