"""A hub with adapters of this extension's formats opens without it, and reading one again names what is missing."""

import json

import peft
import pytest
import torch
from peft_models import FREE, PREFIX, TARGETS, lora, put, save, tiny
from safetensors.torch import save_file
from test_extensions import NAMES, mirror, run

from loraweave.hub.adapter import Adapter
from loraweave.hub.hub import Hub

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def tree(folder):
    """A file or folder by the type that it is of."""
    save(peft.OFTConfig(r=0, oft_block_size=4, **FREE), folder / "oft")
    save(peft.LoraConfig(r=3, target_modules=TARGETS, init_lora_weights="pissa"), folder / "pissa")
    put(folder / "bdlora", lora(), use_bdlora={"target_modules_bd_a": ["x"], "nblocks": 2})
    middle = {f"{PREFIX}model.layers.0.self_attn.q_proj.default_lora_latent_mapping.weight": torch.eye(2)}
    put(folder / "lora_xs", {**lora(), **middle})
    name = "lora_unet_mid_block_attentions_0_proj_in"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 5), f"{name}.lora_up.weight": torch.ones(3, 2)}
    save_file(tensors, folder / "style.safetensors")
    save(peft.LoHaConfig(r=2, **FREE), folder / "loha")
    put(folder / "head", {**lora(), "score.weight": torch.ones(2, 3)}, modules_to_save=["score"])
    torch.save(lora(), put(folder / "pickled", {}) / "adapter_model.bin")
    (folder / "pickled" / "adapter_model.safetensors").unlink()
    return {path.name: str(path) for path in folder.iterdir()}


READ = """
import json, sys
import loraweave as lw
told = {}
with lw.Hub(sys.argv[1]) as hub:
    told["hash"] = hub["turned"].hash
    told["merged"] = lw.merge([hub["turned"], hub["styled"].__class__("x", "", hub["turned"].layers)], progress=False).hash
for name, path in json.loads(sys.argv[2]).items():
    try:
        lw.Adapter.from_pretrained(path, allow_pickle=True)
        told[name] = "read"
    except lw.HubError as error:
        told[name] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


def test_a_hub_opens_without_the_extension_and_reading_an_adapter_again_names_it(tmp_path):
    (tmp_path / "files").mkdir()
    paths = tree(tmp_path / "files")
    with Hub(tmp_path / "hub") as hub:
        hub.add(Adapter.from_pretrained(paths["oft"], model=tiny()), name="turned")
        hub.add(paths["style.safetensors"], name="styled", base_model="a/base")
        expected = hub["turned"].hash
    mirror(tmp_path, [name for name in NAMES if name != "adapter_types"])
    told = json.loads(run(tmp_path, READ, tmp_path / "hub", json.dumps(paths)))
    assert told.pop("hash") == expected
    assert told.pop("merged")
    assert set(told) == set(paths)
    missing = "the extension 'adapter_types', which reads more, is not installed"
    assert {name: text for name, text in told.items() if missing not in text} == {}


PLAIN = """
import json, sys
import loraweave as lw
told = {}
for name, path in json.loads(sys.argv[1]).items():
    adapter = lw.Adapter.from_pretrained(path)
    adapter.save_pretrained(path + " again")
    told[name] = [adapter.hash, lw.Adapter.from_pretrained(path + " again").hash]
try:
    experts = {"m.down_proj.0": lw.Factors(adapter.layers["first"].a_RI, adapter.layers["first"].b_OR, kind="expert")}
    lw.Adapter("x", "", experts).save_pretrained(path + " experts")
except lw.HubError as error:
    told["experts"] = str(error)
print(json.dumps(told))
"""


def test_without_the_extension_lora_and_dora_are_read_and_written_as_before(tmp_path):
    kinds = {"dora": {"use_dora": True}, "lora": {}, "rslora": {"use_rslora": True}, "lora_bias": {"lora_bias": True}}
    paths = {name: str(tmp_path / name) for name in kinds}
    for name, options in kinds.items():
        save(peft.LoraConfig(r=3, target_modules=TARGETS, rank_pattern={"inner.*": 2}, **options), paths[name])
    expected = {name: [Adapter.from_pretrained(path).hash] * 2 for name, path in paths.items()}
    mirror(tmp_path, [])
    told = json.loads(run(tmp_path, PLAIN, json.dumps(paths)))
    assert "'m.down_proj.0' is an expert" in told["experts"]
    wanted = "the extension 'fused_experts', which reads and writes experts in one parameter, is not installed"
    assert told.pop("experts").endswith(wanted)
    assert told == expected


def test_with_the_extension_no_refusal_speaks_of_it(tmp_path):
    put(tmp_path, lora(), peft_type="NEWTYPE")
    with pytest.raises(ValueError, match="no format here reads") as refusal:
        Adapter.from_pretrained(tmp_path)
    assert "adapter_types" not in str(refusal.value)
