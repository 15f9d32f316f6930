"""A reference to the place that a base model was loaded from, by which a worker loads the model itself, once."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch

from loraweave.common.spread import processes_here
from loraweave.errors import BaseModelMismatch
from loraweave.hub.base import base_config, base_id, load_base
from loraweave.hub.gguf_base import without_bars

# the keys of a config that tell its place and library, and nothing about the model
PLACES = ("_name_or_path", "_commit_hash", "transformers_version")


@dataclass(frozen=True)
class BaseReference:
    """A reference to the base `name` at `place`, whose weights, config and vocabulary have this `digest`.

    It is pickled without the model; in the process where it was made, `load` returns the very model it was made from.
    """

    name: str
    place: str
    revision: str | None
    dtype: str
    attention: str | None
    device: str
    digest: str
    held: tuple[Any, Any] | None = field(default=None, compare=False, repr=False)

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> Self:
        """Return the reference of a model. Raises BaseModelMismatch if it has no folder or id to load it from."""
        name = base_id(model)
        place = str(Path(name).absolute()) if name and Path(name).is_dir() else name
        try:
            base_config(place)
        except BaseModelMismatch as error:
            raise BaseModelMismatch(
                f"workers load the base model by its name, but {name!r} cannot be loaded: save_pretrained() model "
                "and tokenizer to a folder that all workers see, and lw.load_base() it from there"
            ) from error
        revision = None if place != name else getattr(model.config, "_commit_hash", None)
        attention = getattr(model.config, "_attn_implementation", None)
        dtype, device = str(model.dtype).removeprefix("torch."), str(model.device)
        return cls(name, place, revision, dtype, attention, device, _digest(model, tokenizer), (model, tokenizer))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self.place, self.revision, self.dtype, self.attention, self.device, self.digest)

    def load(self) -> tuple[Any, Any]:
        """Return (model, tokenizer), read once per process. Raises BaseModelMismatch if the place has another model now."""
        return _loaded(self) if self.held is None else self.held


def base_loader(model: Any, tokenizer: Any, n_jobs: int | None) -> Callable[[], tuple[Any, Any]]:
    """Return a function that returns (model, tokenizer): these objects without workers, else loaded anew on each worker.

    With workers, raises BaseModelMismatch if the model has no folder or id to load it from.
    """
    if processes_here(n_jobs) is None:
        return lambda: (model, tokenizer)
    return BaseReference.of(model, tokenizer).load


@lru_cache(maxsize=1)
def _loaded(reference: BaseReference) -> tuple[Any, Any]:
    # the caller shows its own progress bar
    with without_bars():
        model, tokenizer = load_base(
            reference.place,
            dtype=getattr(torch, reference.dtype),
            device=None if reference.device == "cpu" else reference.device,
            attn_implementation=reference.attention,
            revision=reference.revision,
        )
    # what adapters record as their base
    model.config.name_or_path = model.name_or_path = reference.name
    if (digest := _digest(model, tokenizer)) != reference.digest:
        raise BaseModelMismatch(
            f"the base model that a worker loads from {reference.place!r} is not the one at hand (digest {digest[:12]}, not "
            f"{reference.digest[:12]}): its weights, config or tokenizer were changed since; save both, and load them again"
        )
    return model, tokenizer


def _digest(model: Any, tokenizer: Any) -> str:
    """Return the SHA-256 of the weights' bits, the config without PLACES, and the tokenizer's vocabulary and template."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    said = {key: value for key, value in model.config.to_dict().items() if key not in PLACES}
    special = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    about = [said, sorted(tokenizer.get_vocab().items()), special, getattr(tokenizer, "chat_template", None)]
    digest.update(json.dumps(about, sort_keys=True, default=str).encode())
    return digest.hexdigest()
