"""An expert model as a folder: whole, checked, and refused by name where it is something else."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import loraweave as lw
from loraweave.errors import AdapterCorrupt, AdapterNotFound, AdapterUnsupported, BaseModelMismatch, WeightingError

OPTIONS = {"num_experts": (2, 3), "rank": 2, "target_modules": ("q_proj", "down_proj")}


@pytest.fixture
def saved(make_model, tmp_path):
    with lw.experts("mola", make_model("llama"), **OPTIONS) as made:
        return made.save_pretrained(tmp_path / "saved")


def _edited(folder, **changes):
    file = folder / "experts.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _with_tensors(folder, change):
    import hashlib

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    _edited(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def test_the_folder_has_recipe_options_tasks_and_ranks(saved):
    found = json.loads((saved / "experts.json").read_text())
    assert found["recipe"] == "mola"
    assert found["options"]["num_experts"] == [2, 3]
    assert found["options"]["tasks"] == []
    assert found["sites"]["model.layers.1.mlp.down_proj"]["ranks"] == [2, 2, 2]
    assert sorted(path.name for path in saved.iterdir()) == ["experts.json", "model.safetensors"]


def test_a_folder_that_holds_something_else_is_left_alone(make_model, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with lw.experts("mola", make_model("llama"), **OPTIONS) as made:
        with pytest.raises(WeightingError, match="holds something that is not an expert model"):
            made.save_pretrained(tmp_path)
        assert (tmp_path / "thesis.txt").read_text() == "years of work"
        made.save_pretrained(tmp_path / "new")
        assert made.save_pretrained(tmp_path / "new") == tmp_path / "new"


def test_another_base_is_refused(saved, make_model):
    model = make_model("llama", num_hidden_layers=3)
    with pytest.raises(BaseModelMismatch, match="were trained on another base model"):
        lw.experts(saved, model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_options_beside_a_folder_are_refused(saved, make_model):
    with pytest.raises(WeightingError, match="has options of its own; rank cannot be given again"):
        lw.experts(str(saved), make_model("llama"), rank=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1}, "with top_k 2, but this model has 1"),
        ({"num_experts": (2, 4)}, r"with num_experts \[2, 3\], but this model has \[2, 4\]"),
    ],
)
def test_other_options_are_named_and_change_nothing(saved, make_model, options, message):
    with lw.experts("mola", make_model("llama"), **{**OPTIONS, **options}) as made:
        before = {name: value.clone() for name, value in made.expert_state().items()}
        with pytest.raises(WeightingError, match=message):
            made.load(saved)
        assert all(torch.equal(value, before[name]) for name, value in made.expert_state().items())


def test_a_folder_without_experts_says_what_it_holds(make_model, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterNotFound, match=r"it has no experts.json, and holds adapter_config.json"):
        lw.experts(tmp_path, make_model("llama"))


def test_a_newer_format_is_refused(saved, make_model):
    _edited(saved, format=3)
    with pytest.raises(AdapterUnsupported, match="format 3, which a newer version of loraweave wrote"):
        lw.experts(saved, make_model("llama"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": {"model.layers.0.self_attn.q_proj": {"ranks": [-1]}}}, r"ranks \(-1,\) are not whole numbers"),
        ({"sites": {"model.layers.0.self_attn.q_proj": {"ranks": [10**12]}}}, "asks for|is in"),
        ({"fingerprint": None}, "damaged"),
        ({"format": "1"}, "its format is '1'"),
        ({"sha256": "0" * 64}, "says 000000000000"),
    ],
)
def test_a_damaged_description_is_refused(saved, make_model, changes, message):
    _edited(saved, **changes)
    with pytest.raises(AdapterCorrupt, match=message):
        lw.experts(saved, make_model("llama"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.popitem(), "is missing from"),
        (lambda tensors: tensors.update(more=torch.zeros(3)), "'more' is in"),
        (lambda tensors: next(iter(tensors.values())).fill_(float("nan")), "that are not finite"),
        (lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(1, 1)}), r"with shape \(1, 1\), but"),
    ],
)
def test_tensors_that_are_not_the_recipes_are_refused(saved, make_model, change, message):
    _with_tensors(saved, change)
    with pytest.raises(AdapterCorrupt, match=message):
        lw.experts(saved, make_model("llama"))


def test_a_file_that_was_cut_off_is_refused(saved, make_model):
    file = saved / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    with pytest.raises(AdapterCorrupt, match="not an intact safetensors file"):
        lw.experts(saved, make_model("llama"))


def test_a_model_that_is_named_like_a_folder_is_the_recipe(make_model, saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    shutil.copytree(saved, "mola")
    with lw.experts("mola", make_model("llama", num_hidden_layers=4)) as made:
        assert made.recipe.num_experts == (2, 4, 6, 8)


def test_what_is_no_path_or_cannot_be_written_is_refused_by_name(make_model, tmp_path):
    with lw.experts("mola", make_model("llama"), **OPTIONS) as made:
        with pytest.raises(WeightingError, match="the folder to save an expert model in is None; give its path"):
            made.save_pretrained(None)
        (tmp_path / "file").write_text("kept")
        with pytest.raises(WeightingError, match=r"cannot be written .*: name another folder"):
            made.save_pretrained(tmp_path / "file" / "below")
        with pytest.raises(AdapterNotFound, match=r"the folder that save_pretrained\(\) wrote an expert model to is None"):
            made.load(None)
