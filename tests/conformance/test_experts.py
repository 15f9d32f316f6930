"""What every recipe of trainable experts promises: one case for each file of composer/experts."""

import copy
import json
import sys
import warnings

import pytest
import torch
from properties import Properties
from torch.nn.functional import cross_entropy

import loraweave as lw
from loraweave import registry
from loraweave.composer.experts.parts import make_recipe
from loraweave.composer.live.kernels._parts import kernels_with
from loraweave.errors import WeightingError

RECIPES = lw.names("experts")
# options that a recipe needs beside its defaults, on a model of two blocks with 16 features
TASKS = ("sums", "colours")
OPTIONS = {
    "mixture_of_loras": {"tasks": TASKS},
    "mola": {"num_experts": (2, 4)},
    "mocle": {"by_task": True, "tasks": TASKS},
    "mlore": {
        "ranks": (1, 3, 2),
        "top_k": 2,
        "rank": 2,
        "target_modules": ("stages.0.patch_embeddings.proj", "linear_fuse"),
    },
    "mtlora": {"tasks": TASKS, "rank": 3, "task_rank": 2},
    # a language model has no head for rewards
    "reward_ensemble": {"tasks": TASKS, "target_modules": ("q_proj", "down_proj")},
    "dmoerm": {"tasks": TASKS, "target_modules": ("q_proj", "down_proj")},
}
# recipes for dense prediction, on images
VISION = [name for name in RECIPES if "images" in registry.traits_of(registry.get("experts", name))]
TEXT = [name for name in RECIPES if name not in VISION]
PROPERTIES = Properties(RECIPES)


def built(name, model, **more):
    made = make_recipe(name, OPTIONS.get(name, {}))
    tasks = {"tasks": TASKS} if made.needs_tasks and "tasks" not in OPTIONS.get(name, {}) else {}
    return lw.experts(name, model, **{**OPTIONS.get(name, {}), **tasks, **more})


def kind_of(name):
    return "segformer" if name in VISION else "llama"


@PROPERTIES.given
def experts(name, make_model):
    with built(name, make_model(kind_of(name), dtype=torch.float64)) as experts:
        yield experts


@PROPERTIES.given
def trained(experts):
    """With values that differ from those at the beginning everywhere."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts.expert_parameters().values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return experts


def batch(rows, *, length=9):
    """Rows of real tokens, padded on the left."""
    ids_BT = torch.zeros(len(rows), length, dtype=torch.long)
    mask_BT = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        ids_BT[number, length - len(row) :] = torch.tensor(row)
        mask_BT[number, length - len(row) :] = 1
    positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "position_ids": positions_BT}


def images(rows):
    """An image of 16 by 12 pixels for each row."""
    return {"pixel_values": torch.stack([torch.sin(torch.arange(576.0) * row[0]).view(3, 16, 12) for row in rows])}


def inputs_for(name, rows, dtype=torch.float64, **settings):
    """The rows as what the recipe's model takes."""
    return {"pixel_values": images(rows)["pixel_values"].to(dtype)} if name in VISION else batch(rows, **settings)


def labels_for(name, inputs):
    if name in VISION:
        return (inputs["pixel_values"][:, 0, ::2, ::2] > 0).long()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :-3] = -100
    return labels


def tasks_of(experts, *ids):
    return {"task": list(ids)} if experts.recipe.needs_tasks else {}


ROWS = ([3, 9, 27, 20, 60, 58], [5, 25, 3, 15], [11, 7, 44, 19, 8, 21, 33])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_keeps_all_properties(name, request, make_model):
    PROPERTIES.walk(request, name, make_model=make_model)


@PROPERTIES.add()
def before_training_it_is_the_base(name, make_model):
    model = make_model(kind_of(name))
    inputs = inputs_for(name, ROWS, torch.float32)
    base = model(**inputs).logits
    with built(name, model) as experts:
        torch.testing.assert_close(experts(**inputs, **tasks_of(experts, 0, 1, 0)).logits, base, rtol=1e-5, atol=1e-5)


@PROPERTIES.add()
def the_base_called_itself_is_as_it_was_and_stays_so(name, trained):
    inputs, before = inputs_for(name, ROWS), copy.deepcopy(trained.base_model.state_dict())
    assert not torch.equal(
        trained(**inputs, **tasks_of(trained, 0, 1, 0)).logits, base := trained.base_model(**inputs).logits
    )
    trained.close()
    after = trained.base_model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.requires_grad for parameter in trained.base_model.parameters())
    # on some processors PyTorch rounds otherwise where weights have gradients
    trained.base_model.requires_grad_(False)
    assert torch.equal(trained.base_model(**inputs).logits, base)


@PROPERTIES.add()
def a_row_depends_on_no_other_row_and_no_padding(name, trained):
    together = trained(**inputs_for(name, ROWS), **tasks_of(trained, 0, 1, 0)).logits
    for number, row in enumerate(ROWS):
        alone = trained(**inputs_for(name, [row], length=len(row)), **tasks_of(trained, (0, 1, 0)[number])).logits
        torch.testing.assert_close(together[number, -alone.shape[1] :], alone[0], rtol=1e-8, atol=1e-8)


@PROPERTIES.add(of=TEXT)
def gradients_of_a_padded_batch_are_the_sum_of_those_of_its_rows(trained):
    def add_gradients(rows, tasks, length):
        inputs = batch(rows, length=length)
        labels = labels_for("", inputs)
        logits_BTV = trained(**inputs, labels=labels, **tasks_of(trained, *tasks)).logits
        cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").backward()

    def gradients():
        found = {key: value.grad for key, value in trained.expert_parameters().items() if value.grad is not None}
        trained.zero_grad()
        return found

    add_gradients(ROWS, (0, 1, 0), 9)
    together = gradients()
    for row, task in zip(ROWS, (0, 1, 0), strict=True):
        add_gradients([row], (task,), len(row))
    torch.testing.assert_close(together, gradients(), rtol=1e-7, atol=1e-9)
    assert any(gradient.any() for gradient in together.values())


@PROPERTIES.add(of=TEXT)
def generation_with_a_cache_is_generation_without(trained):
    inputs = {key: value for key, value in batch(ROWS).items() if key != "position_ids"}
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tasks = tasks_of(trained, 1, 0, 1)
    cached = trained.generate(**inputs, **tasks, **settings, use_cache=True)
    assert torch.equal(cached, trained.generate(**inputs, **tasks, **settings, use_cache=False))


@PROPERTIES.add(of=TEXT)
def generation_of_beams_is_that_of_each_row_alone(trained):
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": 2, "eos_token_id": None, "pad_token_id": 0}
    inputs = {key: value for key, value in batch(ROWS).items() if key != "position_ids"}
    together = trained.generate(**inputs, **tasks_of(trained, 1, 0, 1), **settings)
    for number, row in enumerate(ROWS):
        alone = batch([row], length=len(row))
        del alone["position_ids"]
        answer = trained.generate(**alone, **tasks_of(trained, (1, 0, 1)[number]), **settings)
        assert torch.equal(together[number, -4:], answer[0, -4:])


@PROPERTIES.add()
def after_one_step_all_that_learns_has_a_gradient(name, experts):
    inputs = inputs_for(name, ROWS)
    inputs["labels"] = labels_for(name, inputs)
    optimizer = torch.optim.SGD(experts.expert_parameters().values(), lr=0.5)
    experts.train()
    for _ in range(2):
        optimizer.zero_grad()
        experts(**inputs, **tasks_of(experts, 0, 1, 0)).loss.backward()
        optimizer.step()
    silent = [key for key, value in experts.expert_parameters().items() if value.requires_grad and not _learns(value)]
    # an expert that no token of these three rows chose has none, and shares its tensor with one that has
    assert not silent
    assert all(parameter.grad is None for parameter in experts.base_model.parameters())


def _learns(parameter):
    return parameter.grad is not None and bool(parameter.grad.any())


@PROPERTIES.add()
def tokens_sorted_by_expert_have_the_values_and_gradients_of_all_experts_for_all(name, trained, monkeypatch):
    inputs = inputs_for(name, ROWS)
    inputs["labels"] = labels_for(name, inputs)
    found = []
    for pays in (True, False):
        for kernel in kernels_with("add_experts").values():
            monkeypatch.setattr(sys.modules[kernel.__module__], "choosing_pays", lambda work, learns, pays=pays: pays)
        trained.zero_grad()
        output = trained(**inputs, **tasks_of(trained, 0, 1, 0))
        output.loss.backward()
        gradients = {key: value.grad for key, value in trained.expert_parameters().items() if value.grad is not None}
        found.append((output.logits, gradients))
    torch.testing.assert_close(*found)


@PROPERTIES.add()
def its_values_are_determined_by_its_seed(name, make_model):
    first, again, other = (built(name, make_model(kind_of(name)), seed=seed).expert_state() for seed in (3, 3, 4))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@PROPERTIES.add()
def its_options_are_json(experts, name):
    again = make_recipe(name, json.loads(json.dumps(experts.recipe.options)))
    assert again == experts.recipe


@PROPERTIES.add()
def an_unknown_option_is_refused_by_name(name, make_model):
    with pytest.raises(WeightingError, match="did you mean 'dropout'"):
        built(name, make_model(kind_of(name)), dropuot=0.1)


@PROPERTIES.add()
def evaluation_answers_alike_every_time(name, trained):
    inputs = inputs_for(name, ROWS)
    first = trained(**inputs, **tasks_of(trained, 0, 1, 0)).logits
    assert torch.equal(trained(**inputs, **tasks_of(trained, 0, 1, 0)).logits, first)


@PROPERTIES.add()
def a_copy_has_the_experts_and_goes_its_own_way(name, trained):
    inputs, tasks = inputs_for(name, ROWS), tasks_of(trained, 0, 1, 0)
    before = trained(**inputs, **tasks).logits
    copied = copy.deepcopy(trained)
    assert torch.equal(copied(**inputs, **tasks).logits, before)
    with torch.no_grad():
        for parameter in copied.expert_parameters().values():
            parameter.zero_()
    assert torch.equal(trained(**inputs, **tasks).logits, before)
    base = copy.deepcopy(trained.base_model)
    assert torch.equal(base(**inputs).logits, trained.base_model(**inputs).logits)


@PROPERTIES.add()
def what_was_saved_answers_alike_bit_for_bit(trained, name, make_model, tmp_path):
    inputs, tasks = inputs_for(name, ROWS), tasks_of(trained, 0, 1, 0)
    expected = trained(**inputs, **tasks).logits
    trained.save_pretrained(tmp_path / "saved")
    with lw.experts(tmp_path / "saved", make_model(kind_of(name), dtype=torch.float64)) as again:
        assert again.recipe == trained.recipe
        assert torch.equal(again(**inputs, **tasks).logits, expected)
    with built(name, make_model(kind_of(name), dtype=torch.float64)) as other:
        assert torch.equal(other.load(tmp_path / "saved")(**inputs, **tasks).logits, expected)


@PROPERTIES.add(of=TEXT)
def blocks_that_run_again_in_the_backward_pass_have_the_same_gradients(name, trained):
    warnings.filterwarnings("ignore", ".*gradient_checkpointing.*", FutureWarning)
    inputs, found = batch(ROWS), []
    inputs["labels"] = labels_for(name, inputs)
    trained.train()
    for _ in range(2):
        trained.zero_grad()
        torch.manual_seed(0)
        trained(**inputs, **tasks_of(trained, 0, 1, 0), use_cache=False).loss.backward()
        found.append({key: value.grad for key, value in trained.expert_parameters().items()})
        trained.gradient_checkpointing_enable()
    assert any(bool(gradient.any()) for gradient in found[0].values() if gradient is not None)
    for key, gradient in found[0].items():
        torch.testing.assert_close(found[1][key], gradient, rtol=0, atol=0)


@PROPERTIES.add()
def an_option_of_another_type_is_refused_by_name(name, make_model):
    with pytest.raises(WeightingError, match=f"recipe '{name}' got dropout='much'; it takes a finite number"):
        built(name, make_model(kind_of(name)), dropout="much")


@PROPERTIES.add()
def a_base_stays_frozen_until_the_last_recipe_has_left_it(name, make_model):
    model = make_model(kind_of(name))
    first, second = built(name, model), built(name, model)
    first.close()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    second.close()
    assert all(parameter.requires_grad for parameter in model.parameters())


@PROPERTIES.add(of=TEXT)
def fit_reaches_all_that_learns_and_lowers_the_loss(name, make_model):
    rows = [
        {"input_ids": [*row, 5 + number, 6], "labels": [-100] * len(row) + [5 + number, 6], "task": TASKS[number % 2]}
        for number, row in enumerate(ROWS * 2)
    ]
    with built(name, make_model("llama")) as experts:
        experts.fit(rows, steps=12, batch_size=6, warmup=0, lr=0.02, evaluation=rows, evaluate_every=12, progress=False)
        (_, before), *_, (_, after) = experts.training_report.evaluations
        assert after < before
