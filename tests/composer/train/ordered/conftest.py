"""Small tasks, and how a few steps are taken on them one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

import loraweave as lw

TASKS = {
    "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")],
    "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
    "count": [("one", "1"), ("two", "2")],
}


@pytest.fixture
def course(tiny_llama: Any, tokenizer: Any) -> Callable[..., dict[str, lw.Adapter]]:
    """course("ilora", decay=0.5): a few steps of rank 2 on each task in turn, {task: adapter}."""

    def run(
        way: str, tasks: Mapping[str, Any] = TASKS, *, settings: Mapping[str, Any] | None = None, **options: Any
    ) -> dict[str, lw.Adapter]:
        chosen = {"rank": 2, "steps": 4, "batch_size": 2, "lr": 1e-2, "jobs_per_batch": 2, **(settings or {})}
        return lw.train_adapters(
            tiny_llama, tokenizer, tasks, continual=way, continual_options=options, progress=False, **chosen
        )

    return run
