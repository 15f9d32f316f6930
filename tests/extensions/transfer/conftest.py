from __future__ import annotations

from warm_workers import warm_workers as warm_workers
