"""What the readers of further adapter types refuse: by name, before anything is made of the file."""

import peft
import pytest
import torch
from peft_models import FREE, TARGETS, edit, save, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.conversion import extract
from loraweave.hub.formats._reading import REFUSED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def oft(tmp_path):
    save(peft.OFTConfig(r=0, oft_block_size=4, **FREE), tmp_path)
    return tmp_path


def edit_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, path)


def test_uni_lora_without_its_places_names_the_option_that_keeps_them(tmp_path):
    trained = save(peft.UniLoraConfig(r=2, theta_d_length=40, **FREE), tmp_path)
    with pytest.raises(AdapterUnsupported, match=r"save_indices is false.*save_indices=True.*lw\.extract"):
        Adapter.from_pretrained(tmp_path)
    # the way out that the message names
    assert extract(tiny(), trained.merge_and_unload()).rank == 2
    edit(tmp_path, save_indices=True)
    with pytest.raises(AdapterCorrupt, match="no layer of a UNILORA adapter"):
        Adapter.from_pretrained(tmp_path)


def test_a_rank_and_an_error_that_contradict_are_both_named(oft):
    with pytest.raises(AdapterUnsupported, match=r"'first'.*rank 2 leaves.*max_error=0\.01.*rank 1\d would.*allow rank 2"):
        Adapter.from_pretrained(oft, model=tiny(), rank=2, max_error=0.01)


def test_the_error_that_the_message_suggests_is_enough(oft):
    error = 1e-3
    for _ in TARGETS:
        try:
            Adapter.from_pretrained(oft, model=tiny(), rank=2, max_error=error)
            break
        except AdapterUnsupported as refusal:
            error = float(str(refusal).split(", and max_error=")[1].split()[0])
    assert Adapter.from_pretrained(oft, model=tiny(), rank=2, max_error=error).rank == 2


def test_every_type_of_the_installed_peft_is_read_or_refused_with_a_reason():
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from loraweave import registry

    read = {name.upper() for name in registry.names("formats")}
    assert {kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING} - read - set(REFUSED) == {"LORA"}


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (peft.GraloraConfig(r=4, gralora_k=2, **FREE), "gralora_A"),
        (peft.MissConfig(r=2, **FREE), "miss_block"),
    ],
    ids=lambda value: getattr(value, "peft_type", value),
)
def test_tensors_without_a_value_are_refused_by_name(tmp_path, config, part):
    save(config, tmp_path)
    edit_tensors(tmp_path, lambda held: {key: value[..., :0] if part in key else value for key, value in held.items()})
    with pytest.raises(AdapterCorrupt, match=rf"'{part}\S*' has shape \(.*0\), not \("):
        Adapter.from_pretrained(tmp_path, model=tiny())
    edit_tensors(tmp_path, lambda held: {key: value[:0] if part in key else value for key, value in held.items()})
    with pytest.raises(AdapterCorrupt, match=rf"'{part}\S*' has shape \(0, .*\), not \("):
        Adapter.from_pretrained(tmp_path, model=tiny())


def test_weights_on_the_meta_device_are_refused_where_values_are_needed(oft):
    with pytest.raises(AdapterUnsupported, match="values are needed"):
        Adapter.from_pretrained(oft, model=tiny().to("meta"))


def test_places_outside_the_matrix_are_refused(tmp_path):
    save(peft.ShiraConfig(r=1, **FREE), tmp_path)
    edit_tensors(tmp_path, lambda held: {key: value + 100 if "indices" in key else value for key, value in held.items()})
    with pytest.raises(AdapterCorrupt, match="places outside"):
        Adapter.from_pretrained(tmp_path, model=tiny())


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 4, 1)).eval()


SEED, CONV = {"save_projection": False, **FREE}, {"target_modules": ["0"], "init_weights": False}
OPTIONS = {
    "randlora as a seed": (tiny, lambda: peft.RandLoraConfig(r=3, **SEED), "save_projection=True"),
    "a wavelet without a filter": (tiny, lambda: peft.WaveFTConfig(n_frequency=9, wavelet_family="sym2", **FREE), "sym2"),
    "a sampling pvera": (tiny, lambda: peft.PveraConfig(r=4, sample_at_inference=True, **FREE), "sample_at_inference"),
    "hira": (convolutions, lambda: peft.HiraConfig(r=2, **CONV), "only linear layers"),
    "oft": (
        convolutions,
        lambda: peft.OFTConfig(r=3, oft_block_size=0, **CONV | {"target_modules": ["1"]}),
        "only linear layers",
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_and_convolutions_without_a_form_are_refused_by_name(tmp_path, case):
    base, config, words = OPTIONS[case]
    save(config(), tmp_path, base())
    with pytest.raises(AdapterUnsupported, match=words):
        Adapter.from_pretrained(tmp_path, model=base())
