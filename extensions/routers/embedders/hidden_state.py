"""The mean of the base model's last hidden states over a text, minus the mean of a few reference texts.

The hidden states of a language model lie close together, whatever the text; without the subtraction of the mean over a few
texts of different kinds, the cosine of any two is near 1.
"""

import json
import threading
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import numpy as np

import loraweave as lw
from loraweave.extend import fingerprint, text_digest, traits
from loraweave.extend.hubs import embed_in_batches

MAX_TOKENS = 256
BATCH_TEXTS = 16

# the texts that the common direction is measured on; another choice is another embedder
_REFERENCES = (
    "house",
    "12 + 30",
    "apple, run, green, quickly, table",
    "The committee approved the report on Monday.",
    "what time does the store close?",
    "Premise: A man sleeps.\nHypothesis: A man runs.",
)


@traits("base_model", "centred")
class HiddenState:
    """Unit vectors of mean hidden states of a base model, loaded on first use (`base_model`; None: the embedded default).

    `model` and `tokenizer`, given together, replace it. Texts are cut at 256 tokens. An adapter that is active in the model
    counts: embed outside of `activate`.
    """

    def __init__(self, *, base_model: str | None = None, model: Any = None, tokenizer: Any = None) -> None:
        self.base_model = base_model
        self._given = (model, tokenizer)

    @cached_property
    def _load(self) -> tuple[Any, Any]:
        model, tokenizer = self._given
        if model is None or tokenizer is None:
            model, tokenizer = lw.load_base(self.base_model)
        return model, tokenizer

    @property
    def dim(self) -> int:
        return int(self._load[0].config.hidden_size)

    @cached_property
    def id(self) -> str:
        """The digest of everything that decides a vector: the base model's fingerprint, truncation, reference texts."""
        settings = [fingerprint(self._load[0]).to_json(), MAX_TOKENS, _REFERENCES]
        return f"hiddenstate:{text_digest(json.dumps(settings))[:16]}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings (N, hidden size), fp32, unit norm; equal texts get equal rows."""
        rows_ND = self._means(texts) - self._common_D
        norms_N1 = np.linalg.norm(rows_ND, axis=1, keepdims=True)
        unit_ND: np.ndarray = (rows_ND / np.where(norms_N1 == 0, 1.0, norms_N1)).astype(np.float32)
        return unit_ND

    @cached_property
    def _common_D(self) -> np.ndarray:
        mean_D: np.ndarray = self._means(_REFERENCES).mean(axis=0)
        return mean_D

    def _means(self, texts: Sequence[str]) -> np.ndarray:
        """Return the mean hidden state of each text (N, D), float64."""
        return embed_in_batches(texts, partial(_encode, *self._load), self.dim, BATCH_TEXTS, np.float64)


# a fast tokenizer keeps its padding settings as state, and raises when two threads use it at once
_LOCK = threading.Lock()


def _encode(model: Any, tokenizer: Any, texts: list[str]) -> np.ndarray:
    import torch

    with _LOCK:
        # a first token is put before each text, so that the empty text has a state, too
        first = next(i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None)
        rows = [[first, *tokenizer(text, truncation=True, max_length=MAX_TOKENS)["input_ids"]] for text in texts]
    width = max(map(len, rows))
    # padded on the right: causal attention never looks there, and positions count from the text's beginning
    ids_BT = torch.tensor([[*row, *[first] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    device = next(model.parameters()).device
    with torch.no_grad():
        outputs = model(
            input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), output_hidden_states=True, use_cache=False
        )
    hidden_BTD = outputs.hidden_states[-1].double().cpu()
    mask_BT1 = mask_BT[..., None].double()
    mean_BD: np.ndarray = ((hidden_BTD * mask_BT1).sum(dim=1) / mask_BT1.sum(dim=1)).numpy()
    return mean_BD
