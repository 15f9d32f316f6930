"""The fixtures of `member_rows.py`, and reward models."""

from __future__ import annotations

import pytest
from member_rows import engine_of, ids, padded, rows  # noqa: F401
from tiny_models import draw_model

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture
def reward_model_of():
    """reward_model_of("llama"): a tiny sequence classifier of one label in float64, of weights that matter."""
    import transformers

    common = {"vocab_size": 61, "pad_token_id": 0, "num_labels": 1}
    made = {
        "llama": (transformers.LlamaForSequenceClassification, transformers.LlamaConfig, SIZES),
        "gpt2": (
            transformers.GPT2ForSequenceClassification,
            transformers.GPT2Config,
            {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
        ),
        "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, SIZES),
    }

    def make(kind):
        model_class, config_class, sizes = made[kind]
        return draw_model(lambda: model_class(config_class(**sizes, **common))).double()

    return make
