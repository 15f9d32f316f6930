"""Every config found in public repositories: what PEFT makes of it is what comes in, or the reason why not is named.

The configs lie beside the repository, since their licences are their authors'. PEFT trains each on a tree of linear layers
with the names that it targets; the file that it saves is read beside the config as it was found.
"""

import copy
import json
import re
import shutil
import warnings
from collections import Counter
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import pytest
import torch
from peft_models import Tree, save
from safetensors.torch import save_file
from torch import nn
from transformers import SamConfig, SamModel
from transformers.pytorch_utils import Conv1D

from loraweave.errors import AdapterCorrupt, AdapterUnsupported
from loraweave.hub.adapter import Adapter
from loraweave.hub.formats._reading import REFUSED
from loraweave.lowrank import algebra

ROOT = Path(__file__).parents[3]
SHARED = ROOT.parent / "shared" / "data"
CONFIGS = sorted((SHARED / "real_configs").glob("[0-9]*.json"))
pytestmark = [
    pytest.mark.skipif(not CONFIGS, reason="the folder of real configs is not beside the repository"),
    # PEFT's SHiRA multiplies by a sparse matrix
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
]

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MAX_ERROR = 1e-4


def tree(layers, model_type):
    base = Tree(layers).eval()
    base.config = {"model_type": model_type}
    return base


def base_of(fields):
    """Two layers of linear modules by the names that the config targets, those of Llama where it names none."""
    torch.manual_seed(0)
    size = next((fields[name] for name in ("vector_length", "block_size") if isinstance(fields.get(name), int)), 64)
    # KaSA takes singular values of the base away, so there must be more of them
    size = max(size, 2 * fields["r"]) if fields.get("kasa_config") else size
    targets = fields.get("target_modules") or LLAMA
    paths = [name if "layers." in name else f"model.layers.{n}.{name}" for n in range(2) for name in targets]
    paths += fields.get("modules_to_save") or []
    return tree({path: nn.Linear(size, 2 * size) for path in dict.fromkeys(paths)}, "llama")


def trained(base, folder):
    """PEFT's model of the config in the folder with random values, saved there."""
    config = peft.PeftConfig.from_pretrained(folder)
    # what a task adds to a model, and where the base came from, do not change the layers
    config.task_type, config.base_model_name_or_path, config.revision, config.inference_mode = None, None, None, False
    return save(config, folder, copy.deepcopy(base), scale=0.1).base_model.model


def by_mlx(base, settings, folder):
    """The base with the updates that MLX adds, after saving them as MLX does: y = W x + s (x a) b."""
    model, stored = copy.deepcopy(base), {}
    scale = settings["scale"] * settings.get("alpha", settings["rank"]) / settings["rank"]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            a, b = torch.randn(layer.in_features, settings["rank"]), torch.randn(settings["rank"], layer.out_features)
            stored |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
            layer.weight.data += scale * (a @ b).T
    save_file(stored, folder / "adapters.safetensors")
    return model


def largest_gap(adapter, base, model):
    """The largest difference of a layer's output from PEFT's, relative to the largest change that PEFT makes there."""
    worst = 0.0
    for path, stored in adapter.layers.items():
        layer = base.get_submodule(path)
        wide = layer.nx if isinstance(layer, Conv1D) else layer.in_features
        x = torch.randn(5, wide, dtype=layer.weight.dtype, generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            before, after = layer(x), model.get_submodule(path)(x)
            weight = layer.weight.T if isinstance(layer, Conv1D) else layer.weight
            factors = algebra.bind(stored, weight, layer.bias)
            change = x @ factors.a_RI.T.to(x.dtype) @ factors.b_OR.T.to(x.dtype)
            if factors.gain_O is not None:
                change = change + factors.gain_O * (before - layer.bias)
            if factors.bias_O is not None:
                change = change + factors.bias_O
        worst = max(worst, float((after - before - change).abs().max() / (after - before).abs().max()))
    return worst


@cache
def outcome(path):
    """(adapter, gap) of a config that comes in, (None, error) of one that is refused."""
    fields = json.loads(path.read_text(encoding="utf-8"))
    base, kind = base_of(fields), fields.get("peft_type")
    with TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(path, folder / "adapter_config.json")
        model = None
        if "lora_parameters" in fields:
            model = by_mlx(base, fields["lora_parameters"], folder)
        if kind is not None and kind not in REFUSED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = trained(base, folder)
        shutil.copyfile(path, folder / "adapter_config.json")
        try:
            adapter = Adapter.from_pretrained(folder, model=base, max_error=MAX_ERROR)
        except (AdapterCorrupt, AdapterUnsupported) as error:
            return None, error
        return adapter, largest_gap(adapter, base, model)


def kind_of(path):
    fields = json.loads(path.read_text(encoding="utf-8"))
    if fields.get("peft_type") is None:
        return "`lora_parameters` of MLX" if "lora_parameters" in fields else "not an adapter config"
    return "`LORA`" if fields["peft_type"] == "LORA" else "other types of PEFT"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_comes_in_with_the_meaning_that_peft_gives_it_or_is_refused_with_the_reason(path):
    fields = json.loads(path.read_text(encoding="utf-8"))
    adapter, found = outcome(path)
    if adapter is None:
        named = REFUSED[fields["peft_type"]] if "peft_type" in fields else "peft_type"
        assert named in str(found)
        return
    # what is cut to a rank is cut to that error, and PEFT takes KaSA's singular values in fp32
    exact = kind_of(path) != "other types of PEFT" and not fields.get("kasa_config")
    assert found < (1e-6 if exact else 3 * MAX_ERROR)
    assert adapter.base_model == (fields.get("base_model_name_or_path") or fields.get("model") or "")
    targets = fields.get("target_modules") or ("q_proj", "v_proj", *LLAMA)
    assert all(any(layer.endswith(target) for target in targets) for layer in adapter.layers)
    saved = fields.get("modules_to_save") or []
    assert {head.split(".")[0] for head in adapter.heads} == set(saved)


def test_the_page_has_the_counts_of_what_comes_in_and_what_is_refused():
    page = (ROOT / "docs" / "extensions" / "adapter_types.md").read_text(encoding="utf-8")
    section = page.split("## Configs found in public repositories")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \| (\d+) \| (\d+) \| (\d+)\b", section, re.MULTILINE)
    found, read = Counter(map(kind_of, CONFIGS)), Counter(kind_of(path) for path in CONFIGS if outcome(path)[0] is not None)
    assert {row[0]: tuple(map(int, row[1:])) for row in rows} == {
        kind: (number, read[kind], number - read[kind]) for kind, number in found.items()
    }


@pytest.mark.parametrize("name", ["gpt2_legal", "gpt2_medical", "gpt2_sports"])
def test_a_real_adapter_computes_what_peft_computes_with_it_and_is_written_as_it_is(name, tmp_path):
    folder = SHARED / "real_adapters" / name
    adapter = Adapter.from_pretrained(folder)
    assert Adapter.from_pretrained(adapter.save_pretrained(tmp_path / "again")).hash == adapter.hash
    torch.manual_seed(0)
    shapes = {path: (factors.b_OR.shape[0], factors.a_RI.shape[1]) for path, factors in adapter.layers.items()}
    base = tree({path: Conv1D(*shape) for path, shape in shapes.items()}, "gpt2")
    config = peft.PeftConfig.from_pretrained(folder)
    config.task_type = config.base_model_name_or_path = None
    model = peft.get_peft_model(copy.deepcopy(base), config)
    state = peft.utils.load_peft_weights(folder, device="cpu")
    loaded = peft.set_peft_model_state_dict(model, state)
    assert loaded.unexpected_keys == []
    # in float64, since these changes are small beside what a random base puts out
    assert largest_gap(adapter, base.double(), model.double().eval().base_model.model) < 1e-6


@pytest.mark.parametrize("rank", [2, 4, 8])
def test_a_real_sam_file_opens_with_its_model_and_is_refused_without(rank):
    folder = SHARED / "real_adapters" / f"sam_vitb_rank{rank}"
    with pytest.raises(AdapterUnsupported, match="w_a_000 and so on name no layer; give the Segment Anything model"):
        Adapter.from_pretrained(folder)
    with torch.device("meta"):
        model = SamModel(SamConfig())
    opened = Adapter.from_pretrained(folder, model=model)
    assert list(opened.layers) == [f"vision_encoder.layers.{number}.attn.qkv" for number in range(12)]
    # of the rank for each of query and value
    assert opened.rank == 2 * rank


def test_a_real_git_lfs_pointer_is_named_as_one():
    with pytest.raises(AdapterCorrupt, match="git-LFS pointer of 131 bytes"):
        Adapter.from_pretrained(SHARED / "real_adapters" / "broken" / "esm2_lfs_pointer")
