"""Files of Megatron's LoRA against what its fused projections compute, head by head."""

import pytest
import torch
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, LayerMismatch
from loraweave.hub.adapter import Adapter

HEADS, GROUPS, SIZE, HIDDEN, INNER, RANK = 6, 2, 4, 18, 28, 3
BRIDGE = "decoder.layers.1."
NEMO = "model.decoder.layers.1."


@pytest.fixture(scope="module")
def model(make_model):
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": SIZE}
    sizes = {"vocab_size": 11, "hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": 2}
    return make_model("llama", **sizes, **heads)


def pair(num_out, num_in, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(RANK, num_in, generator=generator), torch.randn(num_out, RANK, generator=generator)


def put(folder, modules, *, config="run_config.yaml", text=f"peft:\n  dim: {RANK}\n  alpha: 6\n"):
    held = {}
    for name, (down, up) in modules.items():
        held |= {f"{name}.linear_in.weight": down, f"{name}.linear_out.weight": up}
    save_file(held, folder / "adapter.safetensors")
    if config:
        (folder / config).write_text(text)
    return folder


@pytest.mark.parametrize(
    "name", [f"{BRIDGE}self_attention.linear_qkv.adapter", f"{NEMO}self_attention.adapter_layer.lora_kqv_adapter"]
)
def test_query_key_and_value_are_taken_out_of_their_groups(tmp_path, model, name):
    down, up = pair((HEADS + 2 * GROUPS) * SIZE, HIDDEN, 1)
    adapter = Adapter.from_pretrained(put(tmp_path, {name: (down, up)}), model=model)
    x = torch.randn(5, HIDDEN)
    # as Megatron's attention takes it apart: for every group its queries, one key, one value
    mixed = (2.0 * x @ down.T @ up.T).reshape(5, GROUPS, HEADS // GROUPS + 2, SIZE)
    wanted = {"q": mixed[:, :, :-2].reshape(5, -1), "k": mixed[:, :, -2].reshape(5, -1), "v": mixed[:, :, -1].reshape(5, -1)}
    for part, values in wanted.items():
        delta = adapter.delta(f"model.layers.1.self_attn.{part}_proj")
        torch.testing.assert_close(x @ delta.T, values, rtol=1e-5, atol=1e-5)
    assert len(adapter.layers) == 3


@pytest.mark.parametrize("start", [BRIDGE, f"module.{BRIDGE}"])
def test_gate_stands_above_up_and_other_modules_keep_their_rows(tmp_path, model, start):
    given = {
        f"{start}self_attention.linear_proj.adapter": pair(HIDDEN, HEADS * SIZE, 1),
        f"{start}mlp.linear_fc1.adapter": pair(2 * INNER, HIDDEN, 2),
        f"{start}mlp.linear_fc2.adapter": pair(HIDDEN, INNER, 3),
    }
    adapter = Adapter.from_pretrained(put(tmp_path, given), model=model)
    deltas = [2.0 * up @ down for down, up in given.values()]
    wanted = {
        "self_attn.o_proj": deltas[0],
        "mlp.gate_proj": deltas[1][:INNER],
        "mlp.up_proj": deltas[1][INNER:],
        "mlp.down_proj": deltas[2],
    }
    assert set(adapter.layers) == {f"model.layers.1.{name}" for name in wanted}
    for name, delta in wanted.items():
        torch.testing.assert_close(adapter.delta(f"model.layers.1.{name}"), delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "path", "num_out"),
    [
        (f"{BRIDGE}self_attention.linear_qkv.adapter.adapter_k", "self_attn.k_proj", GROUPS * SIZE),
        (f"{NEMO}self_attention.adapter_layer.lora_unfused_kqv_adapter.q_adapter", "self_attn.q_proj", HEADS * SIZE),
        (f"{NEMO}mlp.adapter_layer.lora_unfused_hto4h_adapter.up_adapter", "mlp.up_proj", INNER),
    ],
)
def test_adapters_for_a_part_alone_are_that_part(tmp_path, model, module, path, num_out):
    given = pair(num_out, HIDDEN, 1)
    adapter = Adapter.from_pretrained(put(tmp_path, {module: given}), model=model)
    torch.testing.assert_close(adapter.delta(f"model.layers.1.{path}"), 2.0 * given[1] @ given[0], rtol=1e-5, atol=1e-5)


def test_the_scale_comes_from_nemos_config_too_and_is_one_without_alpha(tmp_path, model):
    module = f"{NEMO}self_attention.adapter_layer.lora_dense_attention_adapter"
    given = pair(HIDDEN, HEADS * SIZE, 1)
    for text, scale in ((f"adapter_dim: {RANK}", 1.0), (f"adapter_dim: {RANK}\n    alpha: 12", 4.0)):
        put(tmp_path, {module: given}, config="model_config.yaml", text=f"peft:\n  lora_tuning:\n    {text}\n")
        delta = Adapter.from_pretrained(tmp_path, model=model).delta("model.layers.1.self_attn.o_proj")
        torch.testing.assert_close(delta, scale * given[1] @ given[0], rtol=1e-5, atol=1e-5)


QKV = f"{BRIDGE}self_attention.linear_qkv.adapter"
FITS = pair((HEADS + 2 * GROUPS) * SIZE, HIDDEN, 1)
REFUSED = {
    "no config": ({QKV: FITS}, {"config": None}, AdapterUnsupported, "alpha, and with it the scale, is not known"),
    "another rank": ({QKV: FITS}, {"text": "peft: {dim: 6, alpha: 6}"}, AdapterCorrupt, "rank 3.*6.*Gather"),
    "no alpha": ({QKV: FITS}, {"text": "peft: {dim: 3}"}, AdapterCorrupt, "no numbers dim and alpha"),
    "no numbers": ({QKV: FITS}, {"text": "peft: {dim: many}"}, AdapterCorrupt, "no numbers dim and alpha"),
    "objects in YAML": ({QKV: FITS}, {"text": "peft: !!python/object:os.system {}"}, AdapterCorrupt, "not plain YAML"),
    "half of the rows": ({QKV: (FITS[0], FITS[1][:20].clone())}, {}, LayerMismatch, r"12"),
    "rows of no group": ({QKV: (FITS[0], FITS[1][:21].clone())}, {}, AdapterUnsupported, "21 outputs, which do not divide"),
    "an unknown module": ({f"{BRIDGE}mlp.experts.linear_fc1.adapter": FITS}, {}, AdapterUnsupported, "mlp.experts"),
    "a layer too many": ({QKV.replace("1", "7"): FITS}, {}, AdapterUnsupported, "no module of that name"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_and_damaged_files_are_refused_by_name(tmp_path, model, case):
    modules, options, error, named = REFUSED[case]
    with pytest.raises(error, match=named):
        Adapter.from_pretrained(put(tmp_path, modules, **options), model=model)


def test_without_the_base_nothing_says_how_the_projection_divides(tmp_path):
    with pytest.raises(AdapterUnsupported, match=r"fused projections.*model=model"):
        Adapter.from_pretrained(put(tmp_path, {QKV: FITS}))


def test_the_pickle_of_an_unpacked_nemo_file_is_read_on_consent(tmp_path, model):
    module = f"{NEMO}self_attention.adapter_layer.lora_dense_attention_adapter"
    down, up = pair(HIDDEN, HEADS * SIZE, 1)
    torch.save({f"{module}.linear_in.weight": down, f"{module}.linear_out.weight": up}, tmp_path / "model_weights.ckpt")
    (tmp_path / "model_config.yaml").write_text(f"peft:\n  lora_tuning:\n    adapter_dim: {RANK}\n")
    adapter = Adapter.from_pretrained(tmp_path, model=model, allow_pickle=True)
    torch.testing.assert_close(adapter.delta("model.layers.1.self_attn.o_proj"), up @ down, rtol=1e-5, atol=1e-5)
    with pytest.raises(AdapterUnsupported, match="allow_pickle=True"):
        Adapter.from_pretrained(tmp_path, model=model)
