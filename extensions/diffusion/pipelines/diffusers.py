"""A diffusers pipeline as one model: the parts that adapters update, each under the pipeline's name for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from loraweave import CompositionError, LayerMismatch
from loraweave.extend.models import PIPELINE_PARTS, Parts, base_id, missing_layer


class Diffusers(Parts):
    """The text encoders and the denoiser of `pipe` as submodules, under names such as `text_encoder` and `unet`.

    A layer's path begins with its part, as in LoRA files of diffusers. `pipe` is not changed. For a part compiled by
    torch.compile, it takes the model inside. Raises CompositionError for a pipeline without such parts.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self.pipe = pipe
        self.name_or_path = base_id(pipe)
        for name in PIPELINE_PARTS:
            if isinstance(part := getattr(pipe, name, None), nn.Module):
                self.add_module(name, getattr(part, "_orig_mod", part))
        if not self._modules:
            raise CompositionError(
                f"{type(pipe).__name__} has none of the parts that adapters are for: {', '.join(PIPELINE_PARTS)}"
            )

    @classmethod
    def of(cls, pipeline: Any) -> Diffusers | None:
        """Return the parts of a diffusers pipeline, which is recognised by its `components`; None for anything else."""
        return cls(pipeline) if hasattr(type(pipeline), "components") and callable(pipeline) else None

    def require_same_parts(self) -> None:
        """Raise CompositionError if a part of the pipeline was replaced since this was made."""
        for name, part in self.named_children():
            now = getattr(self.pipe, name, None)
            if getattr(now, "_orig_mod", now) is not part:
                raise CompositionError(
                    f"{name!r} of the pipeline is not the {type(part).__name__} that was there when this Composer was made: "
                    "make a new Composer for the pipeline as it is now"
                )

    def paths(self, layers: Iterable[str], who: str) -> dict[str, str]:
        """Return {layer of an adapter: its path in this model}.

        A path is taken with or without CLIP's step `text_model`; one that names no part stands for the layer of the one part
        that has it. Raises LayerMismatch, naming `who`, for a layer of no or several parts, and for two with one path.
        """
        known: dict[str, list[str]] = {}
        for path, _ in self.named_modules():
            known.setdefault(_plain(path), []).append(path)
        placed: dict[str, str] = {}
        for layer in layers:
            plain = _plain(layer)
            fits = known.get(plain) or [path for part in self._modules for path in known.get(f"{part}.{plain}", ())]
            if len(fits) > 1:
                raise LayerMismatch(
                    f"{who} updates layer {layer!r}, which can be {' or '.join(map(repr, fits))}: put the part's name "
                    "before its layers with dataclasses.replace(adapter, layers={'text_encoder.' + layer: ...})"
                )
            if not fits:
                raise missing_layer(who, layer, (path for paths in known.values() for path in paths))
            if fits[0] in placed.values():
                raise LayerMismatch(f"{who} updates layer {fits[0]!r} twice, once as {layer!r}")
            placed[layer] = fits[0]
        return placed


def _plain(path: str) -> str:
    # transformers 5 removed the step from some of its text encoders
    return re.sub(r"(^|\.)text_model\.", r"\1", path)
