"""Files of Sam_LoRA against its forward written out, on transformers' Segment Anything model."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import loraweave as lw
from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch

WIDTH, BLOCKS, RANK = 12, 2, 3


def sam():
    from transformers import SamConfig, SamModel

    torch.manual_seed(0)
    vision = {
        "hidden_size": WIDTH,
        "output_channels": 8,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "mlp_dim": 20,
    }
    vision |= {"image_size": 16, "patch_size": 4, "window_size": 2, "global_attn_indexes": [1], "initializer_range": 0.2}
    prompts = {"hidden_size": 8, "image_size": 16, "patch_size": 4, "mask_input_channels": 4}
    masks = {"hidden_size": 8, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 8}
    model = SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=masks)).eval()
    model.name_or_path = "tiny-sam"
    return model


def held(blocks=BLOCKS, width=WIDTH):
    generator = torch.Generator().manual_seed(1)
    pairs = range(2 * blocks)
    found = {f"w_a_{n:03d}": torch.randn(RANK, width, generator=generator) for n in pairs}
    return found | {f"w_b_{n:03d}": 0.2 * torch.randn(width, RANK, generator=generator) for n in pairs}


class AsTrained(nn.Module):
    """A fused projection whose first third gets the queries' update and whose last third the values'."""

    def __init__(self, qkv, tensors, block):
        super().__init__()
        self.qkv = qkv
        self.pairs = [(tensors[f"w_a_{n:03d}"], tensors[f"w_b_{n:03d}"]) for n in (2 * block, 2 * block + 1)]

    def forward(self, x):
        out = self.qkv(x).clone()
        (a_q, b_q), (a_v, b_v) = self.pairs
        out[..., :WIDTH] += x @ a_q.T @ b_q.T
        out[..., -WIDTH:] += x @ a_v.T @ b_v.T
        return out


@torch.no_grad()
def test_the_model_sees_images_as_it_was_trained_to_and_each_row_by_its_own_mixture(tmp_path):
    tensors, images = held(), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    save_file(tensors, tmp_path / "lora_rank3.safetensors")
    trained = sam()
    for block, layer in enumerate(trained.vision_encoder.layers):
        layer.attn.qkv = AsTrained(layer.attn.qkv, tensors, block)
    expected = trained.get_image_embeddings(images)
    model = sam()
    base = model.get_image_embeddings(images)
    adapter = lw.Adapter.from_pretrained(tmp_path, model=model)
    engine = lw.Composer(model, {"rings": adapter})
    with engine.activate({"rings": 1.0}):
        torch.testing.assert_close(model.get_image_embeddings(images), expected, rtol=0, atol=1e-5)
    with engine.activate([None, {"rings": 1.0}]):
        rows = model.get_image_embeddings(images)
    torch.testing.assert_close(rows, torch.stack([base[0], expected[1]]), rtol=0, atol=1e-5)
    with engine.fused({"rings": 1.0}):
        torch.testing.assert_close(model.get_image_embeddings(images), expected, rtol=0, atol=1e-5)
    assert torch.equal(model.get_image_embeddings(images), base)
    assert (expected - base).abs().max() > 0.05


REFUSED = {
    "another number of blocks": (held(blocks=3), AdapterUnsupported, "3 blocks, and the model has 2"),
    "another width": (held(width=7), LayerMismatch, r"\(21, 7\)"),
    "values of a block missing": ({k: v for k, v in held().items() if "003" not in k}, AdapterCorrupt, "3 pairs"),
    "one half of a pair": ({k: v for k, v in held().items() if k != "w_b_003"}, AdapterCorrupt, "block 1 has the shapes"),
    "a head beside": ({**held(), "fc_8in_4out": torch.ones(4, 8)}, AdapterUnsupported, "fc_8in_4out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_file_that_does_not_say_which_layers_it_means_is_refused(tmp_path, case):
    tensors, error, message = REFUSED[case]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(error, match=message):
        lw.Adapter.from_pretrained(tmp_path, model=sam())


def test_without_its_model_a_file_is_refused(tmp_path):
    save_file(held(), tmp_path / "lora.safetensors")
    with pytest.raises(AdapterUnsupported, match=r"name no layer; give the Segment Anything model"):
        lw.Adapter.from_pretrained(tmp_path)
