"""A tiny model in float64 with three adapters, and the log-likelihoods of its answers written out."""

from __future__ import annotations

import pytest
import torch

import loraweave as lw
from loraweave.composer.model.batches import encode

MIXTURE = {"a": 0.2, "b": -0.1, "c": 0.3}


@pytest.fixture(params=["gpt2", "llama", "t5"])
def engine(request, make_model, make_adapters):
    model = make_model(request.param, dtype=torch.float64)
    return lw.Composer(model, make_adapters(model, request.param))


@pytest.fixture
def candidate():
    return lw.MixtureWeights.of(MIXTURE, "abc")


@pytest.fixture
def logs(engine, tokenizer):
    """logs(task, input, text): the log-probabilities logs_KV where the tokens of one text are predicted, and the tokens."""

    @torch.no_grad()
    def find(task, text, target):
        model = engine.model
        (row,) = encode(model, tokenizer, [task.prompt(text)], [target])
        with engine.activate(MIXTURE):
            if model.config.is_encoder_decoder:
                begun = torch.tensor([[model.config.decoder_start_token_id, *row.target[:-1]]])
                logits = model(input_ids=torch.tensor([row.prompt]), decoder_input_ids=begun, use_cache=False).logits[0]
            else:
                logits = model(input_ids=torch.tensor([row.prompt + row.target])).logits[0, len(row.prompt) - 1 : -1]
        return logits.log_softmax(dim=1), torch.tensor(row.target)

    return find


@pytest.fixture
def likelihood(logs):
    """likelihood(task, input, text): the log-likelihoods log_K of the text's tokens after the input's prompt."""

    def find(task, text, target):
        logs_KV, target_K = logs(task, text, target)
        return logs_KV.gather(1, target_K[:, None])[:, 0]

    return find
