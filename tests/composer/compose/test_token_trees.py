"""Rows that begin alike as one tree: what it holds, which models run it, and that every row keeps the loss it has alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import draw_model

import loraweave as lw
from loraweave.composer.compose.examples import in_turn, runs_trees, token_tree, tree_inputs
from loraweave.composer.compose.loss import ExampleLoss
from loraweave.composer.model.batches import IGNORED, EncodedRow, batch, encode, mean_losses
from loraweave.extensions.tour import load_task

ROOT = Path(__file__).parents[3]

SPECIAL = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {**SPECIAL, **SIZES, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 4}
EXPERTS = {**DECODER, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "num_experts": 4, "num_local_experts": 4}
TREES = {
    "llama": DECODER,
    "mistral": {**DECODER, "sliding_window": None},
    "qwen2": DECODER,
    "qwen3": DECODER,
    "gemma": DECODER,
    "phi": {**SPECIAL, **SIZES},
    "gpt2": {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {**SPECIAL, **SIZES},
    "mixtral": EXPERTS,
}
PLAIN = {
    "bloom": {**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 2},
    "mamba": {**SPECIAL, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    "mistral": {**DECODER, "sliding_window": 8},
    "gemma2": {**DECODER, "sliding_window": 8},
    "gpt_oss": {**EXPERTS, "sliding_window": 8},
}
# the layers that the adapter updates
TARGETS = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "bloom": "query_key_value", "mamba": "in_proj"}
MIXTURE = {"a": 0.4}
TASK = lw.Task([("a", "ab"), ("bb", "ba"), ("ccc", "c"), ("d", "DD")], instruction="swap the two")


def make(family, settings, dtype=torch.float64):
    config = transformers.AutoConfig.for_model(family, **settings)
    model = draw_model(lambda: transformers.AutoModelForCausalLM.from_config(config))
    # the products over experts are in fp32 at most
    return model.to(torch.float32 if "num_experts" in settings else dtype)


def rows(model, tokenizer):
    return encode(model, tokenizer, [TASK.prompt(x) for x, _ in TASK.examples], [y for _, y in TASK.examples])


def test_examples_in_turn_are_read_in_two_passes_over_the_demonstrations(tiny_llama, tokenizer):
    task = lw.Task([(letter, letter.upper()) for letter in "abcdefg"], instruction="shout", demonstrations=True)
    shown = ["".join(text for text, _ in own.shown) for own in in_turn(task)]
    assert shown == ["gfedcb", "gfedc", "gfed", "abc", "abcd", "abcde", "abcdef"]
    others = replace(task, demonstrations=[("x", "X"), ("y", "Y")])
    assert [own.shown for own in in_turn(others)] == [others.shown] * 7

    def tokens(tasks):
        prompts = [own.prompt(text) for own, (text, _) in zip(tasks, task.examples, strict=True)]
        rows = encode(tiny_llama, tokenizer, prompts, [target for _, target in task.examples])
        return len(token_tree(rows)), max(map(len, rows))

    turned, longest = tokens(in_turn(task))
    assert turned < 2.1 * longest < 0.6 * tokens([task] * 7)[0]


@pytest.fixture
def engine(make_adapter):
    """engine(model, family): with an adapter "a" on some layer of every block."""
    return lambda model, family: lw.Composer(model, [make_adapter(model, "a", targets=[TARGETS.get(family, "q_proj")])])


@torch.no_grad()
def alone(engine, tokenizer):
    with engine.activate(MIXTURE):
        found = [mean_losses(engine.model, batch(engine.model, tokenizer, [row])) for row in rows(engine.model, tokenizer)]
    return torch.cat(found).double()


def together(engine, tokenizer):
    objective = ExampleLoss(engine, tokenizer, TASK)
    return torch.tensor(objective.scores([lw.MixtureWeights.of(MIXTURE, "a")])[0][0])


@pytest.mark.parametrize("family", TREES)
def test_a_model_that_runs_trees_gives_every_row_its_own_loss(family, tokenizer, engine):
    model = make(family, TREES[family])
    assert runs_trees(model, tokenizer, rows(model, tokenizer))
    assert ExampleLoss(engine(model, family), tokenizer, TASK).encoded.trees_of((0, 1, 2, 3))
    # mean_losses rounds to fp32, and so do some models inside
    tolerance = 1e-6 if model.dtype == torch.float64 else 1e-5
    found, expected = together(engine(model, family), tokenizer), alone(engine(model, family), tokenizer)
    assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("family", PLAIN)
def test_other_models_run_their_rows_plainly_to_the_same_losses(family, tokenizer, engine):
    # in float64, transformers' own masks make some of these give NaN
    model = make(family, PLAIN[family], torch.float32)
    assert not runs_trees(model, tokenizer, rows(model, tokenizer))
    assert torch.allclose(
        together(engine(model, family), tokenizer), alone(engine(model, family), tokenizer), rtol=1e-5, atol=1e-5
    )


def test_a_window_that_no_row_fills_does_not_matter(tokenizer):
    model = make("mistral", {**DECODER, "sliding_window": 40})
    assert runs_trees(model, tokenizer, rows(model, tokenizer))


def test_an_encoder_decoder_runs_its_rows_plainly(tiny_t5, tokenizer):
    assert not runs_trees(tiny_t5, tokenizer, rows(tiny_t5, tokenizer))


@pytest.mark.own_models
def test_a_model_that_ignores_the_mask_is_found_out_by_trial(tiny_llama, tokenizer, monkeypatch):
    inner = tiny_llama.model
    forward = inner.forward

    def blind(*args, attention_mask=None, **kwargs):
        return forward(*args, attention_mask=None if attention_mask.ndim == 4 else attention_mask, **kwargs)

    monkeypatch.setattr(inner, "forward", blind)
    assert not runs_trees(tiny_llama, tokenizer, rows(tiny_llama, tokenizer))


@pytest.mark.own_models
def test_a_model_that_refuses_the_mask_runs_its_rows_plainly(tiny_llama, tokenizer, monkeypatch):
    inner = tiny_llama.model
    forward = inner.forward

    def strict(*args, attention_mask=None, **kwargs):
        if attention_mask.ndim != 2:
            raise ValueError("the mask has two axes")
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(inner, "forward", strict)
    assert not runs_trees(tiny_llama, tokenizer, rows(tiny_llama, tokenizer))


def test_rows_are_run_as_smaller_trees_where_one_would_be_too_wide(tiny_llama, tokenizer, engine):
    """A token of a tree meets all its tokens in attention, whether it sees them or not."""
    task = lw.Task([(f"{number}", "a" * 8) for number in range(12)], template="swap the two characters: {input}")
    encoded = ExampleLoss(engine(tiny_llama, "llama"), tokenizer, task).encoded
    batch = encoded.batch([tuple(range(12))])
    assert 1 < batch.rows_of_job[0] < 12


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_real_model_runs_trees_of_its_examples(dtype):
    task = load_task(ROOT / "examples" / "data", "rhyme", 0, num_test=0).task
    adapter = lw.Adapter.from_pretrained(ROOT / "examples" / "pool" / "emotion")
    texts = [task.prompt(text) for text, _ in task.examples], [target for _, target in task.examples]

    def row_by_row(engine, weight):
        with torch.no_grad(), engine.activate({"emotion": weight}):
            return mean_losses(
                engine.model, batch(engine.model, tokenizer, encode(engine.model, tokenizer, *texts))
            ).double()

    exact, tokenizer = lw.load_base(dtype=torch.float32)
    engines = [lw.Composer(model, [adapter]) for model in (exact, lw.load_base(dtype=dtype)[0])]
    objective = ExampleLoss(engines[1], tokenizer, task, l1=0.0)
    # five texts of 19 tokens, 13 of which are common; the last ones predict nothing
    assert objective.encoded.size(objective.only)[0] == 13 + 5 * (19 - 13 - 1)
    weights = (0.0, 0.25, 0.5, 0.75, 1.0, -0.5)
    expected, plain = (torch.stack([row_by_row(engine, weight) for weight in weights]) for engine in engines)
    candidates = [lw.MixtureWeights.of({"emotion": weight}, ("emotion",)) for weight in weights]
    found = torch.stack([torch.from_numpy(objective.scores([candidate])[0][0]) for candidate in candidates])
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    else:
        # a row errs by up to 4 % in bf16, in a tree or not
        error, usual = (((each - expected) / expected).pow(2).mean().sqrt() for each in (found, plain))
        assert error < 1.5 * usual
        assert torch.allclose(found.mean(1), expected.mean(1), rtol=1e-2)


ROWS = [EncodedRow((7, 8, 9), (1, 2)), EncodedRow((7, 8, 9), (1, 3, 2)), EncodedRow((7, 8), (5,)), EncodedRow((4,), (9,))]


def read(row):
    return (row.prompt + row.target)[:-1]


def test_what_rows_begin_with_in_common_is_read_once():
    tree = token_tree(ROWS)
    beginnings = {read(row)[: end + 1] for row in ROWS for end in range(len(read(row)))}
    assert len(tree) == len(beginnings) == 6


def test_every_predictor_sees_its_own_row_up_to_itself_and_nothing_else():
    tree = token_tree(ROWS)
    for number, row in enumerate(ROWS):
        for k in range(len(row.target)):
            slot = int(tree.slot_RK[number, k])
            seen = tree.sees_TT[slot].nonzero().flatten()
            by_position = {int(tree.position_T[place]): int(tree.ids_T[place]) for place in seen}
            expected = read(row)[: len(row.prompt) + k]
            assert by_position == dict(enumerate(expected))
            assert len(seen) == len(expected)


def test_predictors_come_last_and_targets_are_ignored_beyond_a_shorter_one():
    tree = token_tree(ROWS)
    used = {int(slot) for row, slots in zip(ROWS, tree.slot_RK, strict=True) for slot in slots[: len(row.target)]}
    assert used == set(range(-tree.num_predictors, 0))
    assert tree.target_RK.tolist() == [[1, 2, IGNORED], [1, 3, 2], [5, IGNORED, IGNORED], [9, IGNORED, IGNORED]]


def test_a_batch_of_trees_hides_its_padding(tiny_llama):
    trees = [token_tree(ROWS[:2]), token_tree(ROWS[2:3])]
    inputs = tree_inputs(tiny_llama, trees)
    assert inputs["input_ids"].shape == (2, 5)
    assert inputs["attention_mask"].shape == (2, 1, 5, 5)
    seen_BTT = inputs["attention_mask"][:, 0] == 0
    assert torch.equal(seen_BTT[1, 3:, 3:], trees[1].sees_TT)
    assert not seen_BTT[1, 3:, :3].any()
    assert torch.equal(seen_BTT[1, :3, :3], torch.eye(3, dtype=torch.bool))
