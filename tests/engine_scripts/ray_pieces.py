"""Pieces on a Ray cluster of three nodes, one of whose workers dies, and one of which raises."""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

given = json.loads(Path(sys.argv[1]).read_text())
sys.path.insert(0, given["root"])
# its workers, which are no copies of this process
os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

import joblib  # noqa: E402
import ray  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.joblib import register_ray  # noqa: E402

from loraweave.common.display import progress_bar  # noqa: E402
from loraweave.common.spread import Failed, spread  # noqa: E402
from loraweave.errors import WorkersFailed  # noqa: E402


def work(folder, name):
    """Notes that it runs, and says where."""
    ran = len(list(Path(folder).glob(f"{name}-*")))
    (Path(folder) / f"{name}-{time.monotonic_ns()}").touch()
    if name == "dies" and not ran:
        os._exit(1)
    if name == "raises":
        raise ValueError("its disk is full")
    return os.getpid()


def outcomes(folder, names):
    with joblib.parallel_config(backend="ray"), progress_bar(False) as bar:
        pieces = {name: name for name in names}
        return dict(spread(partial(work, folder), pieces, n_jobs=None, label="working", bar=bar))


if __name__ == "__main__":
    register_ray()
    try:
        outcomes(given["folder"], ["first"])
    except WorkersFailed as error:
        refused = str(error)
    # loopback addresses of their own: of 127.0.0.1 Ray makes that of the machine
    nodes = [{"node_ip_address": f"127.0.0.{2 + node}", "include_dashboard": False} for node in range(3)]
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **nodes[0]})
    for node in nodes[1:]:
        cluster.add_node(num_cpus=1, **node)
    ray.init(address=cluster.address, log_to_driver=False, _node_ip_address="127.0.0.2")
    found = outcomes(given["folder"], ["dies", "raises", "a", "b", "c"])
    ray.shutdown()
    cluster.shutdown()
    failed = {name: f"{type(each.error).__name__}: {each.error}" for name, each in found.items() if isinstance(each, Failed)}
    elsewhere = sorted(name for name, each in found.items() if isinstance(each, int) and each != os.getpid())
    ran = {name: len(list(Path(given["folder"]).glob(f"{name}-*"))) for name in found}
    Path(sys.argv[2]).write_text(json.dumps({"refused": refused, "failed": failed, "elsewhere": elsewhere, "ran": ran}))
