"""What counts as a model."""

from __future__ import annotations

from typing import Any

from torch import nn

from loraweave.errors import CompositionError

# where pipelines keep the model that adapters are for
PARTS = ("transformer", "unet", "model")


def require_model(model: Any) -> None:
    """Raises CompositionError, with the way out, for what is no module; a pipeline is told which part of it is one."""
    if isinstance(model, nn.Module):
        return
    part = next((name for name in PARTS if isinstance(getattr(model, name, None), nn.Module)), None)
    way_out = "load it first, as lw.load_base() does" if part is None else f"pass its .{part}"
    raise CompositionError(f"adapters go onto a model, a torch.nn.Module, and {model!r:.60} is none: {way_out}")
