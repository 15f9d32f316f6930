"""What a PEFT folder may not be: every fault has a name, and none of them hangs, crashes or is passed over."""

import json
import os
import struct

import peft_models
import pytest
import torch
from peft_models import LORA, PREFIX, lora
from safetensors.torch import save_file

from loraweave.errors import AdapterCorrupt, AdapterSuspicious, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats.peft import Peft

LAYER = "model.layers.0.self_attn.q_proj"
PATH = f"{PREFIX}{LAYER}"


@pytest.fixture
def folder(tmp_path):
    return put(tmp_path / "some-adapter")


def put(path, config=None, **extra):
    return peft_models.put(path, lora(LAYER) | extra, **(config or {}))


def put_raw(path, header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (path / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


UNSUPPORTED_CONFIGS = {
    "peft_type": "IA3",
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 2]],
    "megatron_config": {"tensor_model_parallel_size": 2},
    "use_qalora": True,
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "kasa_config": {"beta": 1e-4},
    "monteclora_config": {"num_samples": 2},
    "velora_config": {"num_groups": 64},
    "ensure_weight_tying": True,
    "enable_lora": [True, False, True],
    "some_future_field": 3,
}


@pytest.mark.parametrize("field", UNSUPPORTED_CONFIGS)
def test_feature_without_exact_form_is_refused_by_name(folder, field):
    put(folder, {field: UNSUPPORTED_CONFIGS[field]})
    with pytest.raises(AdapterUnsupported, match=f"some-adapter.*{field}"):
        Peft.read(folder)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "of-tomorrow", ["pissa"]])
def test_initialisation_that_changed_the_base_is_refused(folder, init):
    put(folder, {"init_lora_weights": init})
    with pytest.raises(AdapterUnsupported, match="init_lora_weights"):
        Peft.read(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica", None])
def test_initialisation_that_leaves_the_base_alone_is_read(folder, init):
    put(folder, {"init_lora_weights": init})
    assert Peft.read(folder).layers[LAYER].rank == 2


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_unknown_field_that_is_switched_off_is_read(folder, value):
    put(folder, {"some_future_field": value})
    assert list(Peft.read(folder).layers) == [LAYER]


WRONG_VALUES = {
    "r": ["4", True, 0, -4, 4.5, None, 10**12],
    "lora_alpha": [None, "8", True, [8]],
    "use_dora": ["yes"],
    "use_rslora": [1],
    "bias": ["some"],
    "rank_pattern": [[4], {"q_proj": "4"}],
    "alpha_pattern": [{"q_proj": None}],
    "base_model_name_or_path": [3],
    "task_type": [["CAUSAL_LM"]],
    "alora_invocation_tokens": [5, [-1], ["5"], [5.0], [True], [5] * 1001],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG_VALUES.items() for value in values])
def test_value_of_a_wrong_type_is_refused_by_name(folder, field, value):
    put(folder, {field: value})
    with pytest.raises(AdapterCorrupt, match=field):
        Peft.read(folder)


RAW_CONFIGS = {
    "not JSON": b"{'r': 4",
    "byte order mark": b"\xef\xbb\xbf" + json.dumps(LORA).encode(),
    "UTF-16": json.dumps(LORA).encode("utf-16"),
    "NaN literal": b'{"peft_type": "LORA", "r": 2, "lora_alpha": NaN}',
    "beyond floats": b'{"peft_type": "LORA", "r": 2, "lora_alpha": 1e400}',
    "a list": b"[]",
    "key twice": b'{"peft_type": "LORA", "r": 2, "r": 4, "lora_alpha": 4}',
    "nested too deeply": b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}",
    "number of 10,000 digits": b'{"peft_type": "LORA", "lora_alpha": 4, "r": ' + b"9" * 10_000 + b"}",
    "empty": b"",
    "above the limit": b'{"peft_type": "LORA", "x": "' + b"x" * 2**22 + b'"}',
}


@pytest.mark.parametrize("case", RAW_CONFIGS)
def test_config_that_is_not_a_clean_json_object_is_refused(folder, case):
    (folder / "adapter_config.json").write_bytes(RAW_CONFIGS[case])
    with pytest.raises(AdapterCorrupt, match="some-adapter"):
        Peft.read(folder)


def test_config_with_windows_line_ends_is_read(folder):
    text = json.dumps(LORA, indent=1).replace("\n", "\r\n")
    (folder / "adapter_config.json").write_bytes(text.encode())
    assert Peft.read(folder).base_model == "a/base"


def test_missing_config_names_what_the_folder_holds_and_the_checkpoint_below(folder):
    checkpoint = folder / "checkpoint-200"
    checkpoint.mkdir()
    (folder / "adapter_config.json").rename(checkpoint / "adapter_config.json")
    with pytest.raises(AdapterCorrupt, match=r"adapter_model.safetensors.*did you mean checkpoint-200/\?"):
        Peft.read(folder)


def test_missing_weights_name_what_the_folder_holds(folder):
    (folder / "adapter_model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(AdapterCorrupt, match=r"weights\.safetensors"):
        Peft.read(folder)


def test_pickle_alone_is_refused_with_the_way_to_convert_it_and_never_opened_as_one(folder):
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(AdapterUnsupported, match=r"pickle.*weights_only=True"):
        Peft.read(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_lfs_pointer_says_that_it_is_one(folder, name):
    (folder / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    with pytest.raises(AdapterCorrupt, match="git-LFS pointer"):
        Peft.read(folder)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "loraweave.json"])
@pytest.mark.parametrize("kind", ["directory", "fifo", "outside", "dangling", "device"])
def test_only_regular_files_of_the_folder_are_read(folder, name, kind):
    path = folder / name
    outside = folder.parent / "outside"
    outside.write_bytes(path.read_bytes() if path.exists() else b"{}")
    path.unlink(missing_ok=True)
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to({"outside": outside, "dangling": folder / "nothing", "device": "/dev/zero"}[kind])
    with pytest.raises(AdapterCorrupt, match=name):
        Peft.read(folder)


def test_links_of_a_model_hub_cache_to_its_own_blobs_are_followed(folder):
    repository = folder.parent / "models--some--adapter"
    snapshot, blobs = repository / "snapshots" / "abc", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).rename(blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert list(Peft.read(snapshot).layers) == [LAYER]


def test_every_truncation_of_the_weights_is_refused(folder):
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(AdapterCorrupt):
            Peft.read(folder)


A, B = f"{PATH}.lora_A.weight", f"{PATH}.lora_B.weight"
HEADERS = {
    "trailing bytes": ({A: entry([2, 5], 0, 40), B: entry([3, 2], 40, 64)}, 65),
    "overlap": ({A: entry([2, 5], 0, 40), B: entry([3, 2], 32, 56)}, 56),
    "gap": ({A: entry([2, 5], 0, 40), B: entry([3, 2], 48, 72)}, 72),
    "size unlike the shape": ({A: entry([2, 5], 0, 36), B: entry([3, 2], 36, 60)}, 60),
    "negative shape": ({A: entry([-2, -5], 0, 40)}, 40),
    "shape of 10^12 elements": ({A: entry([10**6, 10**6], 0, 40)}, 40),
    "shape that overflows": ({A: entry([2**62, 2**62], 0, 40)}, 40),
    "shape of truth values": ({A: entry([True, True], 0, 4)}, 4),
    "shape of nothing": ({A: entry([0, 5], 0, 0), B: entry([3, 0], 0, 0)}, 0),
    "unknown dtype": ({A: entry([2, 5], 0, 40, "F33")}, 40),
    "dtype that is a list": ({A: entry([2, 5], 0, 40, ["F32"])}, 40),
    "offsets past the end": ({A: entry([2, 5], 0, 40)}, 8),
    "offsets beyond 64 bits": ({A: entry([2, 5], 2**70, 2**70 + 40)}, 40),
    "entry that is no object": ({A: 3}, 0),
    "metadata that is no text": ({"__metadata__": {"a": {"b": 1}}, A: entry([2, 5], 0, 40)}, 40),
    "name of 10,000 characters": ({"x" * 10_000: entry([2, 5], 0, 40)}, 40),
    "name with a newline": ({f"{A}\n": entry([2, 5], 0, 40)}, 40),
    "no tensors": ({}, 0),
    "key twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        8,
    ),
    "nested too deeply": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "a million tensors": (b"{" + b'"dtype":1,' * 10**6 + b'"x":1}', 0),
    "not JSON": (b"{hello}   ", 0),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header_is_refused(folder, case):
    header, size = HEADERS[case]
    put_raw(folder, header, bytes(size))
    with pytest.raises(AdapterCorrupt, match="some-adapter"):
        Peft.read(folder)


@pytest.mark.parametrize("length", [2**63, 2**60, 10**8 + 1, 10_000, 0])
def test_header_length_beyond_the_file_is_refused(folder, length):
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}        ")
    with pytest.raises(AdapterCorrupt, match="header"):
        Peft.read(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.int64, torch.complex64])
def test_numbers_without_a_scale_are_refused(folder, dtype):
    put(folder, **{A: torch.ones(2, 5).to(dtype)})
    with pytest.raises(AdapterUnsupported, match="dtype"):
        Peft.read(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64])
def test_every_floating_point_dtype_is_read_in_fp32_and_recorded(folder, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in lora(LAYER).items()}
    put(folder, **stored)
    contents = Peft.read(folder)
    assert contents.card["stored_dtype"] == str(dtype).removeprefix("torch.")
    assert torch.equal(contents.layers[LAYER].a_RI, stored[A].float())
    assert torch.equal(contents.layers[LAYER].b_OR, (stored[B].double() * 2).float())


DORA = {"use_dora": True}
MAGNITUDE = f"{PATH}.lora_magnitude_vector"


def embedding(a, b):
    return {A: None, B: None, f"{PATH}.lora_embedding_A": a, f"{PATH}.lora_embedding_B": b}


# what the config has, what the file has, and what the message names
CORRUPT = {
    "B missing": ({}, {B: None}, LAYER),
    "A missing": ({}, {A: None}, LAYER),
    "foreign names": ({}, {f"junk.{i}": torch.ones(1) for i in range(5)}, r"5 of 7 .*junk\.0.*junk\.1.*junk\.2"),
    "kohya names": ({}, {"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, "kohya"),
    "one tensor under two names": ({}, {f"{LAYER}.lora_A.weight": torch.ones(2, 5)}, LAYER),
    "ranks of A and B differ": ({}, {B: torch.ones(3, 4)}, r"\(2, 5\).*\(3, 4\)"),
    "one axis": ({}, {A: torch.ones(10)}, LAYER),
    "NaN": ({}, {A: torch.tensor([[float("nan")] * 2 + [1.0] * 3] * 2)}, f"{LAYER}.*4 of 10"),
    "infinite": ({}, {B: torch.full((3, 2), float("inf"))}, f"{LAYER}.*6 of 6"),
    "overflow by the scale": ({}, {B: torch.full((3, 2), 3e38)}, "beyond what fp32 holds"),
    "DoRA without the flag": ({}, {MAGNITUDE: torch.ones(3)}, "use_dora"),
    "bias of B without the flag": ({}, {f"{PATH}.lora_B.bias": torch.ones(3)}, "lora_bias"),
    "bias of another size": ({}, {f"{PATH}.base_layer.bias": torch.ones(4)}, r"\(4,\), not \(3,\)"),
    "use_dora without magnitudes": (DORA, {}, "use_dora=true"),
    "lora_bias without biases": ({"lora_bias": True}, {}, "lora_bias=true"),
    "DoRA on a convolution along another axis": (
        DORA,
        {A: torch.ones(2, 5, 3), B: torch.ones(3, 2, 1), MAGNITUDE: torch.ones(3, 1, 1)},
        r"magnitude has shape \(3, 1, 1\), not \(3,\)",
    ),
    "DoRA on an embedding along the vocabulary": (
        DORA,
        embedding(torch.ones(2, 5), torch.ones(3, 2)) | {MAGNITUDE: torch.ones(5)},
        r"magnitude has shape \(5,\), not \(3,\)",
    ),
    "embedding stored transposed": ({}, embedding(torch.ones(5, 2), torch.ones(2, 3)), r"\(5, 2\)"),
}
UNSUPPORTED = {
    "head": ({}, {f"{PREFIX}score.weight": torch.ones(2, 2)}, "score"),
    "head of modules_to_save": ({}, {f"{PATH}.modules_to_save.weight": torch.ones(2, 2)}, "modules_to_save"),
    "trained tokens": ({}, {f"{PATH}.token_adapter.trainable_tokens_delta": torch.ones(2)}, "token"),
    "two adapters": ({}, {f"{PREFIX}x.lora_{side}.one.weight": torch.ones(2, 2) for side in "AB"}, "2 adapters"),
    "fused experts": ({}, {f"{PATH}.base_layer.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}, "base_layer"),
    "grouped convolution": ({}, {A: torch.ones(2, 4, 3), B: torch.ones(6, 1, 1)}, "groups"),
    "every update zero": ({}, {B: torch.zeros(3, 2)}, "without effect"),
    "use_dora with lora_bias": ({"use_dora": True, "lora_bias": True}, {}, "lora_bias"),
    "alpha of zero": ({"lora_alpha": 0}, {}, "lora_alpha is 0"),
}


@pytest.mark.parametrize("case", [*CORRUPT, *UNSUPPORTED])
def test_tensors_that_do_not_form_an_update_or_contradict_the_config_are_refused(folder, case):
    config, extra, message = CORRUPT.get(case) or UNSUPPORTED[case]
    put(folder, config, **extra)
    with pytest.raises(AdapterCorrupt if case in CORRUPT else AdapterUnsupported, match=message):
        Peft.read(folder)


PATTERNS = {
    "catastrophic": "(([a-z_.0-9])+)+X",
    "catastrophic alternation": "(.|_|.|[a-z._0-9])*X",
    "invalid": "q_proj(",
    "too long": "q" * 2_000,
}


@pytest.mark.parametrize("case", PATTERNS)
def test_pattern_that_cannot_be_run_within_bounds_is_refused(folder, case, monkeypatch):
    monkeypatch.setattr("loraweave.hub.formats._config.TIMEOUT_S", 0.5)
    put(folder, {"alpha_pattern": {PATTERNS[case]: 3}})
    with pytest.raises(AdapterUnsupported, match="alpha_pattern"):
        Peft.read(folder)


def test_target_patterns_are_never_run(folder):
    put(folder, {"target_modules": "(([a-z_.0-9])+)+X", "exclude_modules": "(((a)+)+", "layers_pattern": "(("})
    assert Peft.read(folder).card["peft"]["target_modules"] == "(([a-z_.0-9])+)+X"


def split(folder, names, weight_map=None):
    held = lora(LAYER)
    (folder / "adapter_model.safetensors").unlink()
    for name, key in zip(names, held, strict=True):
        save_file({key: held[key]}, folder / name)
    index = {"metadata": {}, "weight_map": weight_map or dict(zip(held, names, strict=True))}
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps(index))


SHARDS = ["adapter_model-00001-of-00002.safetensors", "adapter_model-00002-of-00002.safetensors"]


def test_shards_are_read_as_one_file(folder):
    whole = Peft.read(folder).layers[LAYER]
    split(folder, SHARDS)
    assert torch.equal(Peft.read(folder).layers[LAYER].b_OR, whole.b_OR)


@pytest.mark.parametrize(
    "weight_map",
    [{A: SHARDS[0]}, {A: SHARDS[1], B: SHARDS[0]}, {A: "../x.safetensors"}, {A: "gone.safetensors"}, {A: 3}, [A]],
)
def test_index_that_disagrees_with_its_shards_is_refused(folder, weight_map):
    split(folder, SHARDS, weight_map)
    if weight_map == {A: SHARDS[0]}:
        save_file(lora(LAYER), folder / SHARDS[0])
    with pytest.raises(AdapterCorrupt):
        Peft.read(folder)


def test_recognises_a_folder_by_its_file_names(folder, tmp_path):
    assert Peft.recognises(folder)
    assert not Peft.recognises(tmp_path)
    assert not Peft.recognises(tmp_path / "nothing")


BEYOND = rf"{LAYER}.*reaches 4e\+40, beyond what fp32 holds"


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ({}, {A: torch.full((2, 5), 1e20), B: torch.full((3, 2), 1e20)}, BEYOND),
        # their sum is 2e33, but each term of it is beyond fp32
        ({}, {A: torch.tensor([[1e20] * 5, [1e20] * 4 + [9.999999e19]]), B: torch.tensor([[1e20, -1e20]] * 3)}, BEYOND),
        ({"lora_alpha": 1e39}, {}, r"lora_alpha is 1e\+39, beyond what fp32 holds"),
        ({"alpha_pattern": {"q_proj": -1e39}}, {}, r"alpha_pattern\['q_proj'\] is -1e\+39"),
    ],
)
def test_finite_numbers_whose_product_fp32_does_not_hold_are_suspicious(folder, config, extra, message):
    put(folder, config, **extra)
    with pytest.raises(AdapterSuspicious, match=message):
        Adapter.from_pretrained(folder)


def test_a_product_that_fp32_just_holds_is_read(folder):
    put(folder, {"lora_alpha": 2}, **{A: torch.full((2, 5), 1e19), B: torch.full((3, 2), 1.6e19)})
    delta = Adapter.from_pretrained(folder).delta(LAYER)
    assert delta.tolist() == [[pytest.approx(3.2e38)] * 5] * 3


@pytest.mark.parametrize(
    ("config", "extra", "message"),
    [
        ({"bias": "all"}, {f"{PATH}.base_layer.bias": torch.ones(3)}, "is a trained bias of the base"),
        ({"use_dora": True}, {f"{PATH}.lora_magnitude_vector": torch.ones(3)}, "is DoRA"),
        ({"modules_to_save": ["score"]}, {f"{PREFIX}score.weight": torch.ones(2, 3)}, r"the trained head 'score\.weight'"),
        ({"task_type": "SEQ_CLS"}, {}, "never applies the adapter of another task"),
    ],
)
def test_invocation_tokens_beside_what_counts_before_them_are_refused(folder, config, extra, message):
    put(folder, {"alora_invocation_tokens": [5, 6], **config}, **extra)
    with pytest.raises(AdapterUnsupported, match=message):
        Adapter.from_pretrained(folder)
