"""Workers that are warm."""

from warm_workers import warm_workers as warm_workers
