"""Workers that are warm, and the fixtures of `letters.py`."""

from __future__ import annotations

from letters import letter_hub, trained_letters  # noqa: F401
from warm_workers import warm_workers as warm_workers
