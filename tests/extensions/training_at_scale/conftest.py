"""A base on the disk, which workers can load, and workers that are warm."""

from warm_workers import base, warm_workers  # noqa: F401
