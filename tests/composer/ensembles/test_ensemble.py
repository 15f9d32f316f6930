"""Averaged probabilities and answers, against the formula written out with one activation and one row at a time."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.composer import Composer
from loraweave.composer.ensembles.ensemble import answers, ensemble
from loraweave.composer.model import scoring
from loraweave.errors import CompositionError, InvalidTask, ScopeError, UnknownExpert, WeightingError
from loraweave.routers.weights import MixtureWeights
from loraweave.types import Task

MEMBERS = [{"a": 1.0}, {"b": 0.7, "c": -0.4}, None, {"c": 1.0}]
LABELS = ("yes", "no", "maybe so")


@torch.no_grad()
def alone(engine, member, row):
    """p_TV of one member for one row without padding."""
    with engine.activate({} if member is None else member):
        return engine.model(input_ids=row[None]).logits[0].softmax(-1)


@pytest.fixture
def engine(engine_of):
    return engine_of("llama", speaks=False)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_it_is_the_mean_of_the_members_probabilities(engine_of, padded, kind, side, rows):
    engine = engine_of(kind, speaks=False)
    found = ensemble(engine, MEMBERS, padded(side), weights=[1, 2, 3, 2])
    expected_BV = torch.stack(
        [
            sum(w / 8 * alone(engine, m, rows[row])[-1] for w, m in zip([1, 2, 3, 2], MEMBERS, strict=True))
            for row in range(3)
        ]
    )
    assert torch.allclose(found.probabilities, expected_BV, rtol=1e-5, atol=1e-9)
    assert found.members_MBV.dtype == torch.float64
    assert found.best == expected_BV.argmax(-1).tolist()


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_last_positions_of_each_row_are_its_own_last_tokens(padded, side, engine, rows):
    found = ensemble(engine, MEMBERS, padded(side), num_positions=4).probabilities
    for row in range(3):
        expected_TV = sum(alone(engine, member, rows[row]) / 4 for member in MEMBERS)
        assert torch.allclose(found[row], expected_TV[-4:], rtol=1e-5, atol=1e-9)


def test_identical_members_are_the_single_model(engine, ids):
    found = ensemble(engine, [{"a": 0.6}] * 3, {"input_ids": ids})
    with torch.no_grad(), engine.activate({"a": 0.6}):
        expected = engine.model(input_ids=ids).logits[:, -1].log_softmax(-1)
    assert torch.allclose(found.log_probabilities, expected, rtol=1e-6)
    assert found.disagreement.abs().max() < 1e-6


def test_the_loss_is_at_most_the_mean_of_the_members_for_every_token(padded, engine):
    found = ensemble(engine, MEMBERS, padded("left"))
    assert bool((-found.log_probabilities <= -found.members_MBV.mean(dim=0) + 1e-12).all())


def test_the_order_of_members_does_not_matter(padded, engine):
    one = ensemble(engine, MEMBERS, padded("left"), weights=[1, 2, 3, 4]).log_probabilities
    other = ensemble(engine, MEMBERS[::-1], padded("left"), weights=[4, 3, 2, 1]).log_probabilities
    assert torch.allclose(one, other, rtol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(padded, engine):
    batch = padded("left")
    together = ensemble(engine, MEMBERS, batch).log_probabilities
    for row in range(3):
        one = ensemble(engine, MEMBERS, {key: value[row : row + 1] for key, value in batch.items()}).log_probabilities
        assert torch.allclose(together[row], one[0], rtol=1e-5)


@pytest.mark.parametrize("rows_per_pass", [1, 2, 5, 6, 100])
def test_it_does_not_depend_on_how_rows_are_put_into_passes(padded, rows_per_pass, engine):
    expected = ensemble(engine, MEMBERS, padded("right"), num_positions=2).log_probabilities
    found = ensemble(engine, MEMBERS, padded("right"), num_positions=2, rows_per_pass=rows_per_pass).log_probabilities
    assert torch.allclose(found, expected, rtol=1e-5)


def test_all_members_share_one_forward_pass_where_they_fit(padded, engine):
    rows = []
    handle = engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    ensemble(engine, MEMBERS, padded("left"))
    ensemble(engine, MEMBERS, padded("left"), rows_per_pass=6)
    handle.remove()
    assert rows == [12, 6, 6]


def test_passes_follow_from_the_tokens_and_logits_that_one_may_hold(padded, engine, monkeypatch):
    rows = []
    handle = engine.model.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr("loraweave.composer.ensembles.ensemble.MAX_TOKENS", 6 * 7)
    ensemble(engine, MEMBERS, padded("left"))
    monkeypatch.setattr("loraweave.composer.ensembles.ensemble.MAX_LOGITS", 3 * 61)
    ensemble(engine, MEMBERS, padded("left"))
    handle.remove()
    assert rows == [6, 6, 3, 3, 3, 3]


def test_no_keys_and_values_are_kept_unless_the_batch_asks_for_them(padded, engine):
    kept = []
    handle = engine.model.register_forward_hook(lambda model, args, output: kept.append(output.past_key_values is not None))
    ensemble(engine, MEMBERS, padded("left"))
    ensemble(engine, MEMBERS, {**padded("left"), "use_cache": True})
    handle.remove()
    assert kept == [False, True]


def test_tokens_restrict_the_softmax_of_each_member(padded, engine, rows):
    tokens = [9, 40, 17]
    found = ensemble(engine, MEMBERS, padded("left"), tokens=tokens)
    for row in range(3):
        shares = torch.stack([alone(engine, member, rows[row])[-1, tokens] for member in MEMBERS])
        expected = (shares / shares.sum(1, keepdim=True)).mean(0)
        assert torch.allclose(found.probabilities[row], expected, rtol=1e-5)
        assert found.best[row] == tokens[int(expected.argmax())]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
@torch.no_grad()
def test_labels_restrict_the_softmax_to_their_summed_likelihoods(engine_of, padded, kind, side, tokenizer, rows):
    engine = engine_of(kind)
    found = ensemble(engine, MEMBERS, padded(side), labels=LABELS, weights=[4, 1, 2, 1])
    targets = [tokenizer(f" {label}</s>", add_special_tokens=False)["input_ids"] for label in LABELS]
    for row in range(3):
        prompt = rows[row].tolist()
        shares = []
        for member in MEMBERS:
            with engine.activate(member or {}):
                sums = [summed(engine.model, prompt, target) for target in targets]
            shares.append(torch.tensor(sums, dtype=torch.float64).softmax(0))
        expected = torch.einsum("m,ml->l", torch.tensor([4.0, 1.0, 2.0, 1.0], dtype=torch.float64) / 8, torch.stack(shares))
        assert torch.allclose(found.probabilities[row], expected, rtol=1e-4, atol=1e-7)
        assert found.best[row] == LABELS[int(expected.argmax())]


def summed(model, prompt, target):
    if model.config.is_encoder_decoder:
        return -float(model(input_ids=torch.tensor([prompt]), labels=torch.tensor([target])).loss) * len(target)
    logs = model(input_ids=torch.tensor([prompt + target])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + k, token]) for k, token in enumerate(target))


def test_an_encoder_decoder_predicts_after_the_last_token_of_its_answer(engine_of, padded):
    engine = engine_of("t5", speaks=False)
    batch = {**padded("left"), "decoder_input_ids": torch.tensor([[0, 9], [0, 8], [0, 4]])}
    found = ensemble(engine, MEMBERS, batch)
    expected = []
    for member in MEMBERS:
        with torch.no_grad(), engine.activate(member or {}):
            expected.append(engine.model(**batch).logits[:, -1].softmax(-1))
    assert torch.allclose(found.probabilities, torch.stack(expected).mean(0), rtol=1e-5)


def test_a_classifier_gives_its_classes(engine_of, padded):
    engine = engine_of("bert", speaks=False)
    found = ensemble(engine, MEMBERS, padded("right"))
    expected = []
    for member in MEMBERS:
        with torch.no_grad(), engine.activate(member or {}):
            expected.append(engine.model(**padded("right")).logits.softmax(-1))
    assert torch.allclose(found.probabilities, torch.stack(expected).mean(0), rtol=1e-5)
    with pytest.raises(CompositionError, match="classifies"):
        ensemble(engine, MEMBERS, padded("right"), num_positions=2)


class Halves:
    """A router: each token of a layer's input gets "a" where its first feature is positive, else "b"."""

    def weights(self, x_BTI, layer):
        positive_BT = (x_BTI[..., 0] > 0).to(x_BTI.dtype)
        return torch.stack([positive_BT, 1 - positive_BT, torch.zeros_like(positive_BT)], dim=-1)


def test_a_router_and_weights_by_layer_are_members_like_any_other(engine, ids):
    layers = tuple(engine.pool.layer_names)[:2]
    by_layer = MixtureWeights(torch.tensor([[[[0.5, -1.0], [0.2, 0.9]]]]), ("a", "c"), layers)
    members = [Halves(), by_layer, MixtureWeights.of({"b": 0.3}, ["b"])]
    found = ensemble(engine, members, {"input_ids": ids}).probabilities
    expected = []
    for member in members:
        with torch.no_grad(), engine.activate(member):
            expected.append(engine.model(input_ids=ids).logits[:, -1].softmax(-1))
    assert torch.allclose(found, torch.stack(expected).mean(0), rtol=1e-5)


def test_entropies_are_those_of_the_average_and_of_the_members(padded, engine):
    found = ensemble(engine, MEMBERS, padded("left"))
    p_BV, p_MBV = found.probabilities, found.members_MBV.exp()
    total_B = -(p_BV * p_BV.log()).sum(-1)
    each_MB = -(p_MBV * p_MBV.log()).sum(-1)
    assert torch.allclose(found.entropy, total_B)
    assert torch.allclose(found.member_entropy, each_MB)
    # mutual information as the mean divergence of the members from the average
    divergence_B = (p_MBV * (p_MBV.log() - p_BV.log())).sum(-1).mean(0)
    assert torch.allclose(found.disagreement, divergence_B, atol=1e-9)
    assert float(found.disagreement.min()) > 1e-4


def test_a_member_of_weight_zero_says_nothing(padded, engine):
    found = ensemble(engine, [{"a": 1.0}, {"b": 1.0}], padded("left"), weights=[3, 0])
    expected = ensemble(engine, [{"a": 1.0}], padded("left"))
    assert torch.allclose(found.log_probabilities, expected.log_probabilities, rtol=1e-6)
    assert torch.allclose(found.disagreement, torch.zeros(3, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("members", [{"a": 1.0}, [], "a", ["a"], [[{"a": 1.0}, None, None]], [0.5]])
def test_members_that_are_none_are_refused_by_name(padded, members, engine):
    with pytest.raises(WeightingError, match=r"a list of at least one mixture|member 0 of the ensemble|mixture is"):
        ensemble(engine, members, padded("left"))


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0], [0.0, 0.0], [1.0, float("nan")]])
def test_weights_that_are_no_shares_are_refused(padded, weights, engine):
    with pytest.raises(WeightingError, match=r"weights for 2 members|shares of an average"):
        ensemble(engine, [None, {"a": 1.0}], padded("left"), weights=weights)


def test_what_cannot_be_asked_is_refused_before_the_model_runs(padded, engine, tokenizer):
    engine.model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UnknownExpert, match="'d'"):
        ensemble(engine, [{"d": 1.0}], padded("left"))
    with pytest.raises(ScopeError, match="2 rows"):
        ensemble(engine, [MixtureWeights.of([{"a": 1.0}, None], ["a"])], padded("left"))
    with pytest.raises(CompositionError, match="tokenizer"):
        ensemble(engine, MEMBERS, padded("left"), labels=LABELS)
    with pytest.raises(CompositionError, match="shortest row has 4"):
        ensemble(engine, MEMBERS, padded("left"), num_positions=5)
    with pytest.raises(CompositionError, match="no tensor with rows"):
        ensemble(engine, MEMBERS, {})
    for tokens in ([], [61], [3, 3], [0.5]):
        with pytest.raises(InvalidTask, match="below 61"):
            ensemble(engine, MEMBERS, padded("left"), tokens=tokens)
    speaking = Composer(engine.model, engine.pool, tokenizer=tokenizer)
    with pytest.raises(CompositionError, match="no cache"):
        ensemble(engine, MEMBERS, {**padded("left"), "past_key_values": object()})
    with pytest.raises(CompositionError, match=r"'pixel_values' of the batch \(shape \(6, 3, 2, 2\)\)"):
        ensemble(engine, MEMBERS, {**padded("left"), "pixel_values": torch.zeros(6, 3, 2, 2)})
    with pytest.raises(CompositionError, match="labels= follow a text"):
        ensemble(speaking, MEMBERS, {**padded("left"), "pixel_values": torch.zeros(3, 3, 2, 2)}, labels=LABELS)
    for labels in ([], ["no", "no"], ["no", " "]):
        with pytest.raises(InvalidTask, match="label"):
            ensemble(speaking, MEMBERS, padded("left"), labels=labels)
    with pytest.raises(InvalidTask, match="leave tokens="):
        ensemble(speaking, MEMBERS, padded("left"), labels=LABELS, tokens=[4])


@pytest.mark.parametrize("option", ["rows_per_pass", "num_positions"])
@pytest.mark.parametrize("value", [0, 1.5, True])
def test_what_counts_rows_and_positions_is_a_whole_number(padded, option, value, engine):
    with pytest.raises(CompositionError, match=rf"{option} is {value}; it must be a whole number of at least 1"):
        ensemble(engine, MEMBERS, padded("right"), **{option: value})


def test_it_has_its_public_name():
    assert lw.ensemble is ensemble


THREE = MEMBERS[:3]
WEIGHTS = [2.0, 1.0, 1.0]
INPUTS = ["is it good?", "no", "what a very long question, and more", "to be"]
TASK = Task([], template="{input}")


@torch.no_grad()
def average(engine, ids, written):
    """p_V of the next token: a member at a time, without cache or padding."""
    total = torch.zeros(())
    for member, weight in zip(THREE, WEIGHTS, strict=True):
        with engine.activate(member or {}):
            if engine.model.config.is_encoder_decoder:
                decoder = torch.tensor([[engine.model.config.decoder_start_token_id, *written]])
                logits = engine.model(input_ids=torch.tensor([ids]), decoder_input_ids=decoder).logits
            else:
                logits = engine.model(input_ids=torch.tensor([ids + written])).logits
        total = total + weight / sum(WEIGHTS) * logits[0, -1].softmax(-1)
    return total


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_text_is_decoded_greedily_from_the_averaged_probabilities(engine_of, kind, tokenizer):
    engine = engine_of(kind)
    found = answers(engine, THREE, TASK, INPUTS, weights=WEIGHTS, max_new_tokens=9)
    newline = tokenizer("\n")["input_ids"][0]
    for text, answer in zip(INPUTS, found, strict=True):
        written: list[int] = []
        while len(written) < 9 and not {2, newline} & set(written):
            written.append(int(average(engine, tokenizer(text)["input_ids"], written).argmax()))
        expected = tokenizer.decode([token for token in written if token not in (2, newline)], skip_special_tokens=True)
        assert answer == expected.strip()
    assert found != scoring.predict(engine.model, tokenizer, TASK, INPUTS, max_new_tokens=9)


def test_labels_are_ranked_by_their_averaged_probabilities(engine_of, tokenizer):
    engine = engine_of("llama")
    labels = ("yes", "no", "maybe so", "it is")
    found = answers(engine, THREE, Task([], template="{input}", labels=labels), INPUTS, weights=WEIGHTS)
    for text, answer in zip(INPUTS, found, strict=True):
        shares = torch.zeros(4, dtype=torch.float64)
        for member, weight in zip(THREE, WEIGHTS, strict=True):
            inputs = scoring.pad_prompts(engine.model, tokenizer, [text])
            with torch.no_grad(), engine.activate(member or {}):
                ids = [scoring.label_ids(tokenizer, labels)]
                losses_BL = scoring.label_losses(engine.model, inputs["input_ids"], inputs["attention_mask"], ids)
            shares += weight * (-losses_BL[0]).softmax(0)
        assert answer == labels[int(shares.argmax())]


def test_one_member_answers_as_its_mixture_does(engine_of, tokenizer):
    engine = engine_of("llama")
    with engine.activate({"a": 1.0}):
        expected = scoring.predict(engine.model, tokenizer, TASK, INPUTS, max_new_tokens=9)
    assert answers(engine, [{"a": 1.0}], TASK, INPUTS, max_new_tokens=9) == expected


@pytest.mark.parametrize("labels", [None, ("yes", "no", "maybe so")])
def test_each_member_is_asked_in_the_prompts_of_its_own_task(engine_of, tokenizer, labels):
    engine = engine_of("llama")
    shown = [("nope", "no"), ("if it", "yes")]
    tasks = [
        Task([], template="{input}:", labels=labels),
        Task([], template="{input}:", labels=labels, demonstrations=shown),
    ]
    members = [{"a": 1.0}, {"b": 1.0}]
    found = answers(engine, members, tasks, INPUTS, weights=[0.3, 0.7], max_new_tokens=7)
    newline = tokenizer("\n")["input_ids"][0]
    for text, answer in zip(INPUTS, found, strict=True):
        prompts = [f"{text}:", f"nope: no\n\nif it: yes\n\n{text}:"]
        if labels is None:
            written: list[int] = []
            while len(written) < 7 and not {2, newline} & set(written):
                written.append(int(shares_after(engine, tokenizer, members, prompts, written).argmax()))
            expected = tokenizer.decode([token for token in written if token not in (2, newline)], skip_special_tokens=True)
            assert answer == expected.strip()
        else:
            # an answer after demonstrations ends with the line, as theirs do
            ranked = []
            for member, prompt, end in zip(members, prompts, (tokenizer.eos_token, "\n"), strict=True):
                ids = tokenizer(prompt)["input_ids"]
                scores = []
                for label in labels:
                    target = tokenizer(f" {label}{end}", add_special_tokens=False)["input_ids"]
                    with engine.activate(member), torch.no_grad():
                        logs = engine.model(torch.tensor([ids + target])).logits[0].double().log_softmax(dim=-1)
                    scores.append(sum(float(logs[len(ids) - 1 + place, token]) for place, token in enumerate(target)))
                ranked.append(torch.tensor(scores).softmax(dim=0))
            mean_L = 0.3 * ranked[0] + 0.7 * ranked[1]
            assert answer == labels[int(mean_L.argmax())]


def shares_after(engine, tokenizer, members, prompts, written):
    """The average of the members' next tokens, each after its own prompt, without a cache."""
    total = 0
    for member, prompt, weight in zip(members, prompts, [0.3, 0.7], strict=True):
        with torch.no_grad(), engine.activate(member):
            logits = engine.model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"] + written])).logits
        total = total + weight * logits[0, -1].double().softmax(-1)
    return total


@pytest.mark.parametrize("second", [[], [Task([]), Task([], labels=("yes", "no"))]])
def test_tasks_that_do_not_fit_the_members_are_refused(engine_of, second):
    with pytest.raises(InvalidTask, match=r"tasks for 2 members|have the labels"):
        answers(engine_of("llama"), [{"a": 1.0}, {"b": 1.0}], second, INPUTS)


def test_no_inputs_get_no_answers(engine_of):
    assert answers(engine_of("llama"), THREE, TASK, []) == []


def test_an_engine_without_a_tokenizer_is_refused(engine_of):
    with pytest.raises(CompositionError, match="tokenizer"):
        answers(engine_of("llama", speaks=False), THREE, TASK, INPUTS)
