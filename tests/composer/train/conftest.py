from __future__ import annotations

from watched_steps import watch_steps as watch_steps
