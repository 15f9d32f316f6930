"""Small tasks, and how a few steps are taken on them one after the other."""

from __future__ import annotations

import pytest
from watched_steps import watch_steps as watch_steps

from loraweave.extensions.continual import train_in_order


@pytest.fixture
def tasks():
    return {
        "upper": [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")],
        "double": [("a", "aa"), ("bb", "bbbb"), ("c", "cc")],
        "count": [("one", "1"), ("two", "2")],
    }


@pytest.fixture
def course(tiny_llama, tokenizer, tasks):
    """course("ilora", decay=0.5): a few steps of rank 2 on each task in turn, {task: adapter}."""

    def run(way, tasks=tasks, *, model=tiny_llama, settings=None, **options):
        chosen = {"rank": 2, "steps": 4, "batch_size": 2, "lr": 1e-2, "jobs_per_batch": 2, "progress": False}
        chosen |= {"options": options, **(settings or {})}
        return train_in_order(model, tokenizer, tasks, way=way, **chosen)

    return run
