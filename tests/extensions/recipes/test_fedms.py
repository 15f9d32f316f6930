"""A client's own expert beside the frozen one that all clients have trained."""

import pytest
import torch
from torch.nn import functional

import loraweave as lw
from loraweave.errors import LayerMismatch
from loraweave.extend.recipes import put_expert
from loraweave.extensions.recipes import with_options

LAYER = "model.layers.1.mlp.up_proj"
IDS_BT = torch.tensor([[3, 9, 27, 20, 41], [0, 0, 25, 3, 15]])
MASK_BT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
LABELS_BT = torch.tensor([[-100, -100, 27, 20, 41], [-100, -100, -100, 3, 15]])
PROMPTS = (slice(0, 2), slice(2, 3))


@pytest.mark.parametrize("per_site", [False, True])
def test_a_site_adds_its_formula(make_model, make_adapter, per_site, trained):
    model = make_model("llama", dtype=torch.float64)
    adapter = make_adapter(model, "global", rank=2, targets=("up_proj",))
    options = {"rank": 2, "alpha": 5.0, "target_modules": ("up_proj",), "per_site": per_site}
    with lw.experts("fedms", model, **options) as made:
        factors = put_expert(trained(made), 0, adapter).layers[LAYER.replace(".", "/")]
        seen = {}
        model.get_submodule(LAYER).register_forward_hook(lambda _, args, y: seen.update(x=args[0], y=y))
        made(input_ids=IDS_BT, attention_mask=MASK_BT, labels=LABELS_BT)
        weight, whole = model.get_submodule(LAYER).weight, adapter.layers[LAYER]
        delta_OI = whole.b_OR.double() @ whole.a_RI.double()
        for row, prompt in enumerate(PROMPTS):
            if per_site:
                scores_E = made.gates[LAYER.replace(".", "/")].r_EI @ seen["x"][row, prompt].mean(dim=0)
            else:
                embedded = model.get_input_embeddings().weight[IDS_BT[row, prompt]]
                scores_E = made.gates["all"].r_EH @ embedded.mean(dim=0)
            g = functional.softmax(scores_E, dim=0)[0]
            for x_I, y_O in zip(seen["x"][row], seen["y"][row], strict=True):
                local_O = 5.0 / 2 * factors.b_SO.T @ (factors.a_SI @ x_I)
                torch.testing.assert_close(y_O, weight @ x_I + g * (delta_OI @ x_I) + (1 - g) * local_O)


def test_a_gate_that_is_sure_of_the_global_expert_is_the_global_model(make_model, make_adapter, trained):
    model = make_model("llama", dtype=torch.float64)
    adapter = make_adapter(model, "global", rank=3)
    with lw.experts("fedms", model, rank=3, target_modules=("q_proj", "v_proj")) as made:
        put_expert(trained(made), 0, adapter)
        with torch.no_grad():
            # all embeddings' mean has a positive product with itself
            mean_H = model.get_input_embeddings().weight[IDS_BT[0]].mean(dim=0)
            made.gates["all"].r_EH.copy_(torch.stack([1e6 * mean_H, -1e6 * mean_H]))
        own = made(input_ids=IDS_BT[:1]).logits
    with lw.Composer(model, lw.ExpertPool([adapter])).activate({"global": 1.0}):
        torch.testing.assert_close(model(input_ids=IDS_BT[:1]).logits, own, rtol=1e-6, atol=1e-6)


def test_training_leaves_the_global_expert_the_same_bits(make_model, make_adapter):
    model = make_model("llama")
    adapter = make_adapter(model, "global", rank=8, targets=("q_proj",))
    with lw.experts("fedms", model, target_modules=("q_proj",)) as made:
        put_expert(made, 0, adapter)
        before = {name: value.clone() for name, value in made.expert_state().items()}
        optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
        made.train()(input_ids=IDS_BT, attention_mask=MASK_BT, labels=LABELS_BT).loss.backward()
        optimizer.step()
        for name, value in made.expert_state().items():
            assert torch.equal(value, before[name]) == ("frozen" in name)
        for name in adapter.layers:
            torch.testing.assert_close(made.expert(0).delta(name), adapter.delta(name))


def test_blocks_beyond_the_capability_have_the_global_expert_alone(make_model, trained):
    model = make_model("llama", num_hidden_layers=3)
    with lw.experts("fedms", model, rank=2, queue=(2, 0, 1), capability=1) as made:
        by_block = {made.sites[name].block: shape.ranks for name, shape in made.shapes.items()}
        assert by_block == {0: (2, 0), 1: (2, 0), 2: (2, 2)}
        assert {int(name.split(".")[2]) for name in trained(made).expert(1).layers} == {2}


def test_blocks_that_become_active_change_nothing_at_first(make_model, trained):
    first = trained(lw.experts("fedms", make_model("llama", dtype=torch.float64), capability=1))
    before, known = first(input_ids=IDS_BT).logits, first.expert(1)
    with with_options(first, capability=2) as made:
        torch.testing.assert_close(made(input_ids=IDS_BT).logits, before)
        assert {ranks[1] for ranks in (shape.ranks for shape in made.shapes.values())} == {8}
        grown = made.expert(1)
        assert all(torch.equal(grown.delta(name), known.delta(name)) for name in known.layers)
        assert not any(bool(grown.delta(name).any()) for name in set(grown.layers) - set(known.layers))


def test_a_client_is_saved_and_read_with_both_experts(make_model, make_adapter, tmp_path, trained):
    model = make_model("llama")
    with lw.experts("fedms", model, target_modules=("q_proj",), capability=1) as made:
        put_expert(trained(made), 0, make_adapter(model, "global", targets=("q_proj",)))
        own = made(input_ids=IDS_BT).logits
        made.save_pretrained(tmp_path / "client")
    with lw.experts(tmp_path / "client", model) as again:
        assert torch.equal(again(input_ids=IDS_BT).logits, own)


@pytest.fixture
def vision_model():
    from transformers import ViTConfig, ViTModel

    config = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ViTModel(ViTConfig(**config, image_size=8, patch_size=4), add_pooling_layer=False)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_one_gate_on_a_model_without_token_embeddings_is_refused(vision_model):
    with pytest.raises(LayerMismatch, match="recipe 'fedms' looks at embeddings of tokens, and this model has none"):
        lw.experts("fedms", vision_model, target_modules=("q_proj",))
    assert all(parameter.requires_grad for parameter in vision_model.parameters())


def test_gates_of_each_site_see_images(vision_model, trained):
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with lw.experts("fedms", vision_model, target_modules=("q_proj", "v_proj"), per_site=True) as made:
        together = trained(made)(pixel_values=images).last_hidden_state
        alone = made(pixel_values=images[1:2]).last_hidden_state
        torch.testing.assert_close(together[1], alone[0], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(together, vision_model(pixel_values=images).last_hidden_state, atol=1e-3)
