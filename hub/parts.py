"""Several models that adapters treat as one, such as the text encoders and the denoiser of an image pipeline."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

from torch import nn

import loraweave.registry as registry

# the parts of diffusers' pipelines that are trained with LoRA
PIPELINE_PARTS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "prior",
    "controlnet",
)


class Parts(nn.Module, ABC):
    """A module whose children are the parts of a pipeline, which are called one by one and never as one model.

    Adapters name a layer by its path here; `name_or_path` is what they record as their base. Entries of the registry
    `pipelines` are such classes; a live hook knows how the parts are called.
    """

    name_or_path: str

    @classmethod
    @abstractmethod
    def of(cls, pipeline: Any) -> Parts | None:
        """Return the parts of a pipeline, or None for what this class does not read."""

    @abstractmethod
    def paths(self, layers: Iterable[str], who: str) -> dict[str, str]:
        """Map each layer of an adapter to its path here. Raises LayerMismatch, naming `who`, for one without a place."""

    def require_same_parts(self) -> None:
        """Raise CompositionError if a part of the pipeline was replaced since this was made."""


def model_of(given: Any) -> Any:
    """Return the Parts of a pipeline that an entry of the registry `pipelines` reads, and anything else as it is."""
    if given is None or isinstance(given, nn.Module):
        return given
    readers = (registry.get("pipelines", name) for name in registry.names("pipelines"))
    return next((parts for reader in readers if (parts := reader.of(given)) is not None), given)
