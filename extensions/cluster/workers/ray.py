"""The workers of a Ray cluster, for a process that is connected to one."""

import os
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from loraweave.extend import WorkersFailed
from loraweave.extensions.cluster.workers._counted import Counted


class Ray(Counted):
    """The workers of a Ray cluster; Ray does not retry a lost task: `spread` does, and counts the losses."""

    def __init__(self, backend: Any, most: int | None) -> None:
        ray = _ray()
        # a task takes as many cores as torch has threads, unless the backend's arguments say otherwise
        wanted = {key: value for key, value in (backend.ray_remote_args or {}).items() if not key.startswith("max_")}
        options = {"num_cpus": torch.get_num_threads(), **wanted}
        super().__init__(lambda: int(ray.cluster_resources().get("CPU", 0) // (options["num_cpus"] or 1)), most)
        self._run = ray.remote(_called).options(max_retries=0, **options)
        self._cancel = partial(ray.cancel, force=True)
        self._references: dict[Future[Any], Any] = {}

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        self._references = {future: pending for future, pending in self._references.items() if not future.done()}
        reference = self._run.remote(call)
        future: Future[Any] = reference.future()
        self._references[future] = reference
        return future

    def close(self) -> None:
        for future, reference in self._references.items():
            if not future.done():
                self._cancel(reference)


def _called(call: Callable[[], Any]) -> Any:
    return call()


def _ray() -> Any:
    """Return the module ray, connected by `ray.init` or to RAY_ADDRESS; it starts no cluster, which would be open to all."""
    import ray

    if not ray.is_initialized():
        if "RAY_ADDRESS" not in os.environ:
            raise WorkersFailed('Ray is not connected: call ray.init(address="...") first, or set RAY_ADDRESS')
        ray.init()
    return ray
