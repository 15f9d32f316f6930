from loraweave.extensions.diffusion.hooks.diffusers_pipeline import Composite as Composite
from loraweave.extensions.diffusion.mix_of_show import inputs_of as inputs_of
from loraweave.extensions.diffusion.mix_of_show import regions as regions
from loraweave.extensions.diffusion.steps import composite as composite
from loraweave.extensions.diffusion.steps import k_lora as k_lora
from loraweave.extensions.diffusion.steps import switch as switch
from loraweave.extensions.diffusion.ziplora import zip_lora as zip_lora
