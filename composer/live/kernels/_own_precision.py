"""Products that are kept for other calls, in their own precision whatever the call that makes them runs in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Within it, products on the device are in the dtype of their factors, also below autocast."""
    # some devices, as meta, know no autocast; and without one there is nothing to turn off
    running = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if running else nullcontext()
