"""Generation: caches, beams, return sequences and left padding, with a mixture per row."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_models import Make, logits
from tiny_models import model_inputs as inputs
from torch import Tensor, nn

from loraweave.composer.composer import Composer
from loraweave.errors import CompositionError, ScopeError
from loraweave.routers.weights import MixtureWeights


class Tokens:
    """A tokenizer of texts such as "5 8 13": the numbers are the ids."""

    pad_token_id = 0
    eos_token_id = 2
    bos_token_id = 1

    def __call__(self, texts: list[str]) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(token) for token in text.split()] for text in texts]}

    def batch_decode(self, sequences: Tensor, *, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(token) for token in row if token > 2) for row in sequences.tolist()]


TEXTS = ["5 8 13 21 34", "9", "7 30 11"]
ROWS = [{"a": 1.0}, {"b": 0.5, "c": -0.5}, None]


@pytest.fixture
def engine(tiny_llama: nn.Module, make_adapters: Make) -> Composer:
    return Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=Tokens())


@pytest.fixture
def exact(make_model: Make, make_adapters: Make) -> Composer:
    model = make_model("llama", dtype=torch.float64)
    return Composer(model, make_adapters(model, "llama"), tokenizer=Tokens())


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "length_penalty": -1.0, "early_stopping": True, "repetition_penalty": 1.2},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=["greedy", "beams", "several beams", "penalties", "static cache", "no cache"],
)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_generation_of_a_mixed_batch_equals_each_text_alone(
    kind: str, settings: dict[str, Any], make_model: Make, make_adapters: Make
) -> None:
    model = make_model(kind, dtype=torch.float64)
    engine = Composer(model, make_adapters(model, kind), tokenizer=Tokens())
    together = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=6, do_sample=False, **settings)
    each = settings.get("num_return_sequences", 1)
    assert len(together) == each * len(TEXTS)
    for index, text in enumerate(TEXTS):
        alone = engine.generate([text], mixture=ROWS[index] or {}, max_new_tokens=6, do_sample=False, **settings)
        assert together[index * each : (index + 1) * each] == alone
    assert not engine.active


def test_sampled_return_sequences_are_scored_by_their_own_mixture(exact: Composer) -> None:
    batch = inputs("llama")
    torch.manual_seed(0)
    with exact.activate(ROWS):
        output = exact.model.generate(
            **batch,
            do_sample=True,
            num_return_sequences=3,
            max_new_tokens=4,
            min_new_tokens=4,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert output.sequences.shape[0] == 9
    scored = torch.stack(output.logits, dim=1)
    for index, sequence in enumerate(output.sequences):
        with exact.activate(ROWS[index // 3] or {}):
            alone = logits(exact.model, {"input_ids": sequence[None]})[0, 6:-1]
        assert torch.allclose(scored[index].double(), alone, rtol=1e-5, atol=1e-5)


def test_sampled_beams_are_scored_by_their_own_mixture(exact: Composer) -> None:
    settings = {"num_beams": 3, "do_sample": True, "top_k": 0, "length_penalty": 0.0, "num_return_sequences": 2}
    torch.manual_seed(0)
    with exact.activate(ROWS):
        output = exact.model.generate(
            **inputs("llama"),
            **settings,
            min_new_tokens=4,
            max_new_tokens=4,
            output_scores=True,
            return_dict_in_generate=True,
        )
    for index, sequence in enumerate(output.sequences):
        with exact.activate(ROWS[index // 2] or {}):
            alone_TV = logits(exact.model, {"input_ids": sequence[None]})[0, 6:-1]
        expected = alone_TV.log_softmax(-1).gather(1, sequence[7:, None]).sum()
        assert torch.allclose(output.sequences_scores[index].double(), expected, rtol=1e-5, atol=1e-5)


def test_cached_generation_equals_uncached(exact: Composer) -> None:
    cached, uncached = (
        exact.generate(TEXTS, mixture=ROWS, max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert cached == uncached
    assert cached != exact.generate(TEXTS, max_new_tokens=8, do_sample=False)


def test_generation_returns_the_continuation_only(engine: Composer) -> None:
    ids = torch.tensor([[9]])
    expected = engine.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert engine.generate(["9"], max_new_tokens=4, do_sample=False) == Tokens().batch_decode(
        expected[:, 1:], skip_special_tokens=True
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"cache_implementation": "static"},
        {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
        {"cache_implementation": "dynamic", "prefill_chunk_size": 2},
    ],
    ids=["static", "8-bit", "in chunks"],
)
def test_caches_of_other_kinds_give_the_tokens_of_a_model_with_these_weights(
    settings: dict[str, Any], make_model: Make, make_adapters: Make, with_dense_update: Make
) -> None:
    if "cache_config" in settings and not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("of later versions of transformers")
    model = make_model("llama", dtype=torch.float64)
    adapters = make_adapters(model, "llama")
    dense = Composer(
        with_dense_update("llama", adapters, [0.5, -0.25, 1.0], dtype=torch.float64), adapters, tokenizer=Tokens()
    )
    engine = Composer(model, adapters, tokenizer=Tokens())
    options = {"max_new_tokens": 8, "do_sample": False, **settings}
    found = engine.generate(TEXTS, mixture={"a": 0.5, "b": -0.25, "c": 1.0}, **options)
    assert found == dense.generate(TEXTS, **options)
    assert found != engine.generate(TEXTS, **options)


@pytest.mark.parametrize("each", [1, 3])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_seeded_sampling_draws_for_each_text_what_it_draws_alone(
    kind: str, each: int, make_model: Make, make_adapters: Make
) -> None:
    model = make_model(kind, dtype=torch.float64)
    engine = Composer(model, make_adapters(model, kind), tokenizer=Tokens())
    settings = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": each, "temperature": 2.0, "top_k": 30}
    together = engine.generate(TEXTS, mixture=ROWS, seeds=[5, 6, 7], **settings)
    for index, text in enumerate(TEXTS):
        # what transformers itself draws for the text alone under that seed
        with torch.random.fork_rng():
            torch.manual_seed(5 + index)
            alone = engine.generate([text], mixture=ROWS[index] or {}, **settings)
        assert together[index * each : (index + 1) * each] == alone
    assert together != engine.generate(TEXTS, mixture=ROWS, seeds=[8, 9, 10], **settings)


@pytest.mark.parametrize(
    "assistance",
    [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {"assistant_model": "another"}],
    ids=["prompt lookup", "early exit", "another model"],
)
def test_assisted_generation_gives_the_mixtures_own_tokens(
    assistance: dict[str, Any], make_model: Make, make_adapters: Make
) -> None:
    model = make_model("llama", dtype=torch.float64)
    engine = Composer(model, make_adapters(model, "llama"), tokenizer=Tokens())
    if "assistant_model" in assistance:
        # the same base, which guesses without the mixture: many guesses are wrong, and are taken back
        assistance = {"assistant_model": make_model("llama", dtype=torch.float64)}
    text = "5 8 13 5 8 13 5 8"
    found = engine.generate([text], mixture=ROWS[1], max_new_tokens=12, do_sample=False, **assistance)
    assert found == engine.generate([text], mixture=ROWS[1], max_new_tokens=12, do_sample=False)
    assert found != engine.generate([text], max_new_tokens=12, do_sample=False)


def test_a_cache_of_a_common_beginning_is_used_on(cache_argument: Callable[[nn.Module], str], exact: Composer) -> None:
    batch = inputs("llama", tokens=7)
    with exact.activate(ROWS):
        expected = exact.model.generate(**batch, max_new_tokens=6, do_sample=False)
        cache = exact.model(input_ids=batch["input_ids"][:, :5]).past_key_values
        found = exact.model.generate(**batch, **{cache_argument(exact.model): cache}, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


def test_stopping_criteria_end_each_text_by_itself(tiny_llama: nn.Module, make_adapters: Make) -> None:
    from transformers import StoppingCriteriaList

    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=Tokens())
    lengths = torch.tensor([7, 8, 9])

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return ids.shape[1] >= lengths

    criteria = StoppingCriteriaList([stop])
    full = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    found = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=6, do_sample=False, stopping_criteria=criteria)
    # five tokens of prompt
    assert [text.split() for text in found] == [text.split()[: int(n) - 5] for text, n in zip(full, lengths, strict=True)]


def test_stop_strings_need_no_tokenizer_of_the_callers(tiny_llama: nn.Module, make_adapters: Make, tokenizer: Any) -> None:
    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=tokenizer)
    (full,) = engine.generate(["what"], mixture={"a": 1.0}, max_new_tokens=8, do_sample=False)
    (found,) = engine.generate(["what"], mixture={"a": 1.0}, max_new_tokens=8, do_sample=False, stop_strings=full[2:4])
    assert found == full[: full.index(full[2:4]) + 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "dola generation"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5}, "group beam search"),
        ({"num_beams": 4, "force_words_ids": [[5]]}, "constrained beam search"),
        ({"custom_generate": "somebody/something"}, "code that transformers downloads"),
        ({"cache_implementation": "paged"}, "continuous batching"),
        ({"attention_mask": torch.ones(3, 2)}, "attention_mask is made from the texts"),
        ({"inputs_embeds": torch.ones(3, 2, 16)}, "inputs_embeds is made from the texts"),
        ({"prompt_lookup_num_tokens": 3}, "one text at a time, but there are 3"),
        ({"seeds": [1, 2]}, "2 seeds, but 3 texts"),
        ({"seeds": [1, 2, 3]}, "seeds are for sampling, and this call is greedy search"),
        ({"seeds": [1, 2, 3], "do_sample": True, "num_beams": 2}, "this call is beam sample"),
    ],
)
@pytest.mark.parametrize("call", ["generate", "stream"])
def test_ways_of_decoding_that_would_leave_the_mixture_are_refused(
    call: str, settings: dict[str, Any], message: str, engine: Composer
) -> None:
    with pytest.raises((CompositionError, ScopeError), match=message):
        getattr(engine, call)(TEXTS, mixture=ROWS, max_new_tokens=3, **settings)
    assert not engine.active


@pytest.mark.skipif(not hasattr(transformers, "ContinuousBatchingConfig"), reason="of later versions of transformers")
def test_continuous_batching_is_refused_while_an_activation_is_open_and_works_under_fused(
    make_model: Make, make_adapters: Make, with_dense_update: Make
) -> None:
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    model = make_model("llama")
    adapters = make_adapters(model, "llama")
    engine = Composer(model, adapters)
    config = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32)

    def batched(model: Any) -> list[Any]:
        prompts = [[5, 8, 13, 21], [9, 7]]
        found = model.generate_batch(prompts, max_new_tokens=3, continuous_batching_config=config, warmup=False)
        return [(each.generated_tokens, each.error) for each in found.values()]

    with engine.fused({"a": 1.0}):
        assert batched(model) == batched(with_dense_update("llama", adapters[:1], [1.0]))
    with engine.activate({"a": 1.0}):
        answers = batched(model)
    assert [tokens for tokens, _ in answers] == [[], []]
    assert all("continuous batching packs requests" in str(error) for _, error in answers)


@pytest.mark.parametrize("rows", [1, 2, 4, 5])
@torch.no_grad()
def test_rows_that_do_not_fit_are_refused_before_the_cache_takes_anything(
    rows: int, tiny_llama: nn.Module, make_adapter: Make, cache_argument: Callable[[nn.Module], str]
) -> None:
    # an expert for the last layer alone: those before it would have run
    engine = Composer(tiny_llama, [make_adapter(tiny_llama, name, targets=("lm_head",)) for name in "ab"])
    ids = inputs("llama", rows=rows)["input_ids"]
    cache = tiny_llama(input_ids=ids[:, :4]).past_key_values
    with engine.activate([{"a": 1.0}, {"b": 1.0}, None]):
        for batch in ({"input_ids": ids[:, 4:]}, {"inputs_embeds": tiny_llama.get_input_embeddings()(ids[:, 4:])}):
            with pytest.raises(ScopeError, match=f"3 rows, but the batch has {rows}"):
                tiny_llama(**batch, **{cache_argument(tiny_llama): cache})
    assert cache.get_seq_length() == 4


def test_settings_may_come_as_a_generation_config(tiny_llama: nn.Module, make_adapters: Make) -> None:
    from transformers import GenerationConfig

    engine = Composer(tiny_llama, make_adapters(tiny_llama, "llama"), tokenizer=Tokens())
    config = GenerationConfig(max_new_tokens=4, do_sample=False, num_beams=2)
    expected = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=4, do_sample=False, num_beams=2)
    assert engine.generate(TEXTS, mixture=ROWS, generation_config=config) == expected
    with pytest.raises(CompositionError, match="dola"):
        engine.generate(TEXTS, mixture=ROWS, generation_config=GenerationConfig(dola_layers="high"))


def test_a_decoding_function_of_ones_own_is_passed_on(engine: Composer) -> None:

    def decode(model: Any, input_ids: Tensor, **_: Any) -> Tensor:
        return torch.cat([input_ids, model(input_ids=input_ids).logits[:, -1:].argmax(-1)], dim=1)

    found = engine.generate(["5 8", "9 7"], mixture=ROWS[:2], custom_generate=decode, max_new_tokens=1)
    assert found == engine.generate(["5 8", "9 7"], mixture=ROWS[:2], do_sample=False, max_new_tokens=1)


class _Halves:
    def weights(self, x_BTI: Tensor, layer: str) -> Tensor:
        return torch.full((1, 1, 3), 0.5)


def test_a_router_per_text_is_for_as_many_texts(exact: Composer) -> None:
    rows = [_Halves(), {"b": 0.5, "c": -0.5}, None]
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = exact.generate(TEXTS, mixture=[{"a": 0.5, "b": 0.5, "c": 0.5}, *ROWS[1:]], **options)
    assert exact.generate(TEXTS, mixture=rows, **options) == expected
    with pytest.raises(ScopeError, match="3 rows, but there are 6 texts"):
        exact.generate([*TEXTS, *TEXTS], mixture=rows, **options)
    with exact.activate(rows), pytest.raises(ScopeError, match="3 rows, but the batch has 4"):
        logits(exact.model, inputs("llama", rows=4))


def test_weights_for_fixed_tokens_are_refused(engine: Composer) -> None:
    with pytest.raises(ScopeError, match="5 tokens, and none for those to come"):
        engine.generate(["5 6 7 8 9"], mixture=MixtureWeights(torch.ones(1, 5, 1, 1), ("a",)), max_new_tokens=2)


def test_a_model_that_does_not_generate_is_named(tiny_bert: nn.Module, make_adapters: Make) -> None:
    with pytest.raises(CompositionError, match="BertForSequenceClassification does not generate"):
        Composer(tiny_bert, make_adapters(tiny_bert, "bert"), tokenizer=Tokens()).generate(["5"])


def test_generation_refuses_what_it_cannot_do(tiny_llama: nn.Module, make_adapters: Make) -> None:
    adapters = make_adapters(tiny_llama, "llama")
    with pytest.raises(CompositionError, match="tokenizer="):
        Composer(tiny_llama, adapters).generate(["5"])
    engine = Composer(tiny_llama, adapters, tokenizer=Tokens())
    with pytest.raises(CompositionError, match="put one text into a list"):
        engine.generate("5")
    with pytest.raises(ScopeError, match="3 rows, but there are 2 texts"):
        engine.generate(["5", "6"], mixture=ROWS)
    assert engine.generate([], mixture={"a": 1.0}) == []


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(3, 60), min_size=1, max_size=9),
            st.none() | st.dictionaries(st.sampled_from("abc"), st.sampled_from([-1.0, 0.5, 1.0]), max_size=3),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(1, 3),
)
@hypothesis_settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_texts_of_any_lengths_and_mixtures_share_a_batch(exact: Composer, rows: list[Any], num_beams: int) -> None:
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    texts = [" ".join(map(str, ids)) for ids, _ in rows]
    together = exact.generate(texts, mixture=[mixture for _, mixture in rows], **options)
    for text, (_, mixture), found in zip(texts, rows, together, strict=True):
        assert exact.generate([text], mixture=mixture or {}, **options) == [found]
