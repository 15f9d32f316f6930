"""The number of workers of a cluster, which changes over time."""

import math
import time
from collections.abc import Callable

from loraweave.extend import WorkersFailed

# seconds for which a count of workers is used
COUNTED_S = 2.0
# seconds without any worker after which a cluster counts as dead; one that grows on demand may need minutes
GONE_S = 300.0
# pieces sent ahead to each worker, so that none waits for the network
READY = 2


class Counted:
    """A cluster whose workers are counted again every COUNTED_S seconds, since they come and go."""

    def __init__(self, count: Callable[[], int], most: int | None) -> None:
        self._count, self._most = count, most
        # the last is the time since when there has been no worker, infinity while there is one
        self._known, self._counted, self._empty = 0, -math.inf, math.inf

    @property
    def room(self) -> int:
        now = time.monotonic()
        if now - self._counted > COUNTED_S:
            self._known, self._counted = self._count(), now
            self._empty = math.inf if self._known else min(self._empty, now)
        if now - self._empty > GONE_S:
            raise WorkersFailed(
                f"the cluster has had no worker for {GONE_S:.0f} s: look whether its head and its workers run, connect "
                "to it again, and make the same call; n_jobs=1 runs the pieces in this process"
            )
        return READY * max(1, self._known) if self._most is None else self._most
