"""Answers, their scores and losses, against likelihoods and greedy decoding written out without cache or padding."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest

import loraweave as lw
from loraweave.composer.model import scoring
from loraweave.composer.model.batches import IGNORED, Prefixes, batch, encode, mean_losses, token_losses, token_scores
from loraweave.composer.model.scoring import encode_pairs, losses, predict
from loraweave.composer.train.rows import TrainingRow
from loraweave.errors import InvalidTask
from loraweave.types import Task

PROMPTS = ["is it good?", "no", "what a very long question, and more"]
LABELS = ("yes", "no", "maybe so")


def summed(model, tokenizer, prompt, label):
    prompt_ids = tokenizer(prompt)["input_ids"]
    label_ids = tokenizer(f" {label}</s>", add_special_tokens=False)["input_ids"]
    logs = model(input_ids=torch.tensor([prompt_ids + label_ids])).logits[0].double().log_softmax(dim=1)
    return sum(float(logs[len(prompt_ids) - 1 + k, token]) for k, token in enumerate(label_ids))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_label_losses_with_a_shared_cache_equal_those_of_whole_rows(kind, make_model, tokenizer):
    model = make_model(kind)
    inputs = scoring.pad_prompts(model, tokenizer, PROMPTS)
    found = scoring.label_losses(
        model, inputs["input_ids"], inputs["attention_mask"], [scoring.label_ids(tokenizer, LABELS)]
    )
    expected = [[-summed(model, tokenizer, prompt, label) for label in LABELS] for prompt in PROMPTS]
    np.testing.assert_allclose(found.double().numpy(), expected, atol=5e-4)


@torch.no_grad()
def test_the_label_of_the_highest_summed_likelihood_wins(tiny_llama, tokenizer):
    best = [max(LABELS, key=lambda label: summed(tiny_llama, tokenizer, prompt, label)) for prompt in PROMPTS]
    assert scoring.rank(tiny_llama, tokenizer, PROMPTS, LABELS) == best


@torch.no_grad()
def test_the_head_sees_contiguous_rows_where_the_last_logits_alone_are_needed(make_model, make_adapters, tokenizer):
    model, inputs = make_model("llama"), []
    engine = lw.Composer(model, make_adapters(model, "llama"), tokenizer=tokenizer)
    with model.lm_head.register_forward_pre_hook(lambda _, args: inputs.append(args[0])):
        scoring.rank(model, tokenizer, PROMPTS, LABELS)
        predict(model, tokenizer, Task([("it is", "good")]), PROMPTS, max_new_tokens=2)
        engine.generate(PROMPTS, max_new_tokens=2)
        list(engine.stream(PROMPTS[:1], max_new_tokens=2))
    assert all(hidden_BTI.is_contiguous() for hidden_BTI in inputs)
    assert {hidden_BTI.shape[0] for hidden_BTI in inputs} >= {1, len(PROMPTS)}


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_ranks_labels_too(kind, make_model, tokenizer):
    model = make_model(kind)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        labels = [torch.tensor([tokenizer(f" {label}</s>", add_special_tokens=False)["input_ids"]]) for label in LABELS]
        expected.append([float(model(input_ids=ids, labels=label).loss) * label.shape[1] for label in labels])
    inputs = scoring.pad_prompts(model, tokenizer, PROMPTS)
    found = scoring.label_losses(
        model, inputs["input_ids"], inputs["attention_mask"], [scoring.label_ids(tokenizer, LABELS)]
    )
    np.testing.assert_allclose(found.double().numpy(), expected, atol=5e-4)
    best = [LABELS[int(np.argmin(losses))] for losses in expected]
    assert scoring.rank(model, tokenizer, PROMPTS, LABELS) == best


@torch.no_grad()
def test_a_generation_ends_where_the_first_of_its_stop_texts_begins(tiny_llama, tokenizer):
    whole = scoring.generate(tiny_llama, tokenizer, PROMPTS, max_new_tokens=9, stop=())
    ends = whole[0][3:5], whole[1][2]
    found = scoring.generate(tiny_llama, tokenizer, PROMPTS, max_new_tokens=9, stop=ends)
    assert found == [text[: min(text.find(end) % 99 for end in ends)].strip() for text in whole]
    asked = Task([], template="{input}", stop=ends)
    assert predict(tiny_llama, tokenizer, asked, PROMPTS, max_new_tokens=9) == found


@torch.no_grad()
def test_a_generation_is_the_greedy_one_up_to_a_line_break(tiny_llama, tokenizer):
    found = scoring.generate(tiny_llama, tokenizer, PROMPTS, max_new_tokens=9)
    newline = tokenizer("\n")["input_ids"][0]
    for prompt, text in zip(PROMPTS, found, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        written = []
        while len(written) < 9 and not {2, newline} & set(written):
            written.append(int(tiny_llama(input_ids=torch.tensor([ids + written])).logits[0, -1].argmax()))
        expected = tokenizer.decode([token for token in written if token not in (2, newline)], skip_special_tokens=True)
        assert text == expected.strip()


def test_every_accepted_target_counts_as_right(tiny_llama, tokenizer, monkeypatch):
    monkeypatch.setattr(scoring, "predict", lambda *_, **__: ["win", " pin ", "tin"])
    task = Task([], instruction="rhyme")
    score = scoring.evaluate(tiny_llama, tokenizer, task, [("thin", ["win", "bin"]), ("a", "pin"), ("b", "other")])
    assert score.right == (True, True, False)
    assert score.answers == ("win", " pin ", "tin")
    assert sum(score.losses) / 3 == pytest.approx(score.loss)
    assert score.value == pytest.approx(2 / 3)


@pytest.mark.parametrize(("right", "count"), [(12, 12), (2, 2), (0, 3), (5, 8)])
def test_the_interval_of_a_score_is_wilsons(right, count):
    answers = ["a"] * right + ["b"] * (count - right)
    score = scoring.score(answers, [("x", ("a",))] * count, [1.0] * count)
    expected = binomtest(right, count).proportion_ci(method="wilson")
    assert (score.low, score.high) == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_nothing_to_evaluate_is_refused(tiny_llama, tokenizer):
    with pytest.raises(InvalidTask, match=r"no .*pairs"):
        scoring.evaluate(tiny_llama, tokenizer, Task([]), [])


def test_a_tokenizer_without_a_padding_token_answers_the_same(tiny_llama, tokenizer):
    without = copy.deepcopy(tokenizer)
    without.pad_token = None
    for task in (Task([]), Task([], labels=LABELS)):
        found = scoring.predict(tiny_llama, without, task, PROMPTS, max_new_tokens=5)
        assert found == scoring.predict(tiny_llama, tokenizer, task, PROMPTS, max_new_tokens=5)
    assert without.pad_token is None


QUESTIONS = ["add 1 2:", "a much longer prompt, no?", "x"]
TARGETS = ["3", "some words", "yy"]


def alone(model, tokenizer, prompt, target):
    """Log-likelihoods of the target's tokens, one unpadded row, straight from the definition."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    target_ids = tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]
    logits = model(input_ids=torch.tensor([prompt_ids + target_ids])).logits[0].double()
    logs = logits.log_softmax(dim=1)
    return [float(logs[len(prompt_ids) - 1 + k, token]) for k, token in enumerate(target_ids)]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_the_losses_of_a_padded_batch_are_those_of_each_row_alone(kind, make_model, tokenizer):
    model = make_model(kind)
    losses = token_losses(model, batch(model, tokenizer, encode(model, tokenizer, QUESTIONS, TARGETS)))
    for row, (prompt, target) in enumerate(zip(QUESTIONS, TARGETS, strict=True)):
        expected = alone(model, tokenizer, prompt, target)
        assert losses[row, -len(expected) :].tolist() == pytest.approx([-value for value in expected], abs=2e-4)
        assert not losses[row, : -len(expected)].any()


@pytest.mark.parametrize("kind", ["t5", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_is_scored_through_its_labels(kind, make_model, tokenizer):
    model = make_model(kind)
    prepared = batch(model, tokenizer, encode(model, tokenizer, QUESTIONS, TARGETS))
    chosen = prepared.rows([0, 2])
    assert chosen.inputs["input_ids"].shape[1] == len(QUESTIONS[0])
    losses, losses_of_chosen = mean_losses(model, prepared), mean_losses(model, chosen)
    for row, (prompt, target) in enumerate(zip(QUESTIONS, TARGETS, strict=True)):
        labels = torch.tensor([tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]])
        expected = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]), labels=labels).loss
        assert float(losses[row]) == pytest.approx(float(expected), abs=2e-4)
        if row != 1:
            assert float(losses_of_chosen[row // 2]) == pytest.approx(float(expected), abs=2e-4)


@torch.no_grad()
def test_a_hit_is_a_target_token_that_is_the_most_likely_one(tiny_llama, tokenizer):
    prepared = batch(tiny_llama, tokenizer, encode(tiny_llama, tokenizer, QUESTIONS, TARGETS))
    _, hits = token_scores(tiny_llama, prepared)
    for row, (prompt, target) in enumerate(zip(QUESTIONS, TARGETS, strict=True)):
        prompt_ids = tokenizer(prompt)["input_ids"]
        target_ids = tokenizer(f" {target}</s>", add_special_tokens=False)["input_ids"]
        best = tiny_llama(input_ids=torch.tensor([prompt_ids + target_ids])).logits[0].argmax(dim=1)
        expected = [int(best[len(prompt_ids) - 1 + k]) == token for k, token in enumerate(target_ids)]
        assert hits[row, -len(expected) :].tolist() == expected


@pytest.mark.own_models
def test_losses_of_few_tokens_equal_those_of_whole_rows(tiny_llama, tokenizer):
    rows = [
        TrainingRow((5, 6, 7), (8, 9, 10, 11, 12), (IGNORED, 9, IGNORED, IGNORED, 12)),
        TrainingRow((7,), (9, 5, 6), (IGNORED, IGNORED, 6)),
    ]
    stacked = batch(tiny_llama, tokenizer, rows)
    expected_BK = torch.zeros(2, 5)
    for number, row in enumerate(rows):
        log_p_TV = tiny_llama(input_ids=torch.tensor([row.prompt + row.target])).logits[0].log_softmax(dim=1)
        for place, label in enumerate(row.labels):
            if label != IGNORED:
                slot = 5 - len(row.labels) + place
                expected_BK[number, slot] = -log_p_TV[len(row.prompt) - 1 + place, label]
    found_BK = token_losses(tiny_llama, stacked)
    torch.testing.assert_close(found_BK, expected_BK)
    found_BK.sum().backward()


def test_a_tiled_batch_repeats_all_rows_in_their_order(tiny_llama, tokenizer):
    prepared = batch(tiny_llama, tokenizer, encode(tiny_llama, tokenizer, QUESTIONS, TARGETS))
    tiled = prepared.tile(2)
    assert torch.equal(tiled.targets_BK[3:], prepared.targets_BK)
    assert torch.equal(tiled.inputs["input_ids"][:3], prepared.inputs["input_ids"])


@pytest.mark.parametrize("target", ["", "   "])
def test_an_empty_target_is_refused_with_its_row(target, tiny_llama, tokenizer):
    with pytest.raises(InvalidTask, match=r"row 2 .*empty target"):
        encode(tiny_llama, tokenizer, ["a", "b"], ["c", target])


def test_an_empty_prompt_is_refused_with_its_row(tiny_llama, tokenizer):
    with pytest.raises(InvalidTask, match=r"row 2 .*empty prompt"):
        encode(tiny_llama, tokenizer, ["a", ""], ["c", "d"])


def test_a_row_longer_than_the_context_is_refused_with_both_lengths(tiny_gpt2, tokenizer):
    with pytest.raises(InvalidTask, match=r"row 1 has 73 tokens.*context is 64"):
        encode(tiny_gpt2, tokenizer, ["a" * 70], ["b"])


SHOWN = [("one", "1"), ("two", "2"), ("three", "3"), ("four", "4")]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("labels", [None, ["1", "2", "3", "4", "5"]])
def test_demonstrations_that_are_read_once_give_the_answers_and_losses_of_whole_prompts(kind, labels, make_model, tokenizer):
    model = make_model(kind, dtype=torch.float64)
    task = Task(SHOWN, labels=labels, template="{input}:", demonstrations=True)
    pairs = [("five", "5"), ("one two", "1"), ("six and one", "4"), ("two", "2")]
    inputs = [text for text, _ in pairs]
    assert Prefixes.of(model, tokenizer, [tokenizer([task.prompt(text) for text in inputs[:3]])["input_ids"]]) is not None
    with torch.no_grad():
        plain = predict(model, tokenizer, task, inputs, max_new_tokens=6)
        assert predict(model, tokenizer, task, inputs, max_new_tokens=6, share=True) == plain
        alone = losses(model, tokenizer, task, pairs[:3])
        torch.testing.assert_close(losses(model, tokenizer, task, pairs[:3], share=True), alone, rtol=1e-9, atol=0)


def test_demonstrations_are_read_once_also_where_labels_are_calibrated_by_them(make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    shown = [text for text, _ in SHOWN]
    task = Task(SHOWN, labels=["1", "2", "3", "4"], template="{input}:", demonstrations=SHOWN, orders=2, calibrated=shown)
    inputs = [f"{number} five" for number in range(40)]
    counts = []

    def count(_, args, kwargs):
        counts[-1] += kwargs["input_ids"].numel()

    with model.register_forward_pre_hook(count, with_kwargs=True):
        answers = []
        for share in (False, True):
            counts.append(0)
            answers.append(predict(model, tokenizer, task, inputs, share=share))
    assert answers[0] == answers[1]
    assert counts[1] < 0.6 * counts[0]


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_a_prefix_is_shared_only_where_it_is_long_and_a_decoder_reads_it(kind, make_model, tokenizer):
    rows = [[5] * 40 + [token] for token in (6, 7)]
    found = Prefixes.of(make_model(kind), tokenizer, [rows])
    assert (found is None) == (kind == "t5")
    assert Prefixes.of(make_model("llama"), tokenizer, [[[5] * 8, [5] * 9]]) is None
    assert Prefixes.of(make_model("llama"), tokenizer, [rows[:1]]) is None
    # a group that begins with nothing has nothing to put in front of the others' padding
    assert Prefixes.of(make_model("llama"), tokenizer, [rows, [[6, 7], [7, 6]]]) is None


LONGER = [("one", "1"), ("twenty two and a half", "2"), ("three", "3"), ("four", "4")]


@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_answers_in_several_orders_follow_the_average_of_their_probabilities(share, make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    task = Task(LONGER, template="{input}:", demonstrations=True, orders=3)
    inputs = ["five", "six and one", "two"]
    found = predict(model, tokenizer, task, inputs, max_new_tokens=5, share=share)
    for text, answer in zip(inputs, found, strict=True):
        prompts, written = [each.prompt(text) for each in task.in_orders()], []
        assert len(set(prompts)) == 3
        for _ in range(5):
            rows = [tokenizer(prompt)["input_ids"] + written for prompt in prompts]
            p_V = torch.stack([model(torch.tensor([row])).logits[0, -1].softmax(dim=-1) for row in rows]).mean(dim=0)
            if int(p_V.argmax()) in (tokenizer.eos_token_id, *tokenizer("\n", add_special_tokens=False)["input_ids"]):
                break
            written.append(int(p_V.argmax()))
        assert answer == (tokenizer.decode(written, skip_special_tokens=True).splitlines() or [""])[0].strip()


@pytest.mark.parametrize("share", [False, True])
@torch.no_grad()
def test_labels_in_several_orders_have_the_average_of_their_probabilities(share, make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    labels = ["1", "2", "3", "4", "five"]
    task = Task(LONGER, labels=labels, template="{input}:", demonstrations=True, orders=2)
    inputs = ["five", "six and one", "two", "nine"]
    p_NL = torch.zeros(len(inputs), len(labels), dtype=torch.float64)
    for row, text in enumerate(inputs):
        for each in task.in_orders():
            p_NL[row] += p_of_labels(model, tokenizer, each.prompt(text), labels)
    assert predict(model, tokenizer, task, inputs, share=share) == [labels[int(best)] for best in p_NL.argmax(dim=1)]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize(
    ("calibrated", "others"), [(True, ("N/A", "[MASK]", "")), (["one two", "nine", "four"], ("one two", "nine", "four"))]
)
@torch.no_grad()
def test_calibrated_labels_are_divided_by_what_other_inputs_give_them(calibrated, others, share, make_model, tokenizer):
    model = make_model("llama", dtype=torch.float64)
    labels = ["1", "2", "3", "4", "five"]
    plain = Task(LONGER, labels=labels, template="{input}:", demonstrations=True, orders=2)
    inputs = ["five", "six and one", "two", "nine", "one", "four four"]
    p_NL = torch.zeros(len(inputs), len(labels), dtype=torch.float64)
    for each in plain.in_orders():
        neutral_CL = torch.stack([p_of_labels(model, tokenizer, each.prompt(text), labels) for text in others])
        prior_L = neutral_CL.mean(dim=0) if calibrated is True else neutral_CL.prod(dim=0) ** (1 / len(others))
        for row, text in enumerate(inputs):
            ratio_L = p_of_labels(model, tokenizer, each.prompt(text), labels) / prior_L
            p_NL[row] += ratio_L / ratio_L.sum()
    expected = [labels[int(best)] for best in p_NL.argmax(dim=1)]
    assert predict(model, tokenizer, replace(plain, calibrated=calibrated), inputs, share=share) == expected
    assert predict(model, tokenizer, plain, inputs, share=share) != expected
    with pytest.raises(InvalidTask, match=r"calibrated .* no labels"):
        Task(LONGER, calibrated=calibrated)


def stated(monkeypatch, p_of):
    """`predict` ranks labels by p_of(prompt), {label: probability}, in the place of a model's own."""

    def scores(model, tokenizer, prompts, labels, **_):
        return torch.tensor([[p_of(prompt)[label] for label in labels] for prompt in prompts]).double().log()

    monkeypatch.setattr(scoring, "label_scores", scores)


UNBALANCED = [("a 1", "A"), ("a 2", "A"), ("a 3", "A"), ("a 4", "A"), ("b 1", "B")]


def test_members_that_learned_four_examples_of_one_label_are_not_turned_against_it(tiny_llama, tokenizer, monkeypatch):
    learned = {asked for asked, _ in UNBALANCED}

    def p_of(prompt):
        # surer of the examples than of other inputs, and right of both
        right = 0.95 if prompt in learned else 0.8
        return {"A": right, "B": 1 - right} if prompt.startswith("a") else {"A": 1 - right, "B": right}

    stated(monkeypatch, p_of)
    task = Task(UNBALANCED, labels=["A", "B"], template="{input}")
    inputs = ["a 5", "a 6", "a 7", "b 2"]
    right = ["A", "A", "A", "B"]
    assert predict(tiny_llama, tokenizer, task, inputs) == right
    # the geometric mean over all of them divides A by .53 and B by .09
    assert predict(tiny_llama, tokenizer, replace(task, calibrated=[asked for asked, _ in UNBALANCED]), inputs) != right
    members = [replace(task, calibrated=UNBALANCED)] * 2
    given = tiny_llama, tokenizer, members, scoring.equal_shares(2), [inputs] * 2
    assert scoring.predict_together(*given) == right


def calibrated_alone(p_of, task, asked):
    """p_L of one input, each label by its geometric mean over the inputs that have another answer, or an unknown one.

    Of a label that all inputs have, over all.
    """
    ratios = []
    for label in task.labels:
        others = [text for text, answer in task.neutral if answer != label] or [text for text, _ in task.neutral]
        product = math.prod(p_of(text)[label] for text in others)
        ratios.append(p_of(asked)[label] / product ** (1 / len(others)))
    return [ratio / sum(ratios) for ratio in ratios]


@pytest.mark.parametrize(
    "answers", ["AAAAB", "AABBC", "CCCCC", "ABC", "A", "AB??", "AA?", "???"], ids=lambda answers: f"of {answers}"
)
def test_an_input_whose_answer_is_known_tells_the_prior_of_the_other_labels(answers, tiny_llama, tokenizer, monkeypatch):
    drawn = np.random.default_rng(len(answers))
    inputs = [f"input {number}" for number in range(40)]
    neutral = [text if answer == "?" else (text, answer) for text, answer in zip(inputs, answers, strict=False)]
    p_NL = drawn.dirichlet([0.5] * 4, size=len(inputs))
    known = {text: dict(zip("ABCD", p_L, strict=True)) for text, p_L in zip(inputs, p_NL, strict=True)}
    stated(monkeypatch, known.__getitem__)
    task = Task([], labels=list("ABCD"), template="{input}", calibrated=neutral)
    expected = [task.labels[int(np.argmax(calibrated_alone(known.__getitem__, task, asked)))] for asked in inputs]
    assert predict(tiny_llama, tokenizer, task, inputs) == expected
    assert predict(tiny_llama, tokenizer, replace(task, calibrated=False), inputs) != expected


def test_a_known_answer_that_is_no_label_is_refused():
    with pytest.raises(InvalidTask, match=r"calibrating input 2 has target 'C', .* not one of the labels \('A', 'B'\)"):
        Task([], labels=["A", "B"], calibrated=[("a", "A"), ("c", "C")])


def p_of_labels(model, tokenizer, prompt, labels):
    """p_L by the summed log-likelihood of each label and a line break."""
    scores = [-sum_of_losses(model, tokenizer, prompt, f" {label}\n") for label in labels]
    return torch.tensor(scores, dtype=torch.float64).softmax(dim=0)


def sum_of_losses(model, tokenizer, prompt, answer):
    ids, target = tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
    log_p_TV = model(torch.tensor([ids + target])).logits[0].log_softmax(dim=-1)
    return -float(sum(log_p_TV[len(ids) - 1 + place, token] for place, token in enumerate(target)))


def test_orders_turn_the_demonstrations_in_a_ring():
    task = Task(SHOWN, demonstrations=True, orders=3)
    assert [[target for _, target in each.demonstrations] for each in task.in_orders()] == [
        ["1", "2", "3", "4"], ["2", "3", "4", "1"], ["3", "4", "1", "2"]
    ]  # fmt: skip
    assert len(Task(SHOWN[:2], demonstrations=True, orders=5).in_orders()) == 2
    assert Task(SHOWN, orders=3).in_orders()[0].prompt("x") == Task(SHOWN).prompt("x")
    with pytest.raises(InvalidTask, match="orders is 0"):
        Task(SHOWN, orders=0)


def test_answers_after_demonstrations_end_as_those_do(tiny_llama, tokenizer):
    task = Task(SHOWN, demonstrations=True)
    (row,) = encode_pairs(tiny_llama, tokenizer, task, [("five", "5")])
    assert list(row.target) == tokenizer([" 5\n"], add_special_tokens=False)["input_ids"][0]
    (row,) = encode_pairs(tiny_llama, tokenizer, Task(SHOWN), [("five", "5")])
    assert row.target[-1] == tokenizer.eos_token_id
