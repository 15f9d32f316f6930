"""Experts around the non-linearity, against whole copies of the block with their updates merged in."""

import copy

import pytest
import torch
from rounding import rounding

import loraweave as lw
from loraweave.errors import LayerMismatch, ScopeError, UnknownName

IDS = torch.tensor([[3, 9, 27, 20, 60], [5, 25, 3, 15, 44]])
BLOCKS = {"llama": "mlp", "gpt2": "mlp", "t5": "DenseReluDense"}
SIZES = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def phi():
    from transformers import PhiConfig, PhiForCausalLM

    return PhiForCausalLM(PhiConfig(**SIZES)), "mlp", {"input_ids": IDS}


def phi3():
    from transformers import Phi3Config, Phi3ForCausalLM

    settings = {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return Phi3ForCausalLM(Phi3Config(**settings)), "mlp", {"input_ids": IDS}


def gated_t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 61, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config), "DenseReluDense", {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}


def inputs(kind):
    return {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]} if kind == "t5" else {"input_ids": IDS}


class Copies(torch.nn.Module):
    """Every expert as a copy of the block, run on every token, weighed after it."""

    def __init__(self, block, experts, gate, top_k):
        super().__init__()
        self.block, self.experts, self.gate, self.top_k = block, experts, gate, top_k

    def forward(self, x_BTI):
        p_BTE = (x_BTI @ self.gate.r_EI.T).softmax(dim=-1)
        best = p_BTE.topk(self.top_k, dim=-1)
        w_BTE = torch.zeros_like(p_BTE).scatter(-1, best.indices, best.values / best.values.sum(dim=-1, keepdim=True))
        made = [torch.func.functional_call(self.block, self.merged(e), (x_BTI,)) for e in range(w_BTE.shape[-1])]
        return sum(w_BTE[..., e, None] * each for e, each in enumerate(made))

    def merged(self, expert):
        weights, rank = {}, self.experts.shape.ranks[0]
        for name, factors in self.experts.parts.items():
            rows = slice(rank * expert, rank * expert + rank)
            update_OI = self.experts.scale * factors.b_SO[rows].T @ factors.a_SI[rows]
            layer = self.block.get_submodule(name)
            transposed = type(layer).__name__ == "Conv1D"
            weights[f"{name}.weight"] = layer.weight + (update_OI.T if transposed else update_OI)
        return weights


@pytest.fixture
def make_pair(make_model):
    """(the expert model, the same as copies): both in fp64, with values that matter."""

    def make(kind, *, top_k, block=None, **options):
        base = make_model(kind, dtype=torch.float64) if isinstance(kind, str) else kind.eval().double()
        twin = copy.deepcopy(base)
        made = lw.experts(
            "mixlora",
            base,
            num_experts=3,
            top_k=top_k,
            rank=2,
            alpha=3.0,
            target_modules=(block or BLOCKS[kind],),
            **options,
        )
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in made.expert_parameters().values():
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        twin.requires_grad_(False)
        for name in made.sites:
            key = name.replace(".", "/")
            block = twin.get_submodule(name)
            twin.set_submodule(name, Copies(block, made.layers[key], made.gates[key], top_k))
        return made, twin

    return make


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_it_is_a_weighted_sum_of_copies_in_value_and_gradient(make_pair, kind, top_k):
    made, twin = make_pair(kind, top_k=top_k)
    own, expected = made(**inputs(kind)).logits, twin(**inputs(kind)).logits
    torch.testing.assert_close(own, expected)
    learned = list(made.expert_parameters().values())
    gradients = [torch.autograd.grad(logits.logsumexp(dim=-1).sum(), learned) for logits in (own, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", [phi, phi3, gated_t5])
def test_so_it_is_in_blocks_of_other_names(make_pair, kind):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, block, given = kind()
    made, twin = make_pair(model, top_k=2, block=block)
    torch.testing.assert_close(made(**given).logits, twin(**given).logits)


def test_dropout_of_the_block_drops_the_same_of_all_experts(make_pair):
    made, twin = make_pair("t5", top_k=2)

    class HalfOfThem(torch.nn.Module):
        def forward(self, h):
            return h * (torch.arange(h.shape[-1]) % 2) * 2

    blocks = [each for model in (made.base_model, twin) for each in model.modules() if "Dense" in type(each).__name__]
    for block in blocks:
        block.dropout = HalfOfThem()
    assert len(blocks) == 8
    assert all(block.dropout.training for block in blocks)
    torch.testing.assert_close(made(**inputs("t5")).logits, twin(**inputs("t5")).logits)


def test_the_frozen_layers_run_once_for_all_experts(make_pair):
    made, _ = make_pair("llama", top_k=3)
    calls = []
    for layer in (part.name for site in made.sites.values() for part in site.parts):
        made.base_model.get_submodule(layer).register_forward_hook(lambda *_, layer=layer: calls.append(layer))
    made(input_ids=IDS)
    assert len(calls) == len(set(calls)) == 6


def test_a_token_meets_its_own_experts_alone(make_pair):
    made, _ = make_pair("llama", top_k=1)
    key = "model/layers/0/mlp"
    rows = []
    made.layers[key].layout = _Counting(made.layers[key].layout, rows)
    made(input_ids=IDS)
    assert sum(rows) == IDS.numel()


class _Counting:
    dropout = None

    def __init__(self, layout, rows):
        self.layout, self.rows = layout, rows

    def between(self, block, made):
        self.rows.append(len(made[0]))
        return self.layout.between(block, made)


def test_on_a_base_in_half_precision_it_is_near_the_sum(make_pair):
    made, twin = make_pair("llama", top_k=3)
    expected = twin(input_ids=IDS).logits.detach()
    made.base_model.to(torch.bfloat16)
    own = made(input_ids=IDS).logits
    assert own.dtype == torch.bfloat16
    # ten operations after one another in each of two layers, and the head, round to bfloat16
    off = rounding(10 * 2 + 1, expected.abs().max(), torch.bfloat16)
    assert bool(((own.double() - expected).abs() <= off).all())


def test_no_expert_and_no_mixture_is_an_adapter(make_pair):
    made, _ = make_pair("llama", top_k=2)
    for export in (lambda: made.expert(0), made.adapter):
        with pytest.raises(ScopeError, match="is not an update of layers: save_pretrained"):
            export()


def test_a_place_that_is_no_such_block_is_named(make_model):
    with pytest.raises(LayerMismatch, match=r"'model.layers.0.self_attn' \(LlamaAttention\) gets no experts"):
        lw.experts("mixlora", make_model("llama"), target_modules=("self_attn",))


def test_a_block_that_does_more_than_its_layers_is_named(make_model):
    model = make_model("llama")

    class Doubled(type(model.model.layers[1].mlp)):
        def forward(self, x):
            return 2 * super().forward(x)

    model.model.layers[1].mlp.__class__ = Doubled
    with pytest.raises(LayerMismatch, match=r"'model.layers.1.mlp' \(Doubled\) .* its forward is more than its layers"):
        lw.experts("mixlora", model)


def test_a_target_that_matches_nothing_says_which_blocks_there_are(make_model):
    with pytest.raises(UnknownName, match=r"no layer matches 'mlp' .* end in DenseReluDense"):
        lw.experts("mixlora", make_model("t5"))
