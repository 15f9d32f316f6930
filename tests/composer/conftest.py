"""A base in a folder, warm workers, and the fixtures of `letters.py`."""

from letters import letter_hub, trained_letters  # noqa: F401
from warm_workers import base, warm_workers  # noqa: F401
