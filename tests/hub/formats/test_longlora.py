"""A LoRA with a file of norms and embeddings that were trained beside it."""

import copy

import pytest
import torch
from peft_models import Tree, lora, put
from torch import nn

from loraweave.errors import AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.conversion import extract


# LongLoRA (github.com/dvlab-research/LongLoRA) and SinkLoRA after their get_trainable_weights.py
def test_norms_and_embeddings_that_were_trained_beside_a_lora_are_refused_with_the_way_out(tmp_path):
    put(tmp_path, lora())
    alone = Adapter.from_pretrained(tmp_path)
    torch.save({"model.norm.weight": torch.ones(5)}, tmp_path / "trainable_params.bin")
    for consent in (False, True):
        with pytest.raises(
            AdapterUnsupported, match=r"trainable_params.bin .*LongLoRA.*extract\(base, merged, others='heads'\)"
        ):
            Adapter.from_pretrained(tmp_path, allow_pickle=consent)
    (tmp_path / "trainable_params.bin").unlink()
    assert Adapter.from_pretrained(tmp_path).hash == alone.hash


def test_longlora_merged_as_its_authors_merge_it_is_its_lora_and_the_rest_as_heads():
    torch.manual_seed(0)
    base = Tree({"embed_tokens": nn.Embedding(9, 6), "q_proj": nn.Linear(6, 10, bias=False), "norm": nn.LayerNorm(6)})
    merged, a, b = copy.deepcopy(base), torch.randn(2, 6), torch.randn(10, 2)
    with torch.no_grad():
        merged.embed_tokens.weight += 0.1 * torch.randn(9, 6)
        merged.norm.weight += 0.1
        # alpha 16, rank 8 in the released script
        merged.q_proj.weight += 16 / 8 * b @ a
    found = extract(base, merged, others="heads")
    assert found.layers["q_proj"].rank == 2
    torch.testing.assert_close(found.delta("q_proj"), 2 * b @ a, rtol=1e-4, atol=1e-4)
    assert set(found.heads) == {"embed_tokens.weight", "norm.weight"}
    assert torch.equal(found.heads["norm.weight"], merged.norm.weight)
