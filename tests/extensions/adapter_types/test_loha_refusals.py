"""What the readers of other adapter types refuse: by name, before anything is made of the file."""

import json

import peft
import pytest
import torch
from peft_models import FREE, Tree, edit, odd, save, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported, BaseModelMismatch, LayerMismatch
from loraweave.hub.adapter import Adapter
from loraweave.hub.base import fingerprint
from loraweave.hub.formats._reading import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

FIRST = "base_model.model.first.hada_w"


@pytest.fixture
def loha(tmp_path):
    save(peft.LoHaConfig(r=2, **FREE), tmp_path)
    return tmp_path


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path)


def test_an_exact_type_is_cut_where_a_rank_asks_for_it(loha):
    with pytest.raises(AdapterUnsupported, match="rank 3 leaves"):
        Adapter.from_pretrained(loha, rank=3)
    assert Adapter.from_pretrained(loha, rank=3, max_error=0.9).rank == 3


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": True}, {"max_error": -0.1}, {"max_error": float("nan")}])
def test_bounds_outside_their_range_are_refused(loha, options):
    with pytest.raises(AdapterUnsupported, match=next(iter(options))):
        Adapter.from_pretrained(loha, **options)


def test_an_unknown_field_is_refused_unless_it_says_nothing(loha):
    before = Adapter.from_pretrained(loha).hash
    edit(loha, twist=None, spin=False, turns=[])
    assert Adapter.from_pretrained(loha).hash == before
    edit(loha, twist=2)
    with pytest.raises(AdapterUnsupported, match="unknown field twist=2"):
        Adapter.from_pretrained(loha)


UNKNOWN = ["NEWTYPE", "PEFT", "BASE_CHANGE", "LORA_XS", "_FOREIGN", "", None, 3, ["LOHA"]]
UNSUPPORTED = [
    *(({"peft_type": kind}, f"{kind}.*cannot be read as factors: [a-z]") for kind in sorted(REFUSED)),
    *(({"peft_type": kind}, "peft_type") for kind in UNKNOWN),
    ({"alpha_pattern": {"first": 2, "irst": 2, ".*first": 3}}, "several values"),
    ({"bias": "all"}, "bias='all'"),
]
CORRUPT = [
    ({"alpha": "3"}, "alpha is '3', not a finite number"),
    ({"alpha": None}, "alpha is None"),
    ({"alpha_pattern": [1]}, "not an object of layer patterns"),
    ({"modules_to_save": ["score"]}, "modules_to_save lists 'score'"),
]


@pytest.mark.parametrize(
    ("fields", "words", "error"),
    [*((*case, AdapterUnsupported) for case in UNSUPPORTED), *((*case, AdapterCorrupt) for case in CORRUPT)],
)
def test_types_and_fields_that_are_not_supported_or_of_a_wrong_kind_are_refused(loha, fields, words, error):
    edit(loha, **fields)
    with pytest.raises(error, match=words):
        Adapter.from_pretrained(loha)


def test_a_pattern_of_nested_repeats_is_run_and_the_rest_read(loha):
    edit(loha, alpha_pattern={"(a+)+$": 2})
    assert Adapter.from_pretrained(loha).rank == 4


def without(tensors, part):
    return {key: value for key, value in tensors.items() if part not in key}


THIN = {
    "w1_a": torch.ones(70_000, 1),
    "w2_a": torch.ones(70_000, 1),
    "w1_b": torch.ones(1, 70_000),
    "w2_b": torch.ones(1, 70_000),
}
CHANGED = {
    "NaN": (lambda held: {key: value * torch.nan for key, value in held.items()}, AdapterCorrupt, "NaN or infinite"),
    "a missing tensor": (
        lambda held: without(held, "first.hada_w2_b"),
        AdapterCorrupt,
        r"'first' lacks the tensor 'hada_w2_b'",
    ),
    "an unknown tensor": (lambda held: {**held, f"{FIRST}3": torch.ones(2)}, AdapterCorrupt, "hada_w3"),
    "another size": (
        lambda held: {**held, f"{FIRST}2_b": torch.ones(2, 11)},
        AdapterCorrupt,
        r"'hada_w2_b' has shape \(2, 11\), not \(1 or more, 12\)",
    ),
    "zeros": (lambda held: {key: value * 0 for key, value in held.items()}, AdapterUnsupported, "without effect"),
    "a huge matrix of a small file": (
        lambda _: {f"base_model.model.first.hada_{name}": tensor for name, tensor in THIN.items()},
        AdapterUnsupported,
        "70000 x 70000",
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_other_tensors_are_refused_by_name(loha, case):
    change, error, words = CHANGED[case]
    edit_tensors(loha, change)
    with pytest.raises(error, match=words):
        Adapter.from_pretrained(loha)


def test_tensors_without_a_value_are_refused_by_name(tmp_path):
    part = "hada_w1_a"
    save(peft.LoHaConfig(r=2, **FREE), tmp_path)
    edit_tensors(tmp_path, lambda held: {key: value[..., :0] if part in key else value for key, value in held.items()})
    with pytest.raises(AdapterCorrupt, match=rf"'{part}\S*' has shape \(.*0\), not \("):
        Adapter.from_pretrained(tmp_path, model=tiny())
    edit_tensors(tmp_path, lambda held: {key: value[:0] if part in key else value for key, value in held.items()})
    with pytest.raises(AdapterCorrupt, match=rf"'{part}\S*' has shape \(0, .*\), not \("):
        Adapter.from_pretrained(tmp_path, model=tiny())


def test_weights_in_a_pickle_are_refused(loha):
    (loha / "adapter_model.safetensors").rename(loha / "adapter_model.bin")
    with pytest.raises(AdapterUnsupported, match="pickle"):
        Adapter.from_pretrained(loha)


@pytest.mark.parametrize(
    ("model", "words"),
    [(odd, r"\(16, 12\).*\(13, 7\)"), (lambda: Tree({"firsts": nn.Linear(12, 16)}), r"'first'.*nearest is 'firsts'")],
)
def test_a_model_of_other_sizes_or_without_the_layer_is_refused(loha, model, words):
    with pytest.raises(LayerMismatch, match=words):
        Adapter.from_pretrained(loha, model=model())


def test_another_base_model_is_refused_where_the_folder_recorded_one(loha):
    (loha / "loraweave.json").write_text(json.dumps({"fingerprint": fingerprint(odd()).to_json()}))
    with pytest.raises(BaseModelMismatch, match="another base model"):
        Adapter.from_pretrained(loha, model=tiny())


def test_heads_next_to_another_type_are_kept(tmp_path):
    model = save(peft.LoHaConfig(r=2, target_modules=["first"], modules_to_save=["last"]), tmp_path)
    adapter = Adapter.from_pretrained(tmp_path)
    assert set(adapter.layers) == {"first"}
    trained = model.base_model.model.last.modules_to_save["default"]
    torch.testing.assert_close(adapter.heads["last.weight"], trained.weight.detach())
    torch.testing.assert_close(adapter.heads["last.bias"], trained.bias.detach())


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)).eval()


@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.AdaLoraConfig])
def test_a_convolution_is_read_as_one_where_the_model_says_so(tmp_path, config):
    options = {"init_r": 2, "total_step": 9} if config is peft.AdaLoraConfig else {"r": 2}
    model = save(config(target_modules=["0", "1"], **options), tmp_path, convolutions())
    own = convolutions()
    adapter = Adapter.from_pretrained(tmp_path, model=own)
    assert {(factors.kind, factors.kernel) for factors in adapter.layers.values()} == {("conv", (3, 3)), ("conv", (1, 1))}
    x = torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        for name, factors in adapter.layers.items():
            own[int(name)].weight += (factors.b_OR @ factors.a_RI).reshape(own[int(name)].weight.shape)
        torch.testing.assert_close(own(x), model(x))


SEED, CONV = {"save_projection": False, **FREE}, {"target_modules": ["0"], "init_weights": False}
ONES = {"target_modules": ["0"], "feedforward_modules": [], "init_ia3_weights": False}
OPTIONS = {
    "vera as a seed": (tiny, lambda: peft.VeraConfig(r=3, **SEED), "save_projection=True"),
    "lokr": (convolutions, lambda: peft.LoKrConfig(r=2, **CONV), "part of the Kronecker product"),
    "loha": (convolutions, lambda: peft.LoHaConfig(r=2, use_effective_conv2d=True, **CONV), "Tucker form"),
    "ia3": (convolutions, lambda: peft.IA3Config(**ONES), "only linear layers"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_and_convolutions_without_a_form_are_refused_by_name(tmp_path, case):
    base, config, words = OPTIONS[case]
    save(config(), tmp_path, base())
    with pytest.raises(AdapterUnsupported, match=words):
        Adapter.from_pretrained(tmp_path, model=base())
