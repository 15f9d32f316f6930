"""Rules from the module names in LoRA files to the paths in the base model, for architectures where the two differ.

`#` stands for a number, the same on both sides and in the same order; `{a,b}` for either, on both sides at once.
"""

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """A module's name in a file, and its paths in the base, which divide B's rows in the proportions `shares`, in order.

    With `turned`, the file has (shift, scale) as outputs, and the base (scale, shift), if these are twice the inputs.
    """

    source: str
    targets: tuple[str, ...]
    shares: tuple[int, ...] = (1,)
    turned: bool = False


def expand(names: str) -> list[str]:
    """Return every name that names with braces, separated by spaces, stand for: `a.{b,c}` gives `a.b` and `a.c`."""
    expanded: list[str] = []
    for name in names.split():
        pieces = re.split(r"\{([^{}]*)\}", name)
        choices = [piece.split(",") if place % 2 else [piece] for place, piece in enumerate(pieces)]
        expanded += ["".join(choice) for choice in itertools.product(*choices)]
    return expanded


def _renamed(names: Mapping[str, str], prefix: str) -> list[Rule]:
    """Return the rules from each name in a file to its path below `prefix`; both stand for as many, in one order."""
    pairs = (pair for both in names.items() for pair in zip(*map(expand, both), strict=True))
    return [Rule(source, (f"{prefix}.{target}",)) for source, target in pairs]


def _same(names: str, prefix: str) -> list[Rule]:
    return _renamed({names: names}, prefix)


def _fused(source: str, targets: str, shares: tuple[int, ...] = (1, 1, 1)) -> Rule:
    return Rule(source, tuple(f"transformer.{target}" for target in expand(targets)), shares)


_TRANSFORMER = "transformer_blocks.#.{attn1,attn2}.{to_q,to_k,to_v,to_out.0} transformer_blocks.#.ff.net.{0.proj,2}"
_ATTENTION = ["proj_in", "proj_out", *expand(_TRANSFORMER)]
_BLOCKS = "{down_blocks.#,up_blocks.#,mid_block}"

# Stable Diffusion 1, 2 and XL as diffusers names them
UNET = [
    *_same("conv_in conv_out {time,add}_embedding.linear_{1,2}", "unet"),
    *_same(f"{_BLOCKS}.resnets.#.{{conv1,conv2,conv_shortcut,time_emb_proj}}", "unet"),
    *_same(" ".join(f"{_BLOCKS}.attentions.#.{name}" for name in _ATTENTION), "unet"),
    *_same("down_blocks.#.downsamplers.0.conv up_blocks.#.upsamplers.0.conv", "unet"),
]


def _original_unet() -> list[Rule]:
    """Return the rules for the U-Net authors' names: blocks in one sequence, two a level going down, three going up."""
    layers = {
        "{input_blocks.0.0,out.2}": "{conv_in,conv_out}",
        "{time_embed,label_emb.0}.{0,2}": "{time,add}_embedding.linear_{1,2}",
    }
    resnets = {"middle_block.{0,2}": "mid_block.resnets.{0,1}"}
    attentions = {"middle_block.1": "mid_block.attentions.0"}
    for level in range(4):
        layers[f"input_blocks.{3 * level + 3}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        # after a level without attention the upsampler stands one place earlier
        for place in (1, 2):
            layers[f"output_blocks.{3 * level + 2}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
        down = {f"input_blocks.{3 * level + place + 1}": (f"down_blocks.{level}", place) for place in range(2)}
        up = {f"output_blocks.{3 * level + place}": (f"up_blocks.{level}", place) for place in range(3)}
        for source, (target, place) in (down | up).items():
            resnets[f"{source}.0"] = f"{target}.resnets.{place}"
            attentions[f"{source}.1"] = f"{target}.attentions.{place}"
    inner = "{in_layers.2,emb_layers.1,out_layers.3,skip_connection}", "{conv1,time_emb_proj,conv2,conv_shortcut}"
    layers |= {f"{source}.{inner[0]}": f"{target}.{inner[1]}" for source, target in resnets.items()}
    layers |= {f"{source}.{name}": f"{target}.{name}" for source, target in attentions.items() for name in _ATTENTION}
    return _renamed(layers, "unet")


ORIGINAL_UNET = _original_unet()

# FLUX.1 as diffusers names it
FLUX = _same(
    "transformer_blocks.#.attn.{to_q,to_k,to_v,to_out.0,add_q_proj,add_k_proj,add_v_proj,to_add_out} "
    "transformer_blocks.#.{ff,ff_context}.net.{0.proj,2} transformer_blocks.#.{norm1,norm1_context}.linear "
    "single_transformer_blocks.#.attn.{to_q,to_k,to_v} single_transformer_blocks.#.{proj_mlp,proj_out,norm.linear} "
    "x_embedder context_embedder proj_out norm_out.linear time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}",
    "transformer",
)


FINAL_MODULATION = Rule("final_layer.adaLN_modulation.1", ("transformer.norm_out.linear",), turned=True)
_QKV = "transformer_blocks.#.attn.to_{q,k,v}"

# FLUX.1 as its authors name it: q, k and v in one projection, in single blocks with the MLP, four times as wide
ORIGINAL_FLUX = [
    *_renamed(
        {
            "double_blocks.#.{img,txt}_attn.proj": "transformer_blocks.#.attn.{to_out.0,to_add_out}",
            "double_blocks.#.{img,txt}_mlp.{0,2}": "transformer_blocks.#.{ff,ff_context}.net.{0.proj,2}",
            "double_blocks.#.{img,txt}_mod.lin": "transformer_blocks.#.{norm1,norm1_context}.linear",
            "single_blocks.#.{linear2,modulation.lin}": "single_transformer_blocks.#.{proj_out,norm.linear}",
            "{img_in,txt_in,final_layer.linear}": "{x_embedder,context_embedder,proj_out}",
            "{time,vector,guidance}_in.{in,out}_layer": "time_text_embed.{timestep,text,guidance}_embedder.linear_{1,2}",
        },
        "transformer",
    ),
    _fused("double_blocks.#.img_attn.qkv", _QKV),
    _fused("double_blocks.#.txt_attn.qkv", "transformer_blocks.#.attn.add_{q,k,v}_proj"),
    _fused("single_blocks.#.linear1", f"single_{_QKV} single_transformer_blocks.#.proj_mlp", (1, 1, 1, 4)),
    FINAL_MODULATION,
]

# Stable Diffusion 3 as its authors name it: x_block is a block's image, context_block its text
_TEXT = "joint_blocks.#.context_block"
ORIGINAL_SD3 = [
    *_renamed(
        {
            "{context_embedder,x_embedder.proj,final_layer.linear}": "{context_embedder,pos_embed.proj,proj_out}",
            f"{_TEXT}.attn.proj": "transformer_blocks.#.attn.to_add_out",
            "joint_blocks.#.x_block.{attn,attn2}.proj": "transformer_blocks.#.{attn,attn2}.to_out.0",
            "joint_blocks.#.x_block.adaLN_modulation.1": "transformer_blocks.#.norm1.linear",
            "joint_blocks.#.{x,context}_block.mlp.{fc1,fc2}": "transformer_blocks.#.{ff,ff_context}.net.{0.proj,2}",
            "{t,y}_embedder.mlp.{0,2}": "time_text_embed.{timestep,text}_embedder.linear_{1,2}",
        },
        "transformer",
    ),
    FINAL_MODULATION,
    # the last block's text has only these two
    Rule(f"{_TEXT}.adaLN_modulation.1", ("transformer.transformer_blocks.#.norm1_context.linear",), turned=True),
    _fused(f"{_TEXT}.attn.qkv", "transformer_blocks.#.attn.add_{q,k,v}_proj"),
    _fused("joint_blocks.#.x_block.attn.qkv", _QKV),
    _fused("joint_blocks.#.x_block.attn2.qkv", "transformer_blocks.#.attn2.to_{q,k,v}"),
]

_CLIP = (
    "text_model.encoder.layers.#.self_attn.{q_proj,k_proj,v_proj,out_proj} text_model.encoder.layers.#.mlp.{fc1,fc2} "
    "text_projection"
)


def text_encoder(component: str) -> list[Rule]:
    """Return the rules for a CLIP text encoder that is the pipeline's part of this name."""
    return _same(_CLIP, component)
