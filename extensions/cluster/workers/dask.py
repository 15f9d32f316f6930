"""The workers of a Dask cluster, for a process that has a `distributed.Client`."""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from loraweave.extensions.cluster.workers._counted import Counted


class Dask(Counted):
    """The workers of a Dask client, whose scheduler itself runs a lost worker's pieces again elsewhere."""

    def __init__(self, backend: Any, most: int | None) -> None:
        super().__init__(lambda: sum(backend.client.ncores().values()), most)
        self._executor = backend.client.get_executor(pure=False, **backend.submit_kwargs)

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = self._executor.submit(call)
        return future

    def close(self) -> None:
        self._executor.shutdown(wait=False)
