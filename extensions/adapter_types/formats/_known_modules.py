"""Rules from the module names in LoRA files to the paths in the base model, for architectures where the two differ.

`#` stands for a number, the same on both sides and in the same order; `{a,b}` for either, on both sides at once.
"""

import itertools
import re
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


def _same(names: str, prefix: str) -> list[Rule]:
    return [Rule(name, (f"{prefix}.{name}",)) for name in expand(names)]


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
    rules = {
        "input_blocks.0.0": "conv_in",
        "out.2": "conv_out",
        "middle_block.0": "mid_block.resnets.0",
        "middle_block.1": "mid_block.attentions.0",
        "middle_block.2": "mid_block.resnets.1",
    }
    rules |= {f"time_embed.{2 * n}": f"time_embedding.linear_{n + 1}" for n in range(2)}
    rules |= {f"label_emb.0.{2 * n}": f"add_embedding.linear_{n + 1}" for n in range(2)}
    for level in range(4):
        for place in range(2):
            rules[f"input_blocks.{3 * level + place + 1}.0"] = f"down_blocks.{level}.resnets.{place}"
            rules[f"input_blocks.{3 * level + place + 1}.1"] = f"down_blocks.{level}.attentions.{place}"
        rules[f"input_blocks.{3 * level + 3}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for place in range(3):
            rules[f"output_blocks.{3 * level + place}.0"] = f"up_blocks.{level}.resnets.{place}"
            rules[f"output_blocks.{3 * level + place}.1"] = f"up_blocks.{level}.attentions.{place}"
        # after a level without attention the upsampler stands one place earlier
        for place in (1, 2):
            rules[f"output_blocks.{3 * level + 2}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    inner = {
        "resnets": {
            "in_layers.2": "conv1",
            "emb_layers.1": "time_emb_proj",
            "out_layers.3": "conv2",
            "skip_connection": "conv_shortcut",
        },
        "attentions": {name: name for name in _ATTENTION},
    }
    expanded = []
    for source, target in rules.items():
        parts = next((parts for kind, parts in inner.items() if f".{kind}." in target), {"": ""})
        for part, other in parts.items():
            expanded.append(Rule(f"{source}.{part}".rstrip("."), (f"unet.{target}.{other}".rstrip("."),)))
    return expanded


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


def _original_flux() -> list[Rule]:
    """Return the rules for FLUX.1's authors' names: q, k and v in one projection, in single blocks with the MLP."""
    double, single = "transformer.transformer_blocks.#", "transformer.single_transformer_blocks.#"
    one_to_one = {
        "double_blocks.#.img_attn.proj": f"{double}.attn.to_out.0",
        "double_blocks.#.txt_attn.proj": f"{double}.attn.to_add_out",
        "double_blocks.#.img_mlp.0": f"{double}.ff.net.0.proj",
        "double_blocks.#.img_mlp.2": f"{double}.ff.net.2",
        "double_blocks.#.txt_mlp.0": f"{double}.ff_context.net.0.proj",
        "double_blocks.#.txt_mlp.2": f"{double}.ff_context.net.2",
        "double_blocks.#.img_mod.lin": f"{double}.norm1.linear",
        "double_blocks.#.txt_mod.lin": f"{double}.norm1_context.linear",
        "single_blocks.#.linear2": f"{single}.proj_out",
        "single_blocks.#.modulation.lin": f"{single}.norm.linear",
        "img_in": "transformer.x_embedder",
        "txt_in": "transformer.context_embedder",
        "final_layer.linear": "transformer.proj_out",
    }
    for module, other in {"time": "timestep", "vector": "text", "guidance": "guidance"}.items():
        for place, name in enumerate(("in_layer", "out_layer"), 1):
            one_to_one[f"{module}_in.{name}"] = f"transformer.time_text_embed.{other}_embedder.linear_{place}"
    fused = {
        "double_blocks.#.img_attn.qkv": [f"{double}.attn.to_{part}" for part in "qkv"],
        "double_blocks.#.txt_attn.qkv": [f"{double}.attn.add_{part}_proj" for part in "qkv"],
    }
    mlp = [*(f"{single}.attn.to_{part}" for part in "qkv"), f"{single}.proj_mlp"]
    return [
        *(Rule(source, (target,)) for source, target in one_to_one.items()),
        *(Rule(source, tuple(targets), (1, 1, 1)) for source, targets in fused.items()),
        # the MLP of a block is four times as wide as its attention
        Rule("single_blocks.#.linear1", tuple(mlp), (1, 1, 1, 4)),
        FINAL_MODULATION,
    ]


ORIGINAL_FLUX = _original_flux()


def _original_sd3() -> list[Rule]:
    """Return the rules for Stable Diffusion 3's authors' names: x_block is a block's image, context_block its text."""
    block = "transformer.transformer_blocks.#"
    rules = [
        Rule("context_embedder", ("transformer.context_embedder",)),
        Rule("x_embedder.proj", ("transformer.pos_embed.proj",)),
        Rule("final_layer.linear", ("transformer.proj_out",)),
        FINAL_MODULATION,
        # the last block's text has only these two
        Rule("joint_blocks.#.context_block.adaLN_modulation.1", (f"{block}.norm1_context.linear",), turned=True),
        Rule("joint_blocks.#.context_block.attn.qkv", tuple(f"{block}.attn.add_{part}_proj" for part in "qkv"), (1, 1, 1)),
        Rule("joint_blocks.#.context_block.attn.proj", (f"{block}.attn.to_add_out",)),
        Rule("joint_blocks.#.x_block.adaLN_modulation.1", (f"{block}.norm1.linear",)),
    ]
    for attention in ("attn", "attn2"):
        source = f"joint_blocks.#.x_block.{attention}"
        rules.append(Rule(f"{source}.qkv", tuple(f"{block}.{attention}.to_{part}" for part in "qkv"), (1, 1, 1)))
        rules.append(Rule(f"{source}.proj", (f"{block}.{attention}.to_out.0",)))
    for module, other in {"x_block": "ff", "context_block": "ff_context"}.items():
        rules.append(Rule(f"joint_blocks.#.{module}.mlp.fc1", (f"{block}.{other}.net.0.proj",)))
        rules.append(Rule(f"joint_blocks.#.{module}.mlp.fc2", (f"{block}.{other}.net.2",)))
    for module, other in {"t": "timestep", "y": "text"}.items():
        for place in (1, 2):
            target = f"transformer.time_text_embed.{other}_embedder.linear_{place}"
            rules.append(Rule(f"{module}_embedder.mlp.{2 * place - 2}", (target,)))
    return rules


ORIGINAL_SD3 = _original_sd3()

_CLIP = (
    "text_model.encoder.layers.#.self_attn.{q_proj,k_proj,v_proj,out_proj} text_model.encoder.layers.#.mlp.{fc1,fc2} "
    "text_projection"
)


def text_encoder(component: str) -> list[Rule]:
    """Return the rules for a CLIP text encoder that is the pipeline's part of this name."""
    return _same(_CLIP, component)
