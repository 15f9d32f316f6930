"""Streams: the pieces are the text, under the mixture of whoever asked, and nothing is left when nobody reads on; seeds."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import Make
from torch import Tensor, nn
from transformers import LogitsProcessorList

from loraweave.composer.composer import Composer
from loraweave.composer.model.generate import _SeededRows, sample_by_seeds, stream
from loraweave.errors import CompositionError

TEXTS = ["what is it?", "no", "Read: "]
ROWS = [{"a": 1.0}, {"b": 0.5, "c": -0.5}, None]


@pytest.fixture
def engine(engine: Composer, tiny_llama: nn.Module) -> Iterator[Composer]:
    yield engine
    assert [thread for thread in threading.enumerate() if thread.name == "loraweave-stream"] == []
    assert sum(len(module._forward_hooks) for module in tiny_llama.modules()) == 0


def joined(pieces: Iterator[list[str]]) -> list[str]:
    return ["".join(parts) for parts in zip(*pieces, strict=True)]


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False},
        {"do_sample": True, "seeds": [1, 2, 3], "num_return_sequences": 2, "temperature": 1.5},
        {"do_sample": False, "cache_implementation": "static"},
    ],
    ids=["greedy", "seeded", "static cache"],
)
@pytest.mark.own_models
def test_the_pieces_are_what_generate_returns(settings: dict[str, Any], engine: Composer) -> None:
    expected = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=20, **settings)
    pieces = list(engine.stream(TEXTS, mixture=ROWS, max_new_tokens=20, **settings))
    assert joined(iter(pieces)) == expected
    assert len(pieces) > 10


def test_an_encoder_decoder_streams_its_answer(make_model: Make, make_adapters: Make, tokenizer: Any) -> None:
    model = make_model("t5")
    engine = Composer(model, make_adapters(model, "t5"), tokenizer=tokenizer)
    expected = engine.generate(TEXTS, mixture=ROWS, max_new_tokens=12, do_sample=False)
    assert joined(engine.stream(TEXTS, mixture=ROWS, max_new_tokens=12, do_sample=False)) == expected


def test_assisted_generation_streams_its_tokens_too(engine: Composer) -> None:
    settings = {"max_new_tokens": 12, "do_sample": False, "prompt_lookup_num_tokens": 3}
    expected = engine.generate(["ab ab ab"], mixture={"a": 1.0}, **settings)
    assert joined(engine.stream(["ab ab ab"], mixture={"a": 1.0}, **settings)) == expected


def test_a_stream_without_a_mixture_keeps_the_one_that_was_active_when_it_was_asked_for(engine: Composer) -> None:
    settings = {"max_new_tokens": 20, "do_sample": False}
    expected = engine.generate(TEXTS, mixture=ROWS, **settings)
    base = engine.generate(TEXTS, **settings)
    with engine.activate(ROWS):
        pieces = engine.stream(TEXTS, **settings)
        first = next(pieces)
        with engine.activate({"c": 2.0}):
            second = next(pieces)
    assert engine.active
    assert joined(itertools.chain([first, second], pieces)) == expected
    assert not engine.active
    assert joined(engine.stream(TEXTS, **settings)) == base


def test_a_stream_that_begins_after_its_activation_was_closed_says_so(engine: Composer) -> None:
    with engine.activate(ROWS):
        pieces = engine.stream(TEXTS, max_new_tokens=3)
    with pytest.raises(CompositionError, match="activation is closed"):
        next(pieces)


def test_two_streams_side_by_side_do_not_meet(engine: Composer) -> None:
    settings = {"max_new_tokens": 20, "do_sample": False}
    expected = [engine.generate(TEXTS[:1], mixture={name: 1.0}, **settings) for name in "ab"]
    streams = [engine.stream(TEXTS[:1], mixture={name: 1.0}, **settings) for name in "ab"]
    found = ["", ""]
    for both in itertools.zip_longest(*streams, fillvalue=[""]):
        found = [text + piece[0] for text, piece in zip(found, both, strict=True)]
    assert [[text] for text in found] == expected


def test_abandoned_streams_leave_nothing(engine: Composer) -> None:
    base = engine.generate(TEXTS, max_new_tokens=4, do_sample=False)
    for number in range(30):
        pieces = engine.stream(TEXTS, mixture=ROWS, max_new_tokens=50, do_sample=False)
        for _ in range(number % 3):
            next(pieces)
        if number % 2:
            pieces.close()  # type: ignore[attr-defined]
        del pieces
        assert not engine.active
    assert engine.generate(TEXTS, max_new_tokens=4, do_sample=False) == base


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, torch.OutOfMemoryError])
def test_what_the_model_raises_is_raised_to_the_reader(error: type[BaseException], engine: Composer) -> None:
    calls = 0

    def fail(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error("injected")

    handle = engine.model.lm_head.register_forward_hook(fail)
    with pytest.raises(error, match="injected"):
        list(engine.stream(TEXTS, mixture=ROWS, max_new_tokens=9, do_sample=False))
    handle.remove()
    assert not engine.active


def test_what_the_reader_raises_ends_the_stream(engine: Composer) -> None:
    def read() -> None:
        for _ in engine.stream(TEXTS, mixture=ROWS, max_new_tokens=9, do_sample=False):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        read()
    assert not engine.active


@pytest.mark.parametrize(
    ("settings", "message"), [({"num_beams": 2}, "beam search"), ({"streamer": object()}, "leave streamer out")]
)
def test_what_cannot_stream_is_refused_at_once(settings: dict[str, Any], message: str, engine: Composer) -> None:
    with pytest.raises(CompositionError, match=message):
        engine.stream(TEXTS, mixture=ROWS, **settings)


def test_no_texts_give_no_pieces(engine: Composer) -> None:
    assert list(engine.stream([], mixture={"a": 1.0})) == []


def test_an_iterator_may_end_in_its_own_thread(tokenizer: Any) -> None:
    ended = threading.Event()
    held: list[Any] = []

    def generate(streamer: Any) -> None:
        streamer.put(torch.zeros(1, 1, dtype=torch.long))
        streamer.put(torch.tensor([5]))
        while not held:
            pass
        # as the garbage collector would
        held.pop().close()
        ended.set()

    pieces = stream(generate, tokenizer)
    next(pieces)
    held.append(pieces)
    assert ended.wait(10)


def byte_tokenizer() -> Any:
    """A token for each byte, so that most characters of the world take several."""
    from tokenizers import Tokenizer, decoders
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: index for index, character in enumerate(sorted(ByteLevel.alphabet()))}
    inner = Tokenizer(BPE(vocabulary, []))
    inner.pre_tokenizer = ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def test_a_character_comes_whole_when_its_last_byte_has_come() -> None:
    tokenizer = byte_tokenizer()
    texts = ["añ🧶 – 織る\n", "plain"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    longest = max(map(len, ids))
    rows = torch.tensor([row + [tokenizer.eos_token_id] * (longest - len(row)) for row in ids])

    def generate(streamer: Any) -> None:
        streamer.put(torch.zeros(2, 4, dtype=torch.long))
        for column in rows.T:
            streamer.put(column)
        streamer.end()

    pieces = list(stream(generate, tokenizer))
    assert joined(iter(pieces)) == texts
    assert [first for first, _ in pieces if first] == list(texts[0])


def test_bytes_that_make_no_character_come_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("ab🧶")["input_ids"][:-1]

    def generate(streamer: Any) -> None:
        streamer.put(torch.zeros(1, 2, dtype=torch.long))
        for token in ids:
            streamer.put(torch.tensor([token]))
        streamer.end()

    assert joined(stream(generate, tokenizer)) == tokenizer.batch_decode([ids])


def test_autocast_holds_in_the_streams_thread(engine: Composer) -> None:
    seen: list[Tensor] = []
    handle = engine.model.model.layers[0].mlp.up_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.autocast("cpu", torch.bfloat16):
        pieces = engine.stream(TEXTS[:1], mixture={"a": 1.0}, max_new_tokens=2, do_sample=False)
    list(pieces)
    handle.remove()
    assert {each.dtype for each in seen} == {torch.bfloat16}


def draws(seeds: list[int], scores_BV: torch.Tensor) -> list[int]:
    drawn = _SeededRows(seeds, torch.device("cpu"))(torch.zeros(1), scores_BV)
    assert drawn.isfinite().sum(dim=1).tolist() == [1] * len(scores_BV)
    return drawn.argmax(dim=1).tolist()


def test_tokens_come_as_often_as_their_probability_says() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    found = draws([3], probabilities.log().expand(20_000, 4))
    shares = torch.bincount(torch.tensor(found), minlength=4) / len(found)
    assert float((shares - probabilities).abs().max()) < 0.015


def test_a_text_draws_by_its_own_seed_wherever_it_stands() -> None:
    scores_BV = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    together = draws([1, 2, 3], scores_BV)
    for index, seed in enumerate([1, 2, 3]):
        assert draws([seed], scores_BV[2 * index : 2 * index + 2]) == together[2 * index : 2 * index + 2]
    assert draws([4, 2, 9], scores_BV)[2:4] == together[2:4]


def test_the_processors_of_the_call_come_first() -> None:
    seen = []

    class Model:
        def _sample(self, input_ids: torch.Tensor, logits_processor: LogitsProcessorList, streamer: object) -> None:
            seen.extend([*logits_processor, streamer])

    sample_by_seeds([1], "streamer")(Model(), torch.zeros(1, 1), LogitsProcessorList(["temperature"]))
    assert [type(each).__name__ for each in seen] == ["str", "_SeededRows", "str"]
    assert seen[2] == "streamer"
