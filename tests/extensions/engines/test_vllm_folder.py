"""Folders for vLLM: peft computes the same with them, and vLLM's loader, as its sources state it, takes them."""

import argparse
import json
import math
import re
import shlex
from dataclasses import replace

import peft
import pytest
import torch
from exported_llamas import adapter, best_error, by_peft, dense, llama, logits, with_layer
from safetensors.torch import load_file

from loraweave.errors import AdapterExists, AdapterUnsupported, LoraweaveError, UnknownName, WeightingError
from loraweave.hub.adapter import Adapter
from loraweave.hub.conversion import to_lora
from loraweave.types import Factors

# peft 0.21 asks transformers for an attribute that has been renamed there
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# a llama in vLLM: every linear layer, and what the architecture lists as its embedding modules
VLLM_LLAMA = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}


def vllm_loads(folder, max_lora_rank, supported=frozenset(VLLM_LLAMA)):
    """{module: delta} that vLLM computes with; AssertionError where one of its releases refuses or misreads the folder.

    Stated after vllm/lora/peft_helper.py, vllm/lora/lora_model.py, vllm/lora/utils.py and vllm/config/lora.py.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert {"r", "lora_alpha", "target_modules"} <= set(config)
    assert max_lora_rank in (8, 16, 32, 64, 128, 256, 320, 512)
    assert 0 < config["r"] <= max_lora_rank
    assert type(config["r"]) is type(config["lora_alpha"]) is int
    assert not config.get("modules_to_save")
    assert not config.get("use_dora")
    assert not config.get("lora_bias")
    assert config.get("bias", "none") == "none"
    assert config.get("init_lora_weights", True) is True
    refused = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora", "trainable_token_indices")
    assert not any(config.get(name) for name in refused)
    # only recent releases read these, the others compute with r and lora_alpha everywhere
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    assert config["base_model_name_or_path"]
    root = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    a, b = {}, {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = key.split(".")
        assert parts[:2] == ["base_model", "model"]
        if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
            module, into = ".".join(parts[2:-2]), a if parts[-2] == "lora_A" else b
        else:
            assert parts[-1] in ("lora_embedding_A", "lora_embedding_B"), f"{key} is unsupported LoRA weight"
            module, into = ".".join(parts[2:-1]), a if parts[-1].endswith("A") else b
        assert module.rsplit(".", 1)[-1] in supported
        assert tensor.dim() == 2
        into[module] = tensor
    assert set(a) == set(b)
    # vLLM's buffers have max_lora_rank rows, of which the first r are filled
    assert all(a[module].shape[0] == b[module].shape[1] == config["r"] for module in a)
    return {module: (b[module] * root) @ a[module] for module in a}


def parsed(flags):
    """The flags as vLLM's server reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--enable-lora", action="store_true")
    for flag in ("--max-lora-rank", "--max-loras"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--lora-modules", nargs="+")
    read = parser.parse_args(list(flags))
    modules = {}
    for item in read.lora_modules:
        if "=" in item and "," not in item:
            name, path = item.split("=")
        else:
            name, path = (json.loads(item)[key] for key in ("name", "path"))
        modules[name] = path
    return read, modules


MIXED = {"q_proj": 3, "v_proj": 5, "down_proj": 2, "o_proj": 1}


def test_exported_folder_computes_what_the_adapter_says(tmp_path):
    given = adapter(MIXED)
    report = given.export(tmp_path / "out", target="vllm")
    want = dense({layer: given.delta(layer) for layer in given.layers})
    torch.testing.assert_close(by_peft(report.folder), want, rtol=1e-6, atol=1e-6)
    assert set(report.errors.values()) == {0.0}
    assert report.relative_error == 0.0
    assert report.rank == 5


def test_vllm_loads_every_update_exactly(tmp_path):
    given = adapter(MIXED)
    report = given.export(tmp_path / "out", target="vllm")
    read, modules = parsed(report.flags)
    found = vllm_loads(report.folder, read.max_lora_rank)
    assert set(found) == set(given.layers)
    for layer, delta_OI in found.items():
        torch.testing.assert_close(delta_OI, given.delta(layer), rtol=1e-6, atol=1e-7)
    assert read.enable_lora
    assert read.max_lora_rank == 8
    assert modules == {"some adapter": str(tmp_path / "out")}


def test_vllm_keeps_one_adapter_slot_free_for_requests_for_the_base(tmp_path):
    # vLLM 0.32 on CPU answers a request for the base by the last slot's adapter when all slots are taken (48421, 49656)
    report = adapter(MIXED).export(tmp_path / "out", target="vllm")
    read, modules = parsed(report.flags)
    assert read.max_loras == len(modules) + 1
    [why] = [text for text in report.warnings if "--max-loras" in text]
    assert "base" in why
    assert "48421" in why
    assert why in str(report)


def test_padding_adds_rows_of_zeros_and_nothing_else(tmp_path):
    given = adapter(MIXED)
    given.export(tmp_path / "out", target="vllm")
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for layer, factors in given.layers.items():
        a_RI = stored[f"base_model.model.{layer}.lora_A.weight"]
        b_OR = stored[f"base_model.model.{layer}.lora_B.weight"]
        assert torch.equal(a_RI[: factors.rank], factors.a_RI)
        assert torch.equal(b_OR[:, : factors.rank], factors.b_OR)
        assert not a_RI[factors.rank :].any()
        assert not b_OR[:, factors.rank :].any()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"], "lora_alpha": 7},
        {"target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_alpha": 5},
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 9, r"layers\.1\.mlp\..*": 3},
        },
        {"target_modules": ["lm_head", "q_proj"]},
    ],
    ids=["alpha", "rank-stabilised", "patterns", "output layer"],
)
def test_adapter_that_peft_trained_reaches_vllm_with_its_scale_folded_in(tmp_path, options):
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=3, **options))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "trained", save_embedding_layers=False)
    given = replace(Adapter.from_pretrained(tmp_path / "trained"), base_model="org/base")
    report = given.export(tmp_path / "out", target="vllm")
    found = vllm_loads(report.folder, 8)
    layers = {name: part for name, part in model.named_modules() if isinstance(part, peft.tuners.lora.LoraLayer)}
    assert len(found) == len(layers)
    for name, module in layers.items():
        theirs = module.get_delta_weight("default").detach()
        torch.testing.assert_close(found[name.removeprefix("base_model.model.")], theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(by_peft(report.folder), logits(model.eval()), rtol=1e-6, atol=1e-6)


def test_cut_of_the_rank_is_the_best_one_and_its_error_is_shown(tmp_path):
    given = adapter({"q_proj": 12, "v_proj": 3})
    report = given.export(tmp_path / "out", target="vllm", max_rank=8)
    again = Adapter.from_pretrained(report.folder)
    assert report.rank == again.rank == 8
    lost, total = [], []
    for layer in given.layers:
        error, norm = best_error(given.delta(layer), 8)
        assert report.errors[layer] == pytest.approx(error / norm, abs=1e-6)
        difference = (again.delta(layer) - given.delta(layer)).double().norm()
        assert float(difference) == pytest.approx(error, abs=1e-5)
        lost.append(error)
        total.append(norm)
    assert report.relative_error == pytest.approx(math.hypot(*lost) / math.hypot(*total), rel=1e-5)
    assert "rank cut in 2 layers" in str(report)
    assert f"{report.relative_error:.3g}" in str(report)


@pytest.mark.parametrize(("rank", "limit"), [(1, 8), (8, 8), (9, 16), (33, 64), (257, 320), (321, 512), (512, 512)])
def test_server_is_told_the_smallest_legal_rank(tmp_path, rank, limit):
    report = adapter({"q_proj": rank}).export(tmp_path / "out", target="vllm")
    assert parsed(report.flags)[0].max_lora_rank == limit
    assert vllm_loads(report.folder, limit)
    assert any(f"reserves rank {limit}" in text for text in report.warnings) == (rank != limit)


def test_rank_above_all_that_vllm_takes_is_refused_with_the_way_to_cut_it(tmp_path):
    given = adapter({"q_proj": 513})
    with pytest.raises(AdapterUnsupported, match=r"some adapter.*rank 513.*at most 512: pass max_rank=512"):
        given.export(tmp_path / "out", target="vllm")
    assert not (tmp_path / "out").exists()
    # no update has a rank above its smaller side, which is 24
    report = given.export(tmp_path / "out", target="vllm", max_rank=512)
    assert report.rank == 24
    assert max(report.errors.values()) < 1e-6


def test_command_is_one_that_a_shell_reads_back(tmp_path):
    report = adapter({"q_proj": 2}).export(tmp_path / "an out", target="vllm")
    words = shlex.split(report.command)
    assert words[:3] == ["vllm", "serve", "org/base"]
    assert tuple(words[3:]) == report.flags
    assert f"serve it: {report.command}" in str(report)


@pytest.mark.parametrize("name", ["a=b", "a,b", "{x}", "ä b'\"", ""])
def test_any_name_reaches_the_server(tmp_path, name):
    report = adapter({"q_proj": 2}, name=name).export(tmp_path / "out", target="vllm")
    assert parsed(report.flags)[1] == {name or "out": str(tmp_path / "out")}


def test_report_tells_modules_and_packed_layers(tmp_path):
    report = adapter({"q_proj": 2, "up_proj": 2, "lm_head": 2}).export(tmp_path / "out", target="vllm")
    assert report.modules == ("lm_head", "q_proj", "up_proj")
    text = " ".join(report.warnings)
    assert "as one qkv_proj; it packs the factors of q_proj by" in text
    assert "as one gate_up_proj" in text
    assert "'lm_head' has an update" in text


def test_report_as_json_is_json(tmp_path):
    report = adapter({"q_proj": 2}).export(tmp_path / "out", target="vllm")
    told = json.loads(json.dumps(report.to_json()))
    assert told["flags"] == list(report.flags)
    assert told["folder"] == str(tmp_path / "out")
    assert set(told["errors"].values()) == {0.0}


def test_update_of_rank_zero_and_a_bias_of_zeros_are_no_obstacle(tmp_path):
    given = with_layer(adapter({"q_proj": 2}), bias_O=torch.zeros(24))
    empty = "model.layers.1.mlp.up_proj"
    given = replace(given, layers={**given.layers, empty: Factors(torch.zeros(0, 24), torch.zeros(40, 0))})
    report = given.export(tmp_path / "out", target="vllm")
    assert set(vllm_loads(report.folder, 8)) == set(given.layers) - {empty}


def test_embedding_is_written_as_vllm_names_it_with_a_warning(tmp_path):
    factors = Factors(torch.randn(2, 29), torch.randn(24, 2) * 0.1, kind="embedding")
    given = Adapter("e", "org/base", {"model.embed_tokens": factors})
    report = given.export(tmp_path / "out", target="vllm")
    assert torch.allclose(vllm_loads(report.folder, 8)["model.embed_tokens"], factors.b_OR @ factors.a_RI)
    assert "embedding_modules" in report.warnings[0]


REFUSED = {
    "DoRA": (lambda given: with_layer(given, magnitude_O=torch.ones(24)), r"is DoRA.*lw\.to_lora\(adapter, model\)"),
    "gain": (lambda given: with_layer(given, gain_O=torch.ones(24)), r"gain.*lw\.to_lora"),
    "bias of an update": (lambda given: with_layer(given, bias_O=torch.ones(24)), "trained bias.*serve that model"),
    "trained bias of the base": (lambda given: with_layer(given, base_bias_O=torch.zeros(24)), "trained bias"),
    "convolution": (lambda given: with_layer(given, kind="conv", kernel=(3,)), "convolution"),
    "head": (lambda given: replace(given, heads={"lm_head.weight": torch.ones(29, 24)}), r"lm_head.weight.*heads=\{\}"),
    "no base model": (lambda given: replace(given, base_model=""), r"names no base model.*base_model=\.\.\."),
    "no effect": (lambda given: with_layer(given, b_OR=torch.zeros(24, 2)), "without effect"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_vllm_cannot_express_is_refused_with_the_way_out_and_nothing_is_written(tmp_path, case):
    change, message = REFUSED[case]
    one = adapter({"q_proj": 2})
    given = change(replace(one, layers=dict([next(iter(one.layers.items()))])))
    with pytest.raises(AdapterUnsupported, match=message):
        given.export(tmp_path / "out", target="vllm")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": "vlm"}, UnknownName, "did you mean 'vllm'.*peft, vllm"),
        ({"target": "tgi"}, UnknownName, "no export target 'tgi'"),
        ({"max_rank": 0}, WeightingError, "max_rank=0 is below 1"),
        ({"max_rank": -3, "target": "vllm"}, WeightingError, "max_rank=-3"),
    ],
)
def test_wrong_argument_is_refused_before_anything_is_written(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        adapter({"q_proj": 2}).export(tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(AdapterExists, match=re.escape("thesis.txt")):
        adapter({"q_proj": 2}).export(tmp_path, target="vllm")
    assert issubclass(AdapterExists, LoraweaveError)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_exported_adapter_keeps_its_card_and_tells_how_it_was_made(tmp_path):
    given = adapter({"q_proj": 12}, card={"description": "d", "license": "mit"})
    given.export(tmp_path / "out", target="vllm", max_rank=8)
    card = Adapter.from_pretrained(tmp_path / "out").card
    assert (card["description"], card["license"], card["name"]) == ("d", "mit", "some adapter")
    assert card["export"]["rank"] == 8
    assert card["export"]["relative_error"] > 0


def test_way_out_for_dora_leads_to_a_folder_that_vllm_loads(tmp_path):
    torch.manual_seed(1)
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_dora=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "dora")
    given = replace(Adapter.from_pretrained(tmp_path / "dora"), base_model="org/base")
    plain = to_lora(given, llama())
    report = plain.export(tmp_path / "out", target="vllm")
    want = logits(model.eval())
    torch.testing.assert_close(dense(vllm_loads(report.folder, 32)), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_peft(report.folder), want, rtol=1e-4, atol=1e-4)


def test_files_beside_the_weights_are_written_and_what_vllm_does_not_load_is_named(tmp_path):
    files = {"tokenizer_config.json": b"{}", "value_head.safetensors": b"a head"}
    report = adapter({"q_proj": 2}, files=files).export(tmp_path / "out", target="vllm")
    assert {name: (report.folder / name).read_bytes() for name in files} == files
    assert "tokenizer_config.json" in (report.folder / "README.md").read_text()
    assert "vLLM does not load value_head.safetensors" in report.warnings


def test_the_card_keeps_the_prompts_by_which_an_adapter_is_asked(tmp_path):
    given = adapter({"q_proj": 2}, card={"prompts": ["swap\nInput: {input}\nOutput:"]})
    given.export(tmp_path / "out", target="vllm")
    assert Adapter.from_pretrained(tmp_path / "out").card["prompts"] == given.card["prompts"]
