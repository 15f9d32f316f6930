"""An activated LoRA gives what PEFT's gives, from its invocation tokens on; before them the model is the base."""

import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from transformers import DynamicCache

import loraweave as lw
from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.invoked import last_place
from loraweave.routers.tokens._call import prompted

ANSWER, JUDGE = (7, 8, 9), (21, 5)
INVOCATIONS = {"answer": ANSWER, "judge": JUDGE, "plain": None}
# the first has each invocation twice, the second that of "answer" alone, the third none
ROWS = torch.tensor(
    [
        [3, 7, 8, 9, 21, 5, 30, 7, 8, 9, 21, 5, 33],
        [40, 41, 42, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17],
        [50, 7, 8, 51, 52, 53, 21, 54, 55, 56, 57, 58, 59],
    ]
)


def config(invocation, **options):
    return peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], alora_invocation_tokens=invocation,
        task_type="CAUSAL_LM", init_lora_weights=False, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def their_model(make_model):
    """PEFT's model with two activated LoRAs and a plain one."""
    base = copy.deepcopy(make_model("llama"))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        # PEFT 0.21 asks a model of transformers 5 for an attribute that has another name by now
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        model = peft.get_peft_model(base, config(list(ANSWER)), adapter_name="answer")
    for name in ("judge", "plain"):
        model.add_adapter(name, config(INVOCATIONS[name] and list(INVOCATIONS[name])))
    return model.eval()


@pytest.fixture(scope="module")
def folders(their_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        # no model hub has a tiny model, whose vocabulary PEFT would like to know
        warnings.simplefilter("ignore")
        their_model.save_pretrained(folder)
    return folder


@pytest.fixture
def engine(make_model, folders):
    adapters = {name: lw.Adapter.from_pretrained(folders / name) for name in INVOCATIONS}
    return lw.Composer(make_model("llama"), adapters)


@torch.no_grad()
def theirs(model, ids, name):
    """PEFT's logits under one adapter."""
    model.set_adapter(name)
    return model(input_ids=ids).logits


@torch.no_grad()
def ours(engine, ids, mixture, **inputs):
    with engine.activate(mixture):
        return engine.model(input_ids=ids, **inputs).logits


def greedy(model, ids, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)


def test_the_last_place_of_tokens_in_a_row():
    assert last_place([7, 8, 7, 8, 9], (7, 8)) == 2
    assert last_place([7, 7, 7], (7, 7)) == 1
    assert last_place([7, 8], (7, 8)) == 0
    assert last_place([8, 7], (7, 8)) is None
    assert last_place([7], (7, 8)) is None


def test_a_peft_folder_is_read_and_written_with_its_invocation_tokens(engine, folders, tmp_path):
    assert {name: adapter.invocation for name, adapter in engine.pool.adapters.items()} == {
        "answer": ANSWER, "judge": JUDGE, "plain": (),
    }  # fmt: skip
    written = engine.pool["answer"].save_pretrained(tmp_path / "again")
    read = lw.Adapter.from_pretrained(written)
    assert (read.invocation, read.hash) == (ANSWER, engine.pool["answer"].hash)
    assert peft.LoraConfig.from_pretrained(written).alora_invocation_tokens == list(ANSWER)


@pytest.mark.parametrize("name", list(INVOCATIONS))
def test_logits_are_those_of_peft(engine, their_model, name):
    torch.testing.assert_close(ours(engine, ROWS, {name: 1.0}), theirs(their_model, ROWS, name), atol=1e-5, rtol=1e-5)


def test_a_row_without_the_invocation_and_tokens_before_it_are_the_bases(engine):
    with torch.no_grad():
        base = engine.model(ROWS).logits
    found = ours(engine, ROWS, {"answer": 1.0})
    assert torch.equal(found[2], base[2])
    assert torch.equal(found[0, :7], base[0, :7])
    assert not torch.allclose(found[0, 7:], base[0, 7:], atol=1e-3)


def test_rows_with_different_adapters_are_each_what_peft_gives_that_row(engine, their_model):
    names = ["judge", "answer", "plain"]
    found = ours(engine, ROWS, [{name: 1.0} for name in names])
    for number, name in enumerate(names):
        own = ROWS[number : number + 1]
        torch.testing.assert_close(found[number], theirs(their_model, own, name)[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        mixed = their_model(input_ids=ROWS, adapter_names=names).logits
    torch.testing.assert_close(found, mixed, atol=1e-5, rtol=1e-5)


def test_a_mixture_of_activated_and_plain_is_the_formula_with_weights_by_token(engine):
    on_BT = {"answer": torch.zeros(3, 13), "judge": torch.zeros(3, 13), "plain": torch.ones(3, 13)}
    for name, row, start in (("answer", 0, 7), ("answer", 1, 3), ("judge", 0, 10)):
        on_BT[name][row, start:] = 1
    weights = {"answer": 0.7, "judge": -0.4, "plain": 0.5}
    values_BTE = torch.stack([weights[name] * on_BT[name] for name in weights], dim=-1)
    plain = {name: replace(adapter, invocation=()) for name, adapter in engine.pool.adapters.items()}
    by_token = lw.MixtureWeights(values_BTE[:, :, None], tuple(weights))
    expected = ours(lw.Composer(engine.model, plain), ROWS, by_token)
    torch.testing.assert_close(ours(engine, ROWS, weights), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("name", ["answer", "judge"])
def test_generation_is_that_of_peft(engine, their_model, name, cache):
    their_model.set_adapter(name)
    expected = greedy(their_model, ROWS)
    options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
    with engine.activate({name: 1.0}):
        assert torch.equal(greedy(engine.model, ROWS, **options), expected)


def test_an_invocation_that_the_model_writes_itself_activates_nothing(engine, their_model):
    # greedy decoding of these rows goes on with JUDGE where the processor puts it
    class Writes:
        def __call__(self, ids_BT, scores_BV):
            place = ids_BT.shape[1] - ROWS.shape[1]
            if place < len(JUDGE):
                scores_BV = torch.full_like(scores_BV, -1e9)
                scores_BV[:, JUDGE[place]] = 0.0
            return scores_BV

    rows = ROWS[1:]
    their_model.set_adapter("judge")
    with engine.activate({"judge": 1.0}):
        found = greedy(engine.model, rows, logits_processor=[Writes()])
    assert torch.equal(found, greedy(their_model, rows, logits_processor=[Writes()]))
    assert torch.equal(found, greedy(engine.model, rows, logits_processor=[Writes()]))


def test_padding_on_the_left_changes_nothing(engine):
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ROWS], dim=1)
    mask = (torch.arange(17) >= 4).long().expand(3, -1)
    mixture = [{"judge": 1.0}, {"answer": 1.0}, {"plain": 1.0}]
    place = (mask.cumsum(1) - 1).clamp(min=0)
    found = ours(engine, padded, mixture, attention_mask=mask, position_ids=place)[:, 4:]
    torch.testing.assert_close(found, ours(engine, ROWS, mixture), atol=1e-5, rtol=1e-5)


def test_beams_and_several_sequences_are_those_of_the_row_alone(engine):
    options = {"num_beams": 3, "num_return_sequences": 2}
    with engine.activate([{"judge": 1.0}, {"answer": 1.0}, None]):
        together = greedy(engine.model, ROWS, **options)
    for number, mixture in enumerate([{"judge": 1.0}, {"answer": 1.0}, None]):
        with engine.activate(mixture or {}):
            alone = greedy(engine.model, ROWS[number : number + 1], **options)
        assert torch.equal(together[2 * number : 2 * number + 2], alone)


def test_rows_of_one_prompt_may_have_a_mixture_each(engine):
    rows, mixtures = ROWS[:1].expand(3, -1), [None, {"plain": 1.0}, {"answer": 1.0}]
    with prompted(ROWS[:1], torch.ones(1, 13)):
        found = ours(engine, rows, mixtures)
    torch.testing.assert_close(found, ours(engine, rows, mixtures), atol=1e-5, rtol=1e-5)
    assert torch.equal(found[2, :7], found[0, :7])


def test_the_bases_cache_of_what_stands_before_the_invocation_serves_all(engine):
    before = torch.randint(30, 60, (1, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        shared = engine.model(before, use_cache=True).cache
    for name in ("answer", "judge"):
        asked = torch.tensor([[4, *INVOCATIONS[name], 6]])
        whole = torch.cat([before, asked], dim=1)
        after = ours(engine, asked, {name: 1.0}, cache=copy.deepcopy(shared))
        torch.testing.assert_close(after, ours(engine, whole, {name: 1.0})[:, 20:], atol=1e-5, rtol=1e-5)
        with engine.activate({name: 1.0}):
            expected = greedy(engine.model, whole)
            assert torch.equal(greedy(engine.model, whole, cache=copy.deepcopy(shared)), expected)


def test_a_conversation_asks_one_after_the_other_over_one_cache(engine):
    """Each token has the weights that it was read with: turn by turn over one cache, as in one pass by token."""
    turns = [("answer", [3, 30, *ANSWER, 31]), ("judge", [32, 33, *JUDGE, 34]), ("answer", [35, *ANSWER, 36, 37])]
    cache, parts, values = DynamicCache(), [], []
    for name, ids in turns:
        parts.append(ours(engine, torch.tensor([ids]), {name: 1.0}, cache=cache, use_cache=True))
        start = last_place(ids, INVOCATIONS[name])
        values += [[float(place >= start and name == other) for other in INVOCATIONS] for place in range(len(ids))]
    plain = {name: replace(adapter, invocation=()) for name, adapter in engine.pool.adapters.items()}
    by_token = lw.MixtureWeights(torch.tensor(values)[None, :, None], tuple(INVOCATIONS))
    whole = torch.tensor([[token for _, ids in turns for token in ids]])
    expected = ours(lw.Composer(engine.model, plain), whole, by_token)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_token_by_token_by_hand_goes_on_where_the_prompt_began(engine, their_model):
    their_model.set_adapter("answer")
    expected = greedy(their_model, ROWS[:2])[:, 13:]
    ids, cache, found = ROWS[:2], DynamicCache(), []
    for _ in range(6):
        # an activation of its own for each step, as an engine that serves several has
        last = ours(engine, ids, {"answer": 1.0}, cache=cache, use_cache=True)[:, -1]
        ids = last.argmax(dim=-1, keepdim=True)
        found.append(ids)
    assert torch.equal(torch.cat(found, dim=1), expected)


def test_weights_that_learn_get_the_gradient_of_the_tokens_after_the_invocation(engine):
    values = torch.tensor([0.3, 0.6], requires_grad=True)
    mixture = lw.MixtureWeights(values[None, None, None], ("answer", "plain"))
    with engine.activate(mixture):
        engine.model(ROWS[1:2]).logits[:, :3].sum().backward()
    assert values.grad[0] == 0
    assert values.grad[1] != 0


def test_a_router_over_activated_experts_is_cut_before_the_invocation(engine):
    class Halves:
        def weights(self, x_BTI, layer):
            return torch.full((*x_BTI.shape[:2], 3), 0.5)

    half = dict.fromkeys(INVOCATIONS, 0.5)
    torch.testing.assert_close(ours(engine, ROWS, Halves()), ours(engine, ROWS, half), atol=1e-5, rtol=1e-5)


def test_a_cache_of_which_the_invocation_is_not_known_is_refused(engine):
    with torch.no_grad():
        cache = engine.model(ROWS, use_cache=True).cache
    with pytest.raises(ScopeError, match=r"'answer' acts only from its invocation tokens \[7, 8, 9\].*Row 0"):
        ours(engine, torch.full((3, 1), 4), {"answer": 1.0}, cache=cache)
    # a row of the base needs none
    assert ours(engine, torch.full((3, 1), 4), [None, None, {"plain": 1.0}], cache=cache).shape == (3, 1, 61)


def test_calls_without_token_ids_and_encoder_decoders_are_refused(engine, make_model, make_adapter):
    embedded = engine.model.get_input_embeddings()(ROWS)
    with engine.activate({"answer": 1.0}), pytest.raises(ScopeError, match="no input_ids"):
        engine.model(inputs_embeds=embedded)
    t5 = make_model("t5")
    made = make_adapter(t5, "answer", targets=("q", "v"))
    adapter = lw.Adapter("answer", "tiny", made.layers, invocation=ANSWER)
    with lw.Composer(t5, [adapter]).activate({"answer": 1.0}), pytest.raises(ScopeError, match="encoder and a decoder"):
        t5(input_ids=ROWS, decoder_input_ids=ROWS)


def test_what_would_count_for_every_token_is_refused_by_name(engine):
    answer, plain = engine.pool["answer"], engine.pool["plain"]
    with pytest.raises(ScopeError, match=r"'answer' acts only from its invocation tokens"), engine.fused({"answer": 1.0}):
        pass
    with engine.fused({"plain": 1.0}):
        pass
    with pytest.raises(CompositionError, match=r"'answer', which acts from .* 'plain', which acts on every token"):
        lw.merge([answer, plain], progress=False)
    task = lw.Task([("a", "b"), ("c", "d")])
    with pytest.raises(CompositionError, match=r"cannot merge adapter 'answer'"):
        lw.compose(engine.model, print, [answer, plain], task, method="lorahub", progress=False)
    with pytest.raises(ScopeError, match="training lets an adapter act on every token"):
        lw.train_adapters(engine.model, None, {"t": [("a", "b")]}, start={"t": answer}, progress=False)


def test_a_merge_of_one_invocation_keeps_it(engine):
    answer = engine.pool["answer"]
    other = lw.Adapter("other", answer.base_model, engine.pool["plain"].layers, invocation=ANSWER)
    merged = lw.merge([answer, other], [0.75, 0.25], progress=False)
    assert merged.invocation == ANSWER
    mixed = lw.Composer(engine.model, [answer, other, merged])
    expected = ours(mixed, ROWS, {"answer": 0.75, "other": 0.25})
    torch.testing.assert_close(ours(mixed, ROWS, {merged.name: 1.0}), expected, atol=1e-5, rtol=1e-5)
    assert lw.merge([answer], [0.5]).invocation == ANSWER


def test_a_hub_keeps_the_tokens_and_tells_the_adapter_from_the_plain_one(engine, tmp_path):
    answer = engine.pool["answer"]
    plain = lw.Adapter("plain_one", answer.base_model, answer.layers)
    assert answer.hash != plain.hash
    with lw.Hub(tmp_path / "hub") as hub:
        hub.add(answer, name="activated")
        hub.add(plain)
        assert hub["activated"].invocation == ANSWER
        assert hub["plain_one"].invocation == ()
        assert (hub["activated"].hash, hub["plain_one"].hash) == (answer.hash, plain.hash)
        assert hub.verify().ok
        lazy = lw.Composer(engine.model, hub.pool(lazy=True))
        assert torch.equal(ours(lazy, ROWS, {"activated": 1.0}), ours(engine, ROWS, {"answer": 1.0}))
