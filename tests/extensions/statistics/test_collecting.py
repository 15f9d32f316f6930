"""What is recorded of an adapter's layers: against one text at a time, without padding, through the dense model."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from loraweave.composer.merge.merge import merge
from loraweave.errors import AdapterCorrupt, AdapterNotFound, CompositionError, InvalidTask, LayerMismatch
from loraweave.extensions.statistics import LayerStatistics, Statistics, collecting
from loraweave.hub.adapter import Adapter
from loraweave.types import Factors

TEXTS = ["a dog", "two birds sing", "x", "Once upon a time", "a dog"]


def collect(model, tokenizer, adapter, texts=TEXTS, **options):
    return collecting.collect_statistics(model, tokenizer, adapter, texts, **{"progress": False, **options})


@pytest.fixture
def fixed_draws(monkeypatch):
    """Labels that do not depend on the model: the ids 3, 4, 5, ... by position, so that a reference knows them."""

    def gradient(logits, mask_BT, draws):
        found = torch.zeros_like(logits)
        for row, mask in enumerate(mask_BT):
            for place in range(int(mask.sum())):
                found[row, place] = -torch.softmax(logits[row, place].float(), dim=0)
                found[row, place, 3 + place] += 1.0
        return found

    monkeypatch.setattr(collecting, "_drawn_gradient", gradient)


def reference(model, tokenizer, adapter, texts):
    """{layer: (gram, fisher, tokens)} with W + b a written into the weights, one unpadded text at a time, by autograd."""
    layers = {name: model.get_submodule(name) for name in adapter.layers}
    kept = {name: module.weight.detach().clone() for name, module in layers.items()}
    seen = {name: [] for name in layers}
    with torch.no_grad():
        for name, module in layers.items():
            delta = adapter.delta(name)
            module.weight += delta.T if type(module).__name__ == "Conv1D" else delta
    handles = [
        m.register_forward_pre_hook(lambda m, args, name=n: seen[name].append(args[0].detach())) for n, m in layers.items()
    ]
    squares = {name: torch.zeros_like(module.weight) for name, module in layers.items()}
    for text in texts:
        model.zero_grad()
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        log_p = model(input_ids=ids).logits.log_softmax(dim=-1)
        sum(log_p[0, place, 3 + place] for place in range(ids.shape[1])).backward()
        for name, module in layers.items():
            squares[name] += module.weight.grad.detach() ** 2
    for handle in handles:
        handle.remove()
    result = {}
    with torch.no_grad():
        for name, module in layers.items():
            x = torch.cat([x.flatten(0, 1) for x in seen[name]]).double()
            fisher = squares[name] / len(texts)
            result[name] = (x.T @ x / len(x), fisher.T if type(module).__name__ == "Conv1D" else fisher, len(x))
            module.weight.copy_(kept[name])
    model.zero_grad()
    return result


@pytest.mark.parametrize(
    ("kind", "targets"), [("llama", ("q_proj", "down_proj", "lm_head")), ("gpt2", ("c_attn", "c_proj"))]
)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_gram_and_fisher_are_those_of_the_dense_model_text_by_text(
    make_model, make_adapter, tokenizer, fixed_draws, kind, targets, batch_size
):
    model = make_model(kind)
    adapter = make_adapter(model, "a", rank=2, targets=targets)
    found = collect(model, tokenizer, adapter, batch_size=batch_size)
    expected = reference(model, tokenizer, adapter, TEXTS)
    assert found.adapter_hash == adapter.hash
    assert found.layers.keys() == expected.keys()
    for name, (gram, fisher, tokens) in expected.items():
        seen = found.layers[name]
        assert seen.num_tokens == tokens == sum(map(len, TEXTS))
        assert torch.allclose(seen.gram_II.double(), gram, rtol=1e-4, atol=1e-5 * float(gram.abs().max()))
        assert torch.allclose(seen.fisher_OI, fisher, rtol=1e-3, atol=1e-5 * float(fisher.max()))
    whole = torch.cat([seen.fisher_OI.flatten() for seen in found.layers.values()]).norm()
    assert all(seen.fisher_norm == pytest.approx(float(whole), rel=1e-5) for seen in found.layers.values())


def test_a_layer_that_runs_several_times_has_the_gradient_of_all_its_calls(make_model, make_adapter, tokenizer, fixed_draws):
    model = make_model("llama")
    model.model.layers[1].mlp.down_proj = model.model.layers[0].mlp.down_proj
    adapter = make_adapter(model, "a", targets=("down_proj",))
    assert list(adapter.layers) == ["model.layers.0.mlp.down_proj"]
    found = collect(model, tokenizer, adapter, batch_size=2).layers["model.layers.0.mlp.down_proj"]
    gram, fisher, tokens = reference(model, tokenizer, adapter, TEXTS)["model.layers.0.mlp.down_proj"]
    assert found.num_tokens == tokens == 2 * sum(map(len, TEXTS))
    assert torch.allclose(found.gram_II.double(), gram, rtol=1e-4, atol=1e-4)
    assert torch.allclose(found.fisher_OI, fisher, rtol=1e-3, atol=1e-5 * float(fisher.max()))


def test_labels_are_drawn_with_the_model_s_own_probabilities():
    logits = torch.log(torch.tensor([0.1, 0.0, 0.6, 0.3])).expand(1, 4000, 4)
    gradient = collecting._drawn_gradient(logits, torch.ones(1, 4000, dtype=torch.bool), [np.random.Philox(key=5)])
    drawn = (gradient + logits.softmax(dim=-1))[0]
    assert torch.allclose(drawn.sum(dim=1), torch.ones(4000))
    assert torch.allclose(drawn.mean(dim=0), torch.tensor([0.1, 0.0, 0.6, 0.3]), atol=0.03)
    assert float(drawn[:, 1].abs().max()) < 1e-6


def test_a_classifier_draws_one_class_for_each_text():
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    draws = [np.random.Philox(key=key) for key in range(3)]
    gradient = collecting._drawn_gradient(logits, torch.ones(3, 7, dtype=torch.bool), draws)
    drawn = gradient + logits.softmax(dim=-1)
    assert torch.allclose(drawn.sum(dim=1), torch.ones(3))
    assert torch.allclose(drawn.max(dim=1).values, torch.ones(3), atol=1e-6)


def test_padding_takes_no_part_in_log_p():
    mask_BT = torch.tensor([[True, True, False], [True, False, False]])
    gradient = collecting._drawn_gradient(torch.randn(2, 3, 5), mask_BT, [np.random.Philox(key=key) for key in range(2)])
    assert torch.equal(gradient.abs().sum(dim=-1) > 0, mask_BT)


def test_the_draw_depends_on_the_seed_and_not_on_order_batch_or_global_state(make_model, make_adapter, tokenizer):
    model = make_model("llama")
    adapter = make_adapter(model, "a")
    first = collect(model, tokenizer, adapter, seed=3, batch_size=4)
    torch.manual_seed(77)
    state = torch.get_rng_state()
    same = collect(model, tokenizer, adapter, TEXTS[::-1], seed=3, batch_size=1)
    assert torch.equal(torch.get_rng_state(), state)
    other = collect(model, tokenizer, adapter, seed=4)
    for name, seen in first.layers.items():
        assert torch.allclose(seen.fisher_OI, same.layers[name].fisher_OI, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(seen.fisher_OI, other.layers[name].fisher_OI, rtol=1e-2)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bert"])
def test_the_model_is_left_as_it_was(make_model, make_adapters, tokenizer, kind):
    model = make_model(kind)
    model.train()
    next(model.children()).eval()
    next(iter(model.parameters())).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [(p.requires_grad, p.grad) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    texts = [("a dog", "two"), ("cats", "x y")] if kind == "t5" else TEXTS
    found = collect(model, tokenizer, make_adapters(model, kind)[2], texts)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(not module._forward_hooks for module in model.modules())
    assert all(float(seen.fisher_OI.max()) > 0 for seen in found.layers.values())


def test_an_error_on_the_way_leaves_the_model_as_it_was(make_model, make_adapter, tokenizer, monkeypatch):
    model = make_model("llama")
    model.train()
    adapter = make_adapter(model, "a")
    monkeypatch.setattr(collecting, "_run", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        collect(model, tokenizer, adapter)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(not module._forward_hooks for module in model.modules())


def test_grams_alone_need_no_backward_and_equal_those_of_both(make_model, make_adapter, tokenizer):
    model = make_model("llama")
    adapter = make_adapter(model, "a")
    both, alone = collect(model, tokenizer, adapter), collect(model, tokenizer, adapter, what="gram")
    for name, seen in alone.layers.items():
        assert seen.fisher_OI is None
        assert torch.allclose(seen.gram_II, both.layers[name].gram_II, rtol=1e-5)
    assert next(iter(collect(model, tokenizer, adapter, what=("fisher",)).layers.values())).gram_II is None


def test_only_the_first_tokens_of_a_text_count(make_model, make_adapter, tokenizer):
    model = make_model("llama")
    adapter = make_adapter(model, "a")
    cut = collect(model, tokenizer, adapter, ["two birds sing"], max_tokens=3, what="gram")
    whole = collect(model, tokenizer, adapter, ["two"], what="gram")
    for name, seen in cut.layers.items():
        assert seen.num_tokens == 3
        assert torch.equal(seen.gram_II, whole.layers[name].gram_II)


def test_layers_that_the_adapter_leaves_alone_are_recorded_on_request(make_model, make_adapter, tokenizer):
    model = make_model("llama")
    adapter = make_adapter(model, "a", targets=("q_proj",))
    extra = "model.layers.0.self_attn.o_proj"
    found = collect(model, tokenizer, adapter, layers=[extra], what="gram")
    assert found.layers.keys() == {*adapter.layers, extra}


def test_a_head_counts_while_recording_and_is_taken_out_again(make_model, make_adapter, tokenizer):
    model = make_model("llama", tie_word_embeddings=False)
    adapter = make_adapter(model, "a")
    head = torch.randn(61, 16, generator=torch.Generator().manual_seed(4))
    headed = Adapter("a", "tiny", adapter.layers, heads={"lm_head.weight": head})
    before = model.lm_head.weight.detach().clone()
    found = collect(model, tokenizer, headed)
    assert torch.equal(model.lm_head.weight, before)
    with torch.no_grad():
        model.lm_head.weight.copy_(head)
    expected = collect(model, tokenizer, adapter)
    for name, seen in found.layers.items():
        assert torch.equal(seen.fisher_OI, expected.layers[name].fisher_OI)


def test_a_head_of_a_tied_embedding_is_refused_and_nothing_written(make_model, make_adapter, tokenizer):
    model = make_model("llama", tie_word_embeddings=True)
    head = {"model.embed_tokens.weight": torch.ones(61, 16)}
    headed = Adapter("a", "tiny", make_adapter(model, "a").layers, heads=head)
    before = model.lm_head.weight.detach().clone()
    with pytest.raises(CompositionError, match=r"'a' into 'model.embed_tokens.weight'.*'lm_head.weight'"):
        collect(model, tokenizer, headed)
    assert torch.equal(model.lm_head.weight, before)


def test_bf16_models_are_recorded_in_fp32(make_model, make_adapter, tokenizer):
    model = make_model("llama", dtype=torch.bfloat16)
    adapter = make_adapter(model, "a")
    exact = collect(make_model("llama"), tokenizer, adapter, what="gram")
    for name, seen in collect(model, tokenizer, adapter).layers.items():
        assert seen.gram_II.dtype == seen.fisher_OI.dtype == torch.float32
        assert float((seen.gram_II - exact.layers[name].gram_II).norm() / seen.gram_II.norm()) < 0.1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ("a text", {}, "got 'a text', not rows"),
        ([], {}, "list of texts"),
        (["a", ("b", "c")], {}, "some rows have a target and some have none"),
        (["a", ""], {}, "text 2 .* no token"),
        (["a"], {"what": ("hessian",)}, "hessian"),
        (["a"], {"batch_size": 0}, "batch_size=0"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_texts_and_settings_that_cannot_be_used_are_refused(make_model, make_adapter, tokenizer, texts, options, message):
    model = make_model("llama")
    with pytest.raises(InvalidTask, match=message):
        collect(model, tokenizer, make_adapter(model, "a"), texts, **options)


def test_an_encoder_decoder_needs_pairs(make_model, make_adapter, tokenizer):
    model = make_model("t5")
    with pytest.raises(InvalidTask, match=r"pairs \(input, target\)"):
        collect(model, tokenizer, make_adapter(model, "a", targets=("q",)))


def test_layers_that_are_not_linear_or_never_run_are_refused_by_name(make_model, make_adapter, tokenizer):
    model = make_model("llama")
    embedding = Adapter("e", "tiny", {"model.embed_tokens": Factors(torch.ones(1, 61), torch.ones(16, 1), kind="embedding")})
    with pytest.raises(LayerMismatch, match=r"model\.embed_tokens"):
        collect(model, tokenizer, embedding)
    model.spare = torch.nn.Linear(16, 16)
    spare = Adapter("s", "tiny", {"spare": Factors(torch.ones(1, 16), torch.ones(16, 1))})
    with pytest.raises(CompositionError, match=r"'spare' never ran|none of the 1 layers"):
        collect(model, tokenizer, spare)


def test_merge_takes_what_was_collected(make_model, make_adapter, tokenizer):
    model = make_model("llama")
    adapters = [make_adapter(model, name, seed=seed) for seed, name in enumerate("ab")]
    statistics = [collect(model, tokenizer, adapter) for adapter in adapters]
    for method in ("fisher", "regmean", "least_squares"):
        merged = merge(adapters, [0.5, 0.5], method=method, statistics=statistics, progress=False)
        assert merged.layers.keys() == adapters[0].layers.keys()


SEEN = Statistics(
    "cafe",
    {
        "a/.. \n0.gram_II": LayerStatistics(torch.eye(3), torch.rand(2, 3), 7, 1.5),
        "b": LayerStatistics(torch.eye(2), None, 9),
        "c": LayerStatistics(None, torch.rand(2, 2), 0),
    },
)


def test_a_file_gives_back_what_was_saved_and_is_the_only_thing_left(tmp_path):
    found = Statistics.load(SEEN.save(tmp_path / "deep" / "seen.safetensors"))
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["seen.safetensors"]
    assert found.adapter_hash == "cafe"
    assert found.layers.keys() == SEEN.layers.keys()
    for name, expected in SEEN.layers.items():
        seen = found.layers[name]
        assert (seen.num_tokens, seen.fisher_norm) == (expected.num_tokens, expected.fisher_norm)
        for part in ("gram_II", "fisher_OI"):
            one, two = getattr(seen, part), getattr(expected, part)
            assert (one is None and two is None) or torch.equal(one, two)


def test_layers_that_share_a_tensor_are_saved(tmp_path):
    one = torch.eye(2)
    shared = Statistics("cafe", {"q": LayerStatistics(one, None, 3), "k": LayerStatistics(one, None, 3)})
    found = Statistics.load(shared.save(tmp_path / "seen"))
    assert torch.equal(found.layers["q"].gram_II, one)
    assert torch.equal(found.layers["k"].gram_II, one)


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = SEEN.save(tmp_path / "seen")
    before = path.read_bytes()
    monkeypatch.setattr("loraweave.common.files.os.replace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Statistics("other", {}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["seen"]


def hostile(path, change, tensors=None):
    entry = {"path": "x", "num_tokens": 1, "fisher_norm": None, "parts": ["gram_II"]}
    header = {"version": 1, "adapter_hash": "cafe", "layers": [entry]}
    change(header, entry)
    save_file(tensors or {"0.gram_II": torch.eye(2)}, path, metadata={"loraweave_statistics": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header, entry: header.update(version=9),
        lambda header, entry: header.update(layers=7),
        lambda header, entry: entry.update(parts=["gram_II", "fisher_OI"]),
        lambda header, entry: entry.update(num_tokens=-1),
        lambda header, entry: entry.update(num_tokens="many"),
        lambda header, entry: entry.pop("path"),
    ],
)
def test_a_file_with_another_header_is_corrupt(tmp_path, change):
    hostile(tmp_path / "x", change)
    with pytest.raises(AdapterCorrupt, match="x"):
        Statistics.load(tmp_path / "x")


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, 3), torch.zeros(2), -torch.eye(2), torch.full((2, 2), torch.nan), torch.eye(2).double()]
)
def test_a_file_with_tensors_that_no_collection_gives_is_corrupt(tmp_path, tensor):
    hostile(tmp_path / "x", lambda header, entry: None, {"0.gram_II": tensor})
    with pytest.raises(AdapterCorrupt, match="layer 'x'"):
        Statistics.load(tmp_path / "x")


def test_a_cut_file_one_of_something_else_and_none_are_refused(tmp_path):
    path = SEEN.save(tmp_path / "seen")
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(AdapterCorrupt, match="collect them again"):
        Statistics.load(path)
    save_file({"w": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(AdapterCorrupt):
        Statistics.load(tmp_path / "other")
    with pytest.raises(AdapterNotFound, match="nowhere"):
        Statistics.load(tmp_path / "nowhere")
