"""Training a router on a tiny model, and its settings."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch.nn import functional

from loraweave.composer.composer import Composer
from loraweave.composer.model.batches import IGNORED
from loraweave.composer.train.routers import RouterSettings
from loraweave.errors import TrainingError, WeightingError
from loraweave.hub.pool import ExpertPool
from loraweave.routers.tokens._learned import TrainingReport
from loraweave.routers.tokens._saved import router, router_names
from loraweave.routers.tokens.arrow import Arrow

SETTINGS = {"steps": 12, "batch_size": 4, "warmup": 2, "progress": False}


def values(router):
    return {name: parameter.detach().clone() for name, parameter in router.named_parameters()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def test_fit_gives_the_router_back_with_a_lower_loss(engine, gates, pool, data):
    made = gates(pool)
    assert made.fit(engine, data, **{**SETTINGS, "steps": 40}) is made
    losses = made.report["losses"]
    assert sum(losses[-5:]) / 5 < 0.9 * sum(losses[:5]) / 5
    assert len(losses) == made.report["kept"] == 40
    assert not made.training


def test_the_first_loss_is_that_of_the_targets_under_the_first_weights(engine, model, gates, pool, tokenizer):
    rows = [("abc", "cba"), ("one two", "3")]
    made = gates(pool)
    made.fit(engine, rows, steps=1, batch_size=2, warmup=0, progress=False)
    total, count = 0.0, 0
    with torch.no_grad(), Composer(model, pool).activate(gates(pool)):
        for text, target in rows:
            prompt = tokenizer(f"\nInput: {text}\nOutput:")["input_ids"]
            ids = tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]
            logits = model(torch.tensor([prompt + ids])).logits[0]
            total += float(functional.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(ids), reduction="sum"))
            count += len(ids)
    assert made.report["losses"][0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.own_models
def test_a_step_is_adamw_on_the_clipped_gradient_of_the_mean_loss(engine, model, gates, pool, data):
    made, twin = gates(pool), gates(pool)
    row = {"input_ids": [5, 9, 11, 30, 7], "labels": [IGNORED, IGNORED, 11, IGNORED, 7]}
    made.fit(engine, [row], steps=1, batch_size=1, warmup=0, lr=0.01, clip=0.25, progress=False)
    with Composer(model, pool).activate(twin):
        logits = model(torch.tensor([row["input_ids"]])).logits[0]
    functional.cross_entropy(logits[:-1], torch.tensor(row["labels"])[1:]).backward()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.25)
    assert norm > 0.25
    optimizer.step()
    for name, parameter in made.named_parameters():
        assert torch.allclose(parameter, dict(twin.named_parameters())[name], atol=1e-4), name


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(engine, gates, pool, data):
    runs = []
    for seed in (1, 1, 2):
        # what the process drew before plays no part, nor does what it draws afterwards change
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        runs.append(values(gates(pool, dropout=0.2).fit(engine, data, seed=seed, **SETTINGS)))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


@pytest.mark.parametrize("setting", [{"gradient_accumulation": 3}, {"gradient_checkpointing": True}])
def test_saving_memory_changes_nothing_but_rounding(engine, gates, pool, data, setting):
    plain = values(gates(pool).fit(engine, data, **SETTINGS))
    saving = values(gates(pool).fit(engine, data, **SETTINGS, **setting))
    for name, value in plain.items():
        assert torch.allclose(saving[name], value, atol=2e-4), name


def test_bf16_lets_the_loss_fall_and_leaves_the_parameters_fp32(engine, gates, pool, data):
    made = gates(pool).fit(engine, data, mixed_precision="bf16", **{**SETTINGS, "steps": 40})
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}
    losses = made.report["losses"]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def _state(model):
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        {name: value.clone() for name, value in model.state_dict().items()},
        model.config.use_cache,
    )


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.own_models
def test_the_model_is_left_as_it_was_also_after_an_error(engine, model, gates, pool, data, fails, monkeypatch):
    from accelerate.state import is_initialized

    model.train()
    model.lm_head.requires_grad_(False)
    before = _state(model)
    made = gates(pool)
    if fails:
        monkeypatch.setattr(type(made), "losses", lambda self, step: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            made.fit(engine, data, gradient_checkpointing=True, **SETTINGS)
    else:
        made.fit(engine, data, gradient_checkpointing=True, **SETTINGS)
    after = _state(model)
    assert all(torch.equal(value, after[3][name]) for name, value in before[3].items())
    assert [one for index, one in enumerate(before) if index != 3] == [one for index, one in enumerate(after) if index != 3]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not engine.active
    assert made.step is None
    assert not is_initialized()


def test_gates_that_learn_apart_do_not_depend_on_who_else_learns(engine, apart, pool, data):
    alone = apart(pool).fit(engine, {"c": data["c"]}, **SETTINGS)
    beside = apart(pool).fit(engine, data, **SETTINGS)
    place = pool.places["c"]
    for layer in alone.gates_:
        assert torch.allclose(alone.gates_[layer][place], beside.gates_[layer][place], atol=1e-5)
        assert not alone.gates_[layer][pool.places["b"]].any()
    assert any(bool(beside.gates_[layer][pool.places["b"]].any()) for layer in beside.gates_)


def test_parameters_that_the_loss_cannot_reach_are_named_after_the_first_step(engine, gates, pool, data):
    made = gates(pool)
    made.unused = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(TrainingError, match=r"no gradient to 1 parameters of router .*: unused"):
        made.fit(engine, data, **SETTINGS)
    made.unused.requires_grad_(False)
    made.fit(engine, data, **SETTINGS)


def test_parameters_before_a_factor_of_zero_may_be_silent_at_first(engine, gates, pool, data):
    class Scaled(gates):
        silent_at_first = ("gates_",)

        def __init__(self, pool):
            super().__init__(pool)
            self.scale = torch.nn.Parameter(torch.zeros(()))
            with torch.no_grad():
                for layer in self.gates_:
                    self.gates_[layer].normal_()

        def weights(self, x_BTI, layer):
            scores_BTE = (x_BTI @ self.gates_[layer].T) * self.scale
            return self.note(layer, scores_BTE, scores_BTE.softmax(dim=-1))

    made = Scaled(pool)
    before = values(made)
    after = values(made.fit(engine, data, **SETTINGS))
    assert all(not torch.equal(before[name], after[name]) for name in before)


def test_a_loss_that_is_not_finite_ends_the_training_with_the_last_good_parameters(engine, gates, pool, data):
    good = values(gates(pool).fit(engine, data, **SETTINGS))

    class Breaks(gates):
        count = 0

        def losses(self, step):
            self.count += 1
            return {"own": torch.tensor(float("nan") if self.count == 13 else 0.0)}

    made = Breaks(pool)
    with pytest.raises(TrainingError, match=r"term 'own' is nan at step 13 .*has the parameters after 11 steps"):
        made.fit(engine, data, **{**SETTINGS, "steps": 14})
    assert all(bool(value.isfinite().all()) for value in values(made).values())
    assert set(values(made)) == set(good)
    with pytest.raises(TrainingError, match=r"are not finite.* at step 1 .*after 0 steps"):
        _broken(made).fit(engine, data, **SETTINGS)


def _broken(router):
    with torch.no_grad():
        next(router.parameters()).fill_(float("nan"))
    return router


def test_the_best_on_rows_held_out_is_kept_and_patience_ends_the_training(engine, gates, pool, data):
    held = {"a": [("zyx", "q"), ("abc", "z")]}
    made = gates(pool)
    made.fit(engine, data, evaluation=held, evaluate_every=2, patience=2, lr=0.5, **{**SETTINGS, "steps": 60})
    report = TrainingReport.from_json(made.report)
    steps = [step for step, _ in report.evaluations]
    assert steps == list(range(0, steps[-1] + 1, 2))
    assert len(report.losses) == steps[-1] < 60
    assert report.kept == min(report.evaluations, key=lambda pair: pair[1])[0] == steps[-3]
    twin = gates(pool)
    twin.load_state_dict(made.state_dict())
    twin.fit(engine, data, evaluation=held, steps=1, lr=1e-9, progress=False)
    assert twin.report["evaluations"][0][1] == pytest.approx(min(loss for _, loss in report.evaluations), rel=1e-6)


def test_a_router_that_collapses_is_said_once(engine, gates, pool, data):
    made = gates(pool)

    class Collapsed(gates):
        def weights(self, x_BTI, layer):
            w_BTE = super().weights(x_BTI, layer)
            one_E = torch.tensor([0.0, 0.0, 1.0])
            return self.note(layer, w_BTE.log(), one_E + w_BTE - w_BTE.detach())

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = Collapsed(pool).fit(engine, data, **{**SETTINGS, "steps": 30})
    (warning,) = caught
    assert "has collapsed: over the last 20 steps expert 'c' had 100% of all weight" in str(warning.message)
    assert made.report["collapsed"] == 20
    assert made.report["dead"] == ["a", "b"]


def test_the_report_is_json_and_knows_load_and_entropy(engine, gates, pool, data):
    made = gates(pool).fit(engine, data, balance=0.01, z=0.001, **{**SETTINGS, "lr": 1e-9})
    assert json.loads(json.dumps(made.report)) == json.loads(json.dumps(TrainingReport.from_json(made.report).to_json()))
    report = made.training_report
    # all weights alike: 2 experts in q_proj, down_proj and lm_head, 3 in v_proj; 2 blocks
    layers = [2, 2, 3, 3, 2, 2, 2]
    sizes = torch.tensor(layers, dtype=torch.float64)
    assert report.entropy[0] == pytest.approx(float(sizes.log().mean()), rel=1e-5)
    assert sum(report.load[0][1]) == pytest.approx(1, abs=1e-3)
    assert report.terms["balance"] == pytest.approx([0.01] * 12, rel=1e-5)
    assert report.terms["z"] == pytest.approx([0.001 * float(sizes.log().square().mean())] * 12, rel=1e-5)
    assert report.seconds > 0


def test_a_router_that_cannot_learn_here_is_refused(engine, gates, pool, data):
    with pytest.raises(TrainingError, match="'arrow' learns nothing"):
        engine.fit(Arrow(pool), data)
    with pytest.raises(TrainingError, match="no parameter"):
        gates(pool).requires_grad_(False).fit(engine, data)
    with pytest.raises(WeightingError, match="in this order"):
        gates(ExpertPool(list(pool.adapters.values())[:2])).fit(engine, data)


def test_an_encoder_decoder_is_trained_on_its_answers(make_model, make_adapters, tokenizer, gates, data):
    model = make_model("t5")
    pool = ExpertPool(make_adapters(model, "t5"))
    engine = Composer(model, pool, tokenizer=tokenizer)
    made = gates(pool).fit(engine, data, balance=0.01, evaluation=data, evaluate_every=40, **{**SETTINGS, "steps": 40})
    (_, first), (_, last) = made.report["evaluations"]
    assert last < first


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name, options in {
            "mole": {},
            "ld_mole": {"sparsity": 0.1, "target": 1},
            "mixture_of_adapters": {"decision": "token"},
        }.items()
        if name in router_names()
    ],
)
def test_terms_of_routers_have_the_tokens_of_encoder_and_decoder(name, options, make_model, make_adapters):
    model = make_model("t5")
    pool = ExpertPool(make_adapters(model, "t5"))
    rows = [
        {"input_ids": [5, 9, 11, 2], "labels": [7, 8, 2], "expert": "a"},
        {"input_ids": [7, 3], "labels": [5, 2], "expert": "b"},
    ]
    made = router(name, pool, **options).fit(Composer(model, pool), rows, **SETTINGS)
    (term,) = made.report["terms"].values()
    assert len(term) == SETTINGS["steps"]
    assert all(math.isfinite(value) for value in term)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": 3}, "no setting 'step', did you mean 'steps'"),
        ({"steps": 0}, r"fit\(\) got steps=0; it takes a whole number of at least 1"),
        ({"seed": "a"}, "got seed='a'; it takes a whole number of at least 0 and below 4294967296"),
        ({"seed": -1}, "got seed=-1"),
        ({"batch_size": True}, "got batch_size=True"),
        ({"gradient_accumulation": 0}, "got gradient_accumulation=0"),
        ({"lr": 0.0}, "got lr=0.0"),
        ({"lr": float("nan")}, "got lr=nan"),
        ({"lr": "fast"}, "got lr='fast'; it takes a finite number above 0 or None"),
        ({"lr": 1e38}, "lr is 1e\\+38 and weight_decay 0.0: AdamW's steps would be beyond 3.4e\\+38"),
        ({"lr": 1.0, "weight_decay": 1e300}, "lr is 1.0 and weight_decay 1e\\+300"),
        ({"balance": True}, "got balance=True"),
        ({"clip": 0}, "got clip=0"),
        ({"warmup": -1}, "got warmup=-1"),
        ({"balance": -1.0}, "got balance=-1.0"),
        ({"z": float("inf")}, "got z=inf"),
        ({"mixed_precision": "bf32"}, "got mixed_precision='bf32'; it takes one of 'no', 'bf16'"),
        ({"patience": 2}, "there is no evaluation"),
        ({"patience": 0, "evaluation": [("a", "b")]}, "got patience=0"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(gates, pool, given, said):
    with pytest.raises(TrainingError, match=said):
        RouterSettings.of(gates(pool), given)


def test_the_rate_is_the_routers_own_unless_another_is_given(gates, pool):
    assert RouterSettings.of(gates(pool), {}).lr == 0.05
    assert RouterSettings.of(gates(pool), {"lr": None}).lr == 0.05
    assert RouterSettings.of(gates(pool), {"lr": 0.2}).lr == 0.2
