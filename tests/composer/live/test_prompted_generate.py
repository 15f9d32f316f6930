"""The model's generate while a router reads text: it says what the prompts are, and is the model's own again after it."""

import pytest
import torch

from loraweave.composer.composer import Composer
from loraweave.routers.tokens._call import current_prompts

IDS_BT = torch.tensor([[0, 0, 7, 8], [4, 5, 6, 9]])


class Reader:
    """Notes the prompts of each call."""

    needs_tokenizer = True

    def __init__(self, num_experts):
        self.num_experts = num_experts
        self.seen = []

    def weights(self, x_BTI, layer):
        return x_BTI.new_ones(1, 1, self.num_experts)

    def begin(self, model, arguments):
        prompts = current_prompts()
        self.seen.append(None if prompts is None else prompts.rows)
        return self


@pytest.fixture
def reader(pool):
    return Reader(len(pool))


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("mask", [{}, {"attention_mask": (IDS_BT != 0).long()}])
def test_every_call_of_generate_is_told_the_prompts_without_padding(model, pool, reader, tokenizer, use_cache, mask):
    with Composer(model, pool, tokenizer=tokenizer).activate(reader):
        model.generate(
            IDS_BT, max_new_tokens=3, min_new_tokens=3, do_sample=False, use_cache=use_cache, pad_token_id=0, **mask
        )
        model(IDS_BT)
    assert reader.seen == [[[7, 8], [4, 5, 6, 9]]] * 3 + [None]


def test_padding_that_ends_sequences_counts_where_no_mask_says_otherwise(model, pool, reader, tokenizer):
    with Composer(model, pool, tokenizer=tokenizer).activate(reader):
        model.generate(IDS_BT, max_new_tokens=1, do_sample=False, pad_token_id=0, eos_token_id=0)
    assert reader.seen == [IDS_BT.tolist()]


@pytest.mark.own_models
def test_a_generate_that_somebody_had_put_there_is_there_again(model, pool, reader, tokenizer):
    own = model.generate
    model.generate = lambda *args, **kwargs: own(*args, **kwargs)
    before = model.generate
    engine = Composer(model, pool, tokenizer=tokenizer)
    with engine.activate(reader), engine.activate(reader):
        model.generate(IDS_BT, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert model.generate is before
    assert len(reader.seen) == 1


def test_no_other_mixture_stands_in_for_it(model, pool, tokenizer):
    with Composer(model, pool, tokenizer=tokenizer).activate({"a": 1.0}):
        assert "generate" not in vars(model)
