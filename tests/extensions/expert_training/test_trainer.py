"""Training of experts and gates: the loss it lowers, what it leaves alone, what it refuses, and what capacity takes away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional
from transformers import TrainerCallback

import loraweave as lw
from loraweave.errors import InvalidTask, TrainingError, UnknownName

# a recipe's experts stay in the model
pytestmark = pytest.mark.own_models

OPTIONS = {"num_experts": (2, 3), "rank": 2, "target_modules": ("q_proj", "down_proj")}
SETTINGS = {"steps": 3, "batch_size": 4, "warmup": 0, "progress": False}
ROWS = [
    {"input_ids": [3 + i, *[9] * (1 + i % 3), 5 + i, 6], "labels": [-100, *[-100] * (1 + i % 3), 5 + i, 6]} for i in range(7)
]
TASKS = {"sums": [("1 2", "3"), ("2 2", "4"), ("3 4", "7")], "capitals": [("france", "paris"), ("italy", "rome")]}


def state(made):
    return {name: value.clone() for name, value in made.expert_state().items()}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_first_loss_is_the_mean_over_the_target_tokens_of_the_step(model):
    made = lw.experts("mola", model, **OPTIONS).fit(ROWS[:4], **{**SETTINGS, "steps": 1})
    losses = []
    for row in ROWS[:4]:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        for place, label in enumerate(row["labels"]):
            if label != -100:
                losses.append(-functional.log_softmax(logits[place - 1], dim=0)[label])
    assert made.training_report.losses[0] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_the_loss_of_the_rows_held_out_falls_and_the_best_parameters_are_kept(model):
    made = lw.experts("mola", model, **OPTIONS)
    made.fit(ROWS, **{**SETTINGS, "steps": 30, "lr": 0.03}, evaluation=ROWS, evaluate_every=10)
    found = dict(made.training_report.evaluations)
    assert found[30] < 0.8 * found[0]
    assert found[made.training_report.kept] == min(found.values())
    assert not made.training


def test_terms_of_the_recipe_count_in_the_loss(model):
    plain, with_terms = ({**OPTIONS, "balance": balance} for balance in (0.0, 50.0))
    first = lw.experts("mola", model, **plain).fit(ROWS, **SETTINGS)
    second = lw.experts("mola", model, **with_terms).fit(ROWS, **SETTINGS)
    assert first.training_report.terms == {}
    # k times the coefficient where all experts are alike
    assert second.training_report.terms["balance"][0] == pytest.approx(100.0, rel=0.1)
    assert any(not torch.equal(value, second.expert_state()[name]) for name, value in first.expert_state().items())


def test_passes_of_a_step_add_up_to_its_gradient(make_model):
    settings = {**SETTINGS, "batch_size": 6, "clip": None}
    made = []
    for passes in (None, 3):
        model = make_model("llama", dtype=torch.float64)
        # a term of whole passes is another with other passes
        made.append(lw.experts("mola", model, **OPTIONS, balance=0.0).fit(ROWS, **settings, gradient_accumulation=passes))
    assert made[1].training_report.losses == pytest.approx(made[0].training_report.losses, rel=1e-4)
    # transformers takes logits in fp32 to their loss, and AdamW divides small gradients by themselves
    for name, value in made[0].expert_state().items():
        torch.testing.assert_close(made[1].expert_state()[name], value, rtol=1e-3, atol=1e-5)


def test_the_base_and_the_callers_random_numbers_are_as_they_were(model):
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    use_cache = model.config.use_cache
    with lw.experts("mola", model, **OPTIONS) as made:
        model.train()
        made.fit(ROWS, **SETTINGS)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert model.config.use_cache == use_cache


def test_names_of_the_dataset_become_the_tasks_of_a_recipe_without_any(model, tokenizer):
    made = lw.experts("mola", model, **OPTIONS, tokenizer=tokenizer)
    made.fit(TASKS, **SETTINGS, evaluation={"capitals": [("spain", "madrid")]})
    assert made.tasks == ("sums", "capitals")
    with pytest.raises(UnknownName, match=r"evaluation\['capital'\].* no task 'capital', did you mean 'capitals'"):
        lw.experts("moelora", model, rank=8, tasks=("sums", "capitals")).fit(
            TASKS, tokenizer, **SETTINGS, evaluation={"capital": [("spain", "madrid")]}
        )


def test_rows_are_trained_with_their_own_task(model, tokenizer):
    made = lw.experts("moelora", model, rank=8, tasks=("sums", "capitals", "never")).fit(TASKS, tokenizer, **SETTINGS)
    gate = next(iter(made.gates.values()))
    fresh = next(iter(lw.experts("moelora", model, rank=8, tasks=("sums", "capitals", "never")).gates.values()))
    (name,) = (name for name, value in gate.named_parameters() if value.shape[0] == 3)
    changed = (gate.get_parameter(name) != fresh.get_parameter(name)).any(dim=1)
    assert changed.tolist() == [True, True, False]


NAMED = {"moelora": {"rank": 8, "tasks": ("sums", "capitals")}}


@pytest.mark.parametrize(
    ("recipe", "rows", "error", "said"),
    [
        ("mola", [{"input": "a", "label": "b"}], InvalidTask, "no 'target'"),
        ("mola", [{"input_ids": [3, 4]}], InvalidTask, "no 'labels'"),
        ("mola", [("a", "b")], InvalidTask, "no tokenizer is known"),
        ("mola", [], InvalidTask, "dataset is empty"),
        ("mola", {"train": ROWS}, InvalidTask, "no tasks, but perhaps splits"),
        ("mola", [{**ROWS[0], "task": 0}], UnknownName, "row 1 of dataset: recipe 'mola' has no task 0: tasks are told by"),
        ("moelora", ROWS, InvalidTask, "whose task it is, which recipe 'moelora' learns from: give it a 'task'"),
        (
            "moelora",
            {"sum": ROWS, "capitals": ROWS},
            UnknownName,
            r"dataset\['sum'\]: .* no task 'sum', did you mean 'sums'",
        ),
    ],
)
def test_data_that_cannot_be_used_is_refused_by_name(model, recipe, rows, error, said):
    with pytest.raises(error, match=said):
        lw.experts(recipe, model, **NAMED.get(recipe, OPTIONS)).fit(rows, **SETTINGS)


def test_rows_that_do_not_divide_among_passes_are_refused_and_their_tasks_not_taken(model):
    made = lw.experts("moelora", model)
    before = state(made)
    rows = [{**row, "task": ("sums", "capitals")[place % 2]} for place, row in enumerate(ROWS)]
    with pytest.raises(TrainingError, match=r"batch_size is 4, which does not divide by 3 passes .* take a multiple of 3"):
        made.fit(rows, **SETTINGS, gradient_accumulation=3)
    assert made.tasks == ()
    assert_same_bits(state(made), before)


def test_a_parameter_without_a_gradient_is_named_and_all_is_put_back(model):
    made = lw.experts("mola", model, **OPTIONS)
    name = next(name for name in made.expert_parameters() if name.endswith("b_SO"))
    made.expert_parameters()[name].register_hook(torch.zeros_like)
    before = state(made)
    with pytest.raises(
        TrainingError, match=rf"after 0 steps; 1 parameters of recipe 'mola' had no gradient after 1 steps: {name}"
    ):
        made.fit(ROWS, **SETTINGS)
    assert_same_bits(state(made), before)


def test_a_gate_without_a_gradient_is_named_once_an_expert_was_met_again(model):
    def fitted(**settings):
        made = lw.experts("mola", model, **OPTIONS)
        made.expert_parameters()[name].register_hook(torch.zeros_like)
        try:
            made.fit(ROWS, **{**SETTINGS, "steps": 4}, **settings)
        except TrainingError as error:
            said.append(str(error))
        return made

    name, said = "gates.model/layers/0/self_attn/q_proj.r_EI", []
    made = fitted()
    assert f"after 2 steps; 1 parameters of recipe 'mola' had no gradient after 4 steps: {name}" in said[0]
    assert_same_bits(state(made), state(fitted(callbacks=[StopAfter(2)])))
    assert len(said) == 1


def test_experts_that_few_tokens_choose_are_waited_for(model):
    # two tokens a step
    rows = [{"input_ids": [3 + i, 20 + i], "labels": [-100, 20 + i]} for i in range(7)]
    made = lw.experts("mola", model, rank=2, num_experts=(2, 8), top_k=1)
    made.fit(rows, **{**SETTINGS, "batch_size": 1, "steps": 8})
    assert len(made.training_report.losses) == 8


def test_a_loss_that_is_not_finite_ends_the_training_with_the_last_good_parameters(model):
    class Damage(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            if state.global_step == 2:
                with torch.no_grad():
                    next(iter(model.expert_parameters().values())).fill_(float("nan"))

    made = lw.experts("mola", model, **OPTIONS)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3 .* after 1 steps, with which it was last finite"):
        made.fit(ROWS, **SETTINGS, callbacks=[Damage()])
    assert_same_bits(
        state(made), state(lw.experts("mola", model, **OPTIONS).fit(ROWS, **SETTINGS, callbacks=[StopAfter(1)]))
    )


class StopAfter(TrainerCallback):
    """Ends the training after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step >= self.steps


class Killed(TrainerCallback):
    """Ends the training by an error, for which no state is saved, after so many steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.steps:
            raise KeyboardInterrupt


@pytest.mark.parametrize("killed_after", [3, 4])
def test_an_interrupted_training_goes_on_to_the_same_bits(model, tmp_path, killed_after):
    settings = {**SETTINGS, "steps": 6, "evaluation": ROWS[:3], "evaluate_every": 2, "checkpoint_every": 2}
    options = {**OPTIONS, "dropout": 0.2}
    whole = lw.experts("mola", model, **options).fit(ROWS, **settings)
    with pytest.raises(KeyboardInterrupt):
        lw.experts("mola", model, **options).fit(ROWS, **settings, checkpoint=tmp_path, callbacks=[Killed(killed_after)])
    seen = []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append(state.global_step)

    resumed = lw.experts("mola", model, **options).fit(ROWS, **settings, checkpoint=tmp_path, callbacks=[Seen()])
    assert seen == list(range(killed_after // 2 * 2, 6))
    assert_same_bits(state(resumed), state(whole))
    for field in ("losses", "evaluations", "entropy", "load"):
        assert resumed.report[field] == whole.report[field]
    # what is finished is read, not trained again
    again = lw.experts("mola", model, **options).fit(ROWS, **settings, checkpoint=tmp_path)
    assert_same_bits(state(again), state(whole))
    assert not [file for file in tmp_path.rglob("*") if file.suffix not in ("", ".safetensors")]


def test_the_same_model_goes_on_where_it_was_interrupted(model, tmp_path):
    settings = {**SETTINGS, "steps": 6, "checkpoint_every": 2}
    whole = lw.experts("mola", model, **OPTIONS).fit(ROWS, **settings)
    made, seen = lw.experts("mola", model, **OPTIONS), []

    class Seen(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            seen.append(state.global_step)

    with pytest.raises(KeyboardInterrupt):
        made.fit(ROWS, **settings, checkpoint=tmp_path, callbacks=[Killed(5)])
    made.fit(ROWS, **settings, checkpoint=tmp_path, callbacks=[Seen()])
    assert seen == [4, 5]
    assert_same_bits(state(made), state(whole))


def test_a_training_that_began_with_other_adapters_is_another_one(model, make_adapter, tmp_path):
    pools = [[make_adapter(model, name, seed=seed + place) for place, name in enumerate("ab")] for seed in (1, 5)]
    for pool in pools:
        kept = lw.experts("mixtral", model, pool=pool).fit(ROWS, **SETTINGS, checkpoint=tmp_path)
        assert_same_bits(state(kept), state(lw.experts("mixtral", model, pool=pool).fit(ROWS, **SETTINGS)))


def test_a_training_on_another_base_is_another_one(make_model, tmp_path):
    lw.experts("mola", make_model("llama"), **OPTIONS).fit(ROWS, **SETTINGS, checkpoint=tmp_path)
    other = make_model("llama")
    with torch.no_grad():
        other.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(1.5)
    kept = lw.experts("mola", other, **OPTIONS).fit(ROWS, **SETTINGS, checkpoint=tmp_path)
    assert_same_bits(state(kept), state(lw.experts("mola", other, **OPTIONS).fit(ROWS, **SETTINGS)))


def test_callbacks_are_told_loss_entropy_and_the_load_of_each_expert(model):
    told = []

    class Logged(TrainerCallback):
        def on_log(self, args, state, control, logs, **_):
            told.append(logs)

    made = lw.experts("mola", model, **OPTIONS).fit(ROWS, **SETTINGS, callbacks=[Logged()])
    assert [logs["loss"] for logs in told[:3]] == made.training_report.losses
    assert sum(told[0][f"load/{name}"] for name in made.expert_names) == pytest.approx(1.0, abs=1e-3)
    assert 0 < told[0]["entropy"] <= 1.1


def test_patience_ends_a_training_that_gets_no_better(model):
    made = lw.experts("mola", model, **OPTIONS)
    # such steps change no fp32 number of the loss
    settings = {**SETTINGS, "steps": 9, "lr": 1e-30}
    report = made.fit(ROWS, **settings, evaluation=ROWS, evaluate_every=1, patience=2).training_report
    assert len(report.losses) == 2
    assert report.kept == 0


def test_mixed_precision_keeps_parameters_and_comes_near_the_exact_losses(model):
    exact = lw.experts("mola", model, **OPTIONS).fit(ROWS, **SETTINGS)
    mixed = lw.experts("mola", model, **OPTIONS).fit(ROWS, **SETTINGS, mixed_precision="bf16")
    assert {value.dtype for value in mixed.expert_parameters().values()} == {torch.float32}
    assert mixed.training_report.losses != exact.training_report.losses
    assert mixed.training_report.losses == pytest.approx(exact.training_report.losses, rel=0.03)


def test_an_encoder_decoder_is_trained_on_its_answers(make_model, tokenizer):
    made = lw.experts("mola", make_model("t5"), num_experts=(2,), target_modules=("q", "v"), tokenizer=tokenizer)
    report = made.fit(TASKS, **{**SETTINGS, "steps": 30, "lr": 0.05}).training_report
    assert report.losses[-1] < report.losses[0]


def test_what_was_trained_is_saved_with_its_report(model, make_model, tmp_path):
    made = lw.experts("mola", model, **OPTIONS).fit(ROWS, **SETTINGS)
    again = lw.experts(made.save_pretrained(tmp_path / "saved"), make_model("llama"))
    assert again.training_report == made.training_report


def test_an_untrained_model_has_no_report(model):
    with pytest.raises(TrainingError, match=r"has not been trained: fit\(\) it first"):
        _ = lw.experts("mola", model, **OPTIONS).training_report


@pytest.mark.parametrize("name", ["mola", "moelora"])
def test_blocks_that_run_again_train_to_the_same_bits(model, name):
    options = {**OPTIONS, "dropout": 0.3} if name == "mola" else {"rank": 8, "tasks": ("sums", "capitals"), "dropout": 0.3}
    rows = [{**row, "task": ("sums", "capitals")[place % 2]} for place, row in enumerate(ROWS)]
    plain = lw.experts(name, model, **options).fit(rows, **SETTINGS)
    again = lw.experts(name, model, **options).fit(rows, **SETTINGS, gradient_checkpointing=True)
    assert_same_bits(state(again), state(plain))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"callbacks": 5}, "callbacks is 5; it must be a list"),
        ({"callbacks": [5]}, r"callbacks is \[5\]; it must be a list of transformers' TrainerCallbacks"),
    ],
)
def test_a_setting_of_another_kind_is_refused(model, setting, message):
    with pytest.raises(TrainingError, match=message):
        lw.experts("mola", model, **OPTIONS).fit(ROWS, **{**SETTINGS, **setting})


def test_a_closed_model_is_not_trained(model):
    made = lw.experts("mola", model, **OPTIONS)
    made.close()
    with pytest.raises(TrainingError, match="the expert model is closed"):
        made.fit(ROWS, **SETTINGS)
